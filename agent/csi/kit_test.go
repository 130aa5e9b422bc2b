package csi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/agent/csi"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/server"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// TestMain is also the agent of a node: a process that tests can kill.
func TestMain(m *testing.M) {
	if conf := os.Getenv("MESHCA_TEST_AGENT"); conf != "" {
		var n nodeConfig
		if err := json.Unmarshal([]byte(conf), &n); err != nil {
			panic(err)
		}
		fmt.Fprintln(os.Stderr, runNode(context.Background(), n, os.Stderr, prometheus.NewRegistry(), nil))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

const (
	caName  = "meshca.meshca-system.svc"
	timeout = 20 * time.Second // until a test gives up on something that has to come
)

// nodeConfig is what a node's agent is started with.
type nodeConfig struct{ CA, Anchor, Token, Kubelet, State, TrustDomain string }

// runNode is the agent of a node, of real parts. It tells started of them.
func runNode(ctx context.Context, n nodeConfig, log io.Writer, metrics prometheus.Registerer, started func(*csi.Plugin)) error {
	return runNodeOn(ctx, n, true, log, metrics, started)
}

// runNodeWith is an agent whose state may be on a disk, or not.
func runNodeWith(ctx context.Context, n nodeConfig, log io.Writer, disk bool) error {
	return runNodeOn(ctx, n, disk, log, prometheus.NewRegistry(), nil)
}

func runNodeOn(ctx context.Context, n nodeConfig, disk bool, log io.Writer, metrics prometheus.Registerer, started func(*csi.Plugin)) error {
	td, err := identity.ParseTrustDomain(n.TrustDomain)
	if err != nil {
		return err
	}
	client, err := caclient.New(caclient.Config{Addresses: []string{n.CA}, ServerName: caName, TrustDomain: td, AnchorFile: n.Anchor, Shared: true, Now: time.Now})
	if err != nil {
		return err
	}
	defer client.Close()
	l := slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	host, err := agent.NewHost(agent.HostConfig{CA: client, Token: caclient.TokenFile(n.Token), Now: time.Now, Log: l, Metrics: metrics})
	if err != nil {
		return err
	}
	plugin, err := csi.New(csi.Config{
		Host: host, KubeletDir: n.Kubelet, StateDir: n.State, StateOnDisk: disk, Version: "test", Now: time.Now, Log: l, Metrics: metrics,
	})
	if err != nil {
		return err
	}
	if started != nil {
		started(plugin)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var following sync.WaitGroup
	following.Go(func() { _ = host.Run(ctx) }) // it returns nil
	err = plugin.Run(ctx)
	cancel()
	following.Wait()
	return err
}

// world is a CA and a node with a kubelet's folder.
type world struct {
	tb   testing.TB
	kit  *catest.Kit
	node nodeConfig
	log  logBuffer
}

func newWorld(tb testing.TB) *world {
	tb.Helper()
	w := &world{tb: tb, kit: catest.New(tb)}
	dir := tb.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(tb, err)
	w.node = nodeConfig{
		CA: l.Addr().String(), Anchor: w.kit.Anchor, Token: filepath.Join(dir, "token"),
		Kubelet: filepath.Join(dir, "kubelet"), State: filepath.Join(dir, "state"), TrustDomain: w.kit.TrustDomain.String(),
	}
	for _, d := range []string{"pods", "plugins", "plugins_registry"} {
		check(tb, os.MkdirAll(filepath.Join(w.node.Kubelet, d), 0o750))
	}
	own := pod{namespace: "meshca-agents", account: "meshca-agent", name: "meshca-agent-x", uid: "9c8d0f7e-0000-4000-8000-00000000000a"}
	check(tb, os.WriteFile(w.node.Token, []byte(own.token(w, "meshca")), 0o600))
	w.serveCA(l)
	return w
}

// serveCA runs the real CA server until stop is called or the test ends.
func (w *world) serveCA(l net.Listener) (stop func()) {
	w.tb.Helper()
	s, err := server.New(server.Config{Authority: w.kit.Authority, Authenticator: w.kit.Authenticator, Names: ca.ServingNames{DNS: []string{caName}}})
	check(w.tb, err)
	return background(w.tb, func(ctx context.Context) error { return s.Serve(ctx, l) })
}

// background runs f until stop is called or the test ends.
func background(tb testing.TB, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("in the background: %v", err)
		}
	})
	tb.Cleanup(stop)
	return stop
}

// instance is a running agent, and the kubelet's connection to it.
type instance struct {
	spec.NodeClient
	conn    *grpc.ClientConn
	plugin  *csi.Plugin
	metrics *prometheus.Registry
	stop    func()
}

// start runs an agent in this process and connects to it as a kubelet does.
func (w *world) start() *instance {
	w.tb.Helper()
	i := &instance{metrics: prometheus.NewRegistry()}
	started := make(chan *csi.Plugin, 1)
	stop := background(w.tb, func(ctx context.Context) error {
		return runNode(ctx, w.node, &w.log, i.metrics, func(p *csi.Plugin) { started <- p })
	})
	i.plugin = <-started
	socket := filepath.Join(w.node.Kubelet, "plugins", csi.DriverName, "csi.sock")
	eventually(w.tb, "listening for the kubelet", func() bool {
		c, err := dialUnix(w.context(), socket)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	i.conn = w.connect(socket)
	i.NodeClient = spec.NewNodeClient(i.conn)
	i.stop = stop
	_, err := spec.NewIdentityClient(i.conn).Probe(w.context(), &spec.ProbeRequest{})
	check(w.tb, err)
	return i
}

// connect dials a socket whatever the length of its path.
func (w *world) connect(path string) *grpc.ClientConn {
	w.tb.Helper()
	conn, err := grpc.NewClient("passthrough:///kubelet", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dialUnix(ctx, path) }))
	check(w.tb, err)
	w.tb.Cleanup(func() { _ = conn.Close() })
	return conn
}

func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	return (&net.Dialer{}).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)))
}

func (w *world) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	w.tb.Cleanup(cancel)
	return ctx
}

// pod is one of the node's.
type pod struct{ namespace, account, name, uid string }

func (w *world) pod(n int) pod {
	return pod{"shop", fmt.Sprintf("cart-%d", n%10), fmt.Sprintf("cart-%d", n), fmt.Sprintf("7f9c1e2a-4f0e-4c3e-9d55-%012d", n)}
}

// token mints the pod's token for an audience.
func (p pod) token(w *world, audience string) string {
	w.tb.Helper()
	raw, err := w.kit.Tokens.Issue(tokenissuer.Claims{
		Namespace: p.namespace, ServiceAccount: p.account, PodName: p.name, PodUID: p.uid,
		NodeName: "node-1", NodeUID: "1b4e28ba-2fa1-11d2-883f-0016d3cca427", Audience: []string{audience}, Lifetime: time.Hour,
	})
	check(w.tb, err)
	return raw
}

func (p pod) id() string { return "spiffe://cluster.local/ns/" + p.namespace + "/sa/" + p.account }

func (p pod) volume() string { return "csi-" + p.uid }

// target is the folder of the pod's volume, whose parent the kubelet has made.
func (w *world) target(p pod) string {
	w.tb.Helper()
	parent := filepath.Join(w.node.Kubelet, "pods", p.uid, "volumes", "kubernetes.io~csi", "meshca")
	check(w.tb, os.MkdirAll(parent, 0o750))
	return filepath.Join(parent, "mount")
}

// request is what a kubelet sends for a pod with that token.
func (w *world) request(p pod, token string) *spec.NodePublishVolumeRequest {
	w.tb.Helper()
	tokens, err := json.Marshal(map[string]any{"meshca": map[string]string{"token": token, "expirationTimestamp": time.Now().Add(time.Hour).UTC().Format(time.RFC3339)}})
	check(w.tb, err)
	return &spec.NodePublishVolumeRequest{
		VolumeId: p.volume(), TargetPath: w.target(p), Readonly: true,
		VolumeCapability: &spec.VolumeCapability{
			AccessType: &spec.VolumeCapability_Mount{Mount: &spec.VolumeCapability_MountVolume{}},
			AccessMode: &spec.VolumeCapability_AccessMode{Mode: spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/pod.name": p.name, "csi.storage.k8s.io/pod.namespace": p.namespace, "csi.storage.k8s.io/pod.uid": p.uid,
			"csi.storage.k8s.io/serviceAccount.name": p.account, "csi.storage.k8s.io/ephemeral": "true",
		},
		Secrets: map[string]string{"csi.storage.k8s.io/serviceAccount.tokens": string(tokens)},
	}
}

func (w *world) publish(i *instance, p pod) {
	w.tb.Helper()
	_, err := i.NodePublishVolume(w.context(), w.request(p, p.token(w, "meshca")))
	check(w.tb, err)
}

func (w *world) unpublish(i *instance, p pod) {
	w.tb.Helper()
	_, err := i.NodeUnpublishVolume(w.context(), &spec.NodeUnpublishVolumeRequest{VolumeId: p.volume(), TargetPath: w.target(p)})
	check(w.tb, err)
}

// fetch asks the socket of a pod's volume by go-spiffe, as a program in the pod
// does, whose path is short because the folder is mounted.
func (w *world) fetch(ctx context.Context, p pod) (*x509svid.SVID, error) {
	dir, err := os.Open(w.target(p))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	return workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(fmt.Sprintf("unix:///proc/self/fd/%d/agent.sock", dir.Fd())))
}

// served wants the pod to get its identity from its volume.
func (w *world) served(p pod) *x509svid.SVID {
	w.tb.Helper()
	svid, err := w.fetch(w.context(), p)
	check(w.tb, err)
	if svid.ID.String() != p.id() {
		w.tb.Errorf("pod %s is %s", p.name, svid.ID)
	}
	return svid
}

// eventually waits until ok says so.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	deadline := time.After(timeout)
	for !ok() {
		select {
		case <-ticker.C:
		case <-deadline:
			tb.Fatalf("after %v: not %s", timeout, what)
		}
	}
}

func nodeClient(conn *grpc.ClientConn) spec.NodeClient { return spec.NewNodeClient(conn) }

func itoa(fd uintptr) string { return strconv.FormatUint(uint64(fd), 10) }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// stateFiles returns the names in the folder of the state, without the lock.
func (w *world) stateFiles() (names []string) {
	w.tb.Helper()
	entries, err := os.ReadDir(w.node.State)
	check(w.tb, err)
	for _, e := range entries {
		if e.Name() != "lock" {
			names = append(names, e.Name())
		}
	}
	return names
}

func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// logBuffer keeps the log.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *logBuffer) has(text string) bool { return strings.Contains(l.String(), text) }
