package csi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"

	"github.com/meshca/meshca/agent/csi"
)

// Pods that ask for all that they can and read nothing take little of the agent
// that serves all pods of the node, and no other pod notices.
func TestT17_HostilePods(t *testing.T) {
	const hostile, connections = 4, 250
	most := int64(40 << 20)
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		most *= 8 // the race detector's own
	}
	w := newWorld(t)
	agent, i := w.startProcess()
	victim := w.pod(9)
	w.publish(i, victim)
	for n := range hostile {
		w.publish(i, w.pod(n))
	}
	w.served(victim)
	before := residentBytes(t, agent)
	var attacks, asked sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer attacks.Wait()
	defer cancel()
	for n := range hostile * connections {
		asked.Add(1)
		client := secretservice.NewSecretDiscoveryServiceClient(w.connect(filepath.Join(w.target(w.pod(n%hostile)), "agent.sock")))
		attacks.Go(func() { attack(ctx, client, sync.OnceFunc(asked.Done)) })
	}
	asked.Wait()
	for range 50 {
		w.served(victim)
	}
	if took := residentBytes(t, agent) - before; took > most {
		t.Errorf("%d hostile pods took %d MiB", hostile, took>>20)
	} else {
		t.Logf("%d hostile pods took %d MiB", hostile, took>>20)
	}
}

// attack opens a stream that names as much as it may, and goes on asking without
// reading an answer. It tells once it has asked, or has been refused.
func attack(ctx context.Context, client secretservice.SecretDiscoveryServiceClient, asked func()) {
	defer asked()
	stream, err := client.DeltaSecrets(ctx)
	if err != nil {
		return
	}
	names := make([]string, 1000)
	for n := range names {
		names[n] = strings.Repeat("x", 40) + fmt.Sprint(n)
	}
	// The second may never be taken in: the agent reads no further than it has answered.
	for stream.Send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: names}) == nil {
		asked()
	}
	<-ctx.Done()
}

// startProcess runs an agent as a process of its own.
func (w *world) startProcess() (*os.Process, *instance) {
	w.tb.Helper()
	exe, err := os.Executable()
	check(w.tb, err)
	conf, err := json.Marshal(w.node)
	check(w.tb, err)
	child := exec.Command(exe)
	child.Env = append(os.Environ(), "MESHCA_TEST_AGENT="+string(conf))
	child.Stderr = &w.log
	check(w.tb, child.Start())
	w.tb.Cleanup(func() {
		_ = child.Process.Kill()
		_ = child.Wait() // by a signal
	})
	socket := filepath.Join(w.node.Kubelet, "plugins", csi.DriverName, "csi.sock")
	eventually(w.tb, "listening", func() bool { return exists(socket) }) // it comes with its name
	return child.Process, &instance{NodeClient: nodeClient(w.connect(socket))}
}

// residentBytes is what a process has of the machine's memory for itself.
func residentBytes(t *testing.T, p *os.Process) int64 {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid))
	check(t, err)
	_, rest, _ := bytes.Cut(data, []byte("RssAnon:"))
	var kilobytes int64
	_, err = fmt.Sscanf(string(rest), "%d kB", &kilobytes)
	check(t, err)
	return kilobytes << 10
}
