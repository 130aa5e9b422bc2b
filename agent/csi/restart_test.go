package csi_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/meshca/meshca/agent/csi"
)

// The next agent serves the same folder again, with a new key, before the
// kubelet has called; a program that follows the socket comes back by itself.
func TestT4_F36_VolumesOutliveTheAgent(t *testing.T) {
	w := newWorld(t)
	first := w.start()
	p := w.pod(1)
	w.publish(first, p)
	before := w.served(p)
	folder, err := os.Stat(w.target(p))
	check(t, err)
	dir, err := os.Open(w.target(p))
	check(t, err)
	defer func() { _ = dir.Close() }()
	source, err := workloadapi.NewX509Source(w.context(), workloadapi.WithClientOptions(
		workloadapi.WithAddr("unix:///proc/self/fd/"+itoa(dir.Fd())+"/agent.sock")))
	check(t, err)
	defer func() { _ = source.Close() }()

	first.stop()
	if !exists(filepath.Join(w.target(p), "agent.sock")) {
		t.Error("an orderly end takes the socket away, which clients would have to wait for")
	}
	w.start()
	after := w.served(p)
	again, err := os.Stat(w.target(p))
	check(t, err)
	if !os.SameFile(folder, again) {
		t.Error("the folder is another one; containers have the old one mounted")
	}
	if slices.Equal(before.Certificates[0].RawSubjectPublicKeyInfo, after.Certificates[0].RawSubjectPublicKeyInfo) {
		t.Error("it has the old key, which must have been kept somewhere")
	}
	for _, svid := range []*x509svid.SVID{before, after} {
		key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
		check(t, err)
		for _, name := range w.stateFiles() {
			data, err := os.ReadFile(filepath.Join(w.node.State, name))
			check(t, err)
			for _, form := range [][]byte{key, []byte(base64.StdEncoding.EncodeToString(key)), []byte("PRIVATE KEY")} {
				if bytes.Contains(data, form) {
					t.Errorf("a private key lies in %s", name)
				}
			}
		}
	}
	eventually(t, "followed by a program that was there before", func() bool {
		svid, err := source.GetX509SVID()
		return err == nil && slices.Equal(svid.Certificates[0].Raw, after.Certificates[0].Raw)
	})
}

// The same with kill -9, of a real process.
func TestF36_AgentIsKilled(t *testing.T) {
	w := newWorld(t)
	exe, err := os.Executable()
	check(t, err)
	conf, err := json.Marshal(w.node)
	check(t, err)
	child := exec.Command(exe)
	child.Env = append(os.Environ(), "MESHCA_TEST_AGENT="+string(conf))
	child.Stderr = &w.log
	check(t, child.Start())
	defer func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	}()
	socket := filepath.Join(w.node.Kubelet, "plugins", csi.DriverName, "csi.sock")
	eventually(t, "listening", func() bool { return exists(socket) }) // it comes with its name
	conn := w.connect(socket)
	p := w.pod(1)
	w.publish(&instance{NodeClient: nodeClient(conn)}, p)
	w.served(p)

	check(t, child.Process.Kill())
	_ = child.Wait() // by a signal
	died := time.Now()
	i := w.start()
	w.served(p)
	if took := time.Since(died); took > time.Second {
		t.Errorf("served again after %v", took)
	}
	w.publish(i, p) // the kubelet does not know, and goes on
	w.unpublish(i, p)
	if exists(w.target(p)) || len(w.stateFiles()) != 0 {
		t.Error("left behind")
	}
}

// A program can lock the folder that it has mounted, read-only as it is. That
// delays nobody's socket: not even its own.
func TestF36_PodLocksItsFolder(t *testing.T) {
	w := newWorld(t)
	first := w.start()
	var pods []pod
	for n := range 9 {
		pods = append(pods, w.pod(n))
		w.publish(first, pods[n])
	}
	first.stop()
	for _, p := range pods[1:] {
		dir, err := os.Open(w.target(p))
		check(t, err)
		defer func() { _ = dir.Close() }()
		check(t, syscall.Flock(int(dir.Fd()), syscall.LOCK_EX))
	}
	began := time.Now()
	w.start()
	w.served(pods[0])
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("served after %v", took)
	}
	w.served(pods[8])
}

// A successor that starts too early waits for its predecessor, which goes on
// meanwhile.
func TestSuccessorWaits(t *testing.T) {
	w := newWorld(t)
	first := w.start()
	p := w.pod(1)
	w.publish(first, p)
	started := make(chan *csi.Plugin, 1)
	stop := background(t, func(ctx context.Context) error {
		return runNode(ctx, w.node, &w.log, prometheus.NewRegistry(), func(p *csi.Plugin) { started <- p })
	})
	<-started
	eventually(t, "waiting", func() bool { return w.log.has("waiting for the agent that serves this node's volumes to end") })
	w.served(p)
	w.publish(first, w.pod(2))
	first.stop()
	eventually(t, "served by the successor", func() bool { return w.log.has("sockets of volumes are there again") })
	w.served(p)
	w.served(w.pod(2))
	stop()
}

// Whatever has become of the entries, the agent starts, names what it cannot
// use, and serves the rest.
func TestF13_CorruptState(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	var pods []pod
	names := map[string]pod{} // file → pod
	for n := range 9 {
		p := w.pod(n)
		before := w.stateFiles()
		w.publish(i, p)
		for _, name := range w.stateFiles() {
			if !slices.Contains(before, name) {
				names[name] = p
			}
		}
		pods = append(pods, p)
	}
	i.stop()
	file := func(n int) string {
		for name, p := range names {
			if p == pods[n] {
				return filepath.Join(w.node.State, name)
			}
		}
		t.Fatal("no file")
		return ""
	}
	change := func(n int, from, to string) {
		data, err := os.ReadFile(file(n))
		check(t, err)
		changed := strings.Replace(string(data), from, to, 1)
		if changed == string(data) {
			t.Fatalf("no %q in the entry", from)
		}
		check(t, os.WriteFile(file(n), []byte(changed), 0o600))
	}
	check(t, os.Truncate(file(0), 40))
	check(t, os.Truncate(file(1), 0))
	change(2, `"version":1`, `"version":2`)
	change(3, "/mount", "/../../../../../../etc")
	change(4, `"service_account":"cart-4"`, `"service_account":"admin"`)
	check(t, os.WriteFile(file(5), make([]byte, 100<<10), 0o600))
	check(t, os.RemoveAll(filepath.Dir(w.target(pods[6])))) // its pod is gone
	swapped, err := os.ReadFile(file(8))
	check(t, err)
	check(t, os.WriteFile(file(7), swapped, 0o600))
	check(t, os.WriteFile(filepath.Join(w.node.State, ".new-half"), []byte("{"), 0o600))

	i = w.start()
	w.served(pods[8])
	for _, n := range []int{0, 1, 2, 3, 4, 5, 7} {
		name := filepath.Base(file(n))
		if exists(file(n)) || !exists(file(n)+".corrupt") || !w.log.has(name+".corrupt") {
			t.Errorf("entry %d is not set aside, or not named", n)
		}
	}
	for _, name := range w.stateFiles() {
		data, err := os.ReadFile(filepath.Join(w.node.State, name))
		check(t, err)
		if strings.HasSuffix(name, ".corrupt") && bytes.Contains(data, []byte("eyJ")) {
			t.Errorf("a token lies in %s", name)
		}
	}
	if exists(file(6)) || exists(filepath.Join(w.node.State, ".new-half")) {
		t.Error("what nobody needs is left")
	}
	for _, n := range []int{0, 1, 2, 3, 4, 5, 7} { // and then the kubelet comes
		w.publish(i, pods[n])
		w.served(pods[n])
	}
	i.stop()
	w.start()
	for _, name := range w.stateFiles() {
		if strings.HasSuffix(name, ".corrupt") {
			t.Errorf("%s is left at the next start but one", name)
		}
	}
	if w.log.has("eyJ") {
		t.Error("the log holds what is in an entry")
	}
}

// What holds tokens is in memory, and ours alone.
func TestV56_StateFolderIsPrivate(t *testing.T) {
	w := newWorld(t)
	run := func(disk bool) error {
		ctx, cancel := context.WithTimeout(t.Context(), timeout) // it is refused at once
		defer cancel()
		return runNodeWith(ctx, w.node, &w.log, disk)
	}
	check(t, os.Mkdir(w.node.State, 0o750))
	if err := run(true); err == nil || !strings.Contains(err.Error(), "make its mode 0700") {
		t.Errorf("readable by others: %v", err)
	}
	check(t, os.Chmod(w.node.State, 0o700))
	if inMemory(t, w.node.State) {
		w.node.State = folderIn(t, ".") // the temporary folder may be in memory itself
	}
	if err := run(false); err == nil || !strings.Contains(err.Error(), "tokens of pods do not belong on a disk") {
		t.Errorf("on a disk: %v", err)
	}
	w.node.State = folderIn(t, "/dev/shm")
	if !inMemory(t, w.node.State) {
		t.Skip("there is no tmpfs at /dev/shm to try the other way with")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- runNodeWith(ctx, w.node, &w.log, false) }()
	socket := filepath.Join(w.node.Kubelet, "plugins", csi.DriverName, "csi.sock")
	eventually(t, "listening", func() bool { return exists(socket) || len(done) > 0 })
	cancel()
	if err := <-done; err != nil {
		t.Errorf("in memory: %v", err)
	}
}

func folderIn(t *testing.T, parent string) string {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "meshca-test-")
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	dir, err = filepath.Abs(dir)
	check(t, err)
	return dir
}

func inMemory(t *testing.T, dir string) bool {
	t.Helper()
	var about syscall.Statfs_t
	check(t, syscall.Statfs(dir, &about))
	return about.Type == 0x01021994 // tmpfs
}
