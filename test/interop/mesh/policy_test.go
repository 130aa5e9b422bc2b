package mesh

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/test/envoytest"
)

// enforcedWithin is what is promised between the change of a policy's file and its
// force at the proxy.
const enforcedWithin = time.Second

// policies is a directory of policies.
type policies struct{ dir string }

func (m *Mesh) policies(t testing.TB, name string) policies {
	t.Helper()
	p := policies{filepath.Join(m.dir, name)}
	if err := os.Mkdir(p.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return p
}

// set replaces a file at once, and returns when.
func (p policies) set(t testing.TB, name, spec string) time.Time {
	t.Helper()
	next := filepath.Join(p.dir, "."+name)
	content := fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: %s, namespace: shop}\nspec: %s\n", name, spec)
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	if err := os.Rename(next, filepath.Join(p.dir, name+".yaml")); err != nil {
		t.Fatal(err)
	}
	return now
}

// Proxy is a `proxy` beside an agent.
type Proxy struct {
	program
	addresses []string // of the inbound listeners, in the order of the apps
}

// startProxy runs a proxy before the given apps, and returns once it listens.
func (a *Agent) startProxy(t testing.TB, apps ...string) *Proxy {
	t.Helper()
	return a.startProxyWith(t, nil, apps...)
}

func (a *Agent) startProxyWith(t testing.TB, flags []string, apps ...string) *Proxy {
	t.Helper()
	p := &Proxy{program: program{name: a.mesh.unique(a.program.name + "-proxy"), binary: programs.path(t, "proxy"), dir: a.dir}}
	p.args = append([]string{"--socket", a.socket, "--drain-time", "1ms"}, flags...)
	for _, app := range apps {
		p.args = append(p.args, "--inbound", "127.0.0.1:0="+app)
	}
	t.Cleanup(func() { p.stop(t) })
	if err := p.launch(); err != nil {
		t.Fatal(err)
	}
	for _, app := range apps {
		line, err := p.waitLine(t.Context(), "that it listens", func(l logLine) bool {
			return l.text("msg") == "listening" && l.text("to") == app
		})
		if err != nil {
			t.Fatal(err)
		}
		p.addresses = append(p.addresses, line.text("address"))
	}
	return p
}

// peerConfig is go-spiffe's, as the workload of that agent, towards cart.
func (a *Agent) peerConfig(t testing.TB) *tls.Config {
	t.Helper()
	conf := goSpiffeClient(source(t, a), spiffeID("cart"))
	conf.NextProtos = []string{"istio", "http/1.1"}
	return conf
}

// refusedSoon wants plaintext to be refused, from a moment on that is soon after
// the change.
func refusedSoon(t *testing.T, address string, changed time.Time) {
	t.Helper()
	err := eventually(t.Context(), "plaintext to be refused", func() error {
		if once(t.Context(), address, nil) == nil {
			return errors.New("it is let in")
		}
		return nil
	})
	if took := time.Since(changed); err != nil || took > enforcedWithin {
		t.Errorf("refused %v after the change (%v)", took, err)
	}
}

// The whole way of a policy, by the real programs: a file on the CA's side, the
// resource to the agent, the socket, the proxy. A change is in force within a
// second, on open connections too; what restarts or is behind opens nothing.
func TestT10_F43_F69_PolicyFileToProxy(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 0)
	behind := m.policies(t, "behind") // of a replica that has not heard of what follows
	current := m.policies(t, "current")
	labels := m.write(t, "labels.yaml", []byte("workloads:\n  - {namespace: shop, service_account: cart, labels: {app: cart}}\n"))
	args := m.serveArgs
	m.serveArgs = append(args, "--policy-dir", behind.dir, "--workload-labels", labels)
	lagging := m.startCA(t)
	m.serveArgs = append(args, "--policy-dir", current.dir, "--workload-labels", labels)
	ca := m.startCA(t)
	cart := m.workload(t, "cart").startReadyAgent(t, ca, lagging)
	peer := m.workload(t, "frontend").startReadyAgent(t, ca).peerConfig(t)
	web, admin := backend(t), backend(t)
	proxy := cart.startProxy(t, web, admin)
	plain, exempt := proxy.addresses[0], proxy.addresses[1]

	// No policy says anything: PERMISSIVE.
	if err := once(t.Context(), plain, nil); err != nil {
		t.Fatalf("plaintext under PERMISSIVE: %v", err)
	}
	if err := once(t.Context(), plain, peer); err != nil {
		t.Fatalf("mutual TLS under PERMISSIVE: %v", err)
	}
	open, err := net.Dial("tcp", plain)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := keepAlive(open); err != nil {
		t.Fatal(err)
	}

	changed := current.set(t, "default", "{mtls: {mode: STRICT}}")
	_ = open.SetReadDeadline(time.Now().Add(patience))
	if _, err := open.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
		t.Errorf("the open plaintext connection: %v", err)
	}
	took := time.Since(changed)
	t.Logf("the open connection was closed %v after the policy was written", took)
	if took > enforcedWithin {
		t.Errorf("closed after %v; at most %v is promised", took, enforcedWithin)
	}
	refusedSoon(t, plain, changed)
	if err := once(t.Context(), plain, peer); err != nil {
		t.Errorf("mutual TLS under STRICT: %v", err)
	}

	// One port of one workload is exempted.
	_, port, _ := strings.Cut(admin, ":")
	current.set(t, "cart", fmt.Sprintf("{selector: {matchLabels: {app: cart}}, portLevelMtls: {%s: {mode: PERMISSIVE}}}", port))
	if err := eventually(t.Context(), "the exempted port to open", func() error { return once(t.Context(), exempt, nil) }); err != nil {
		t.Error(err)
	}
	strict := func(when string) {
		t.Helper()
		if once(t.Context(), plain, nil) == nil {
			t.Errorf("%s: plaintext is let in", when)
		}
	}
	strict("beside an exempted port")

	// The CA goes, and the agent turns to the replica that is behind: refused.
	ca.Kill9(t)
	if _, err := cart.waitLine(t.Context(), "that it refuses an older policy", func(l logLine) bool {
		return strings.Contains(l.text("msg"), "the policy has version")
	}); err != nil {
		t.Error(err)
	}
	strict("with a replica that is behind")
	cart.Kill9(t)
	strict("without an agent")
	lagging.Kill9(t)
	cart.Restart(t)
	strict("with an agent that knows nothing yet")
	ca.Restart(t)
	if err := waitReady(t.Context(), "the agent", cart.ops); err != nil {
		t.Error(err)
	}
	strict("after everything has restarted")

	// And back, by a change that the restarted CA finds.
	current.set(t, "default", "{mtls: {mode: PERMISSIVE}}")
	if err := eventually(t.Context(), "plaintext to be let in again", func() error { return once(t.Context(), plain, nil) }); err != nil {
		t.Error(err)
	}
}

// keepAlive makes one request and leaves the connection open.
func keepAlive(c net.Conn) error {
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: cart\r\n\r\n"); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	var got strings.Builder
	buf := make([]byte, 512)
	for !strings.Contains(got.String(), "echo: ") {
		n, err := c.Read(buf)
		got.Write(buf[:n])
		if err != nil {
			return err
		}
	}
	return nil
}

// Envoy as the client, by its own configuration, under each mode: it gets through
// where the mesh's mutual TLS is terminated, and nowhere else. Without an istio
// name in its ALPN a PERMISSIVE port leaves its TLS to the app, which has none.
func TestV25_EnvoyAsClientOfTheProxy(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 0)
	ca := m.startCA(t)
	cart := m.workload(t, "cart").startReadyAgent(t, ca)
	frontend := m.workload(t, "frontend").startReadyAgent(t, ca)
	addresses := cart.startModes(t, backend(t), backend(t), backend(t))
	tls := envoytest.TLS{Certificate: "default", Validation: "ROOTCA", PeerIDs: []string{cart.id}}
	var clients []envoytest.Client
	for _, mode := range modes {
		for name, alpn := range map[string][]string{"mesh": {"istio"}, "http": {"istio-http/1.1", "istio", "http/1.1"}, "none": nil} {
			clients = append(clients, envoytest.Client{Name: mode + "-" + name, Upstream: addresses[mode], ALPN: alpn, TLS: tls})
		}
	}
	e := startReadyEnvoy(t, envoytest.Bootstrap{NodeID: "frontend", Socket: frontend.socket, SDS: envoytest.Delta, Clients: clients})
	for name, passes := range map[string]bool{
		"STRICT-mesh": true, "STRICT-http": true, "STRICT-none": true,
		"PERMISSIVE-mesh": true, "PERMISSIVE-http": true, "PERMISSIVE-none": false,
		"DISABLE-mesh": false, "DISABLE-http": false, "DISABLE-none": false,
	} {
		err := once(t.Context(), listener(t, e, name), nil)
		if passes && err != nil || !passes && !isRefusal(err) {
			t.Errorf("%s: %v; want it to pass: %v", name, err, passes)
		}
	}
}

// A client that connects and says nothing for half a minute: STRICT has sent it
// away, and elsewhere it is still connected, to the app that waits with it.
func TestV25_IdleForHalfAMinute(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 0)
	cart := m.workload(t, "cart").startReadyAgent(t, m.startCA(t))
	addresses := cart.startModes(t, backend(t), backend(t), backend(t))
	silent := make(map[string]net.Conn)
	for _, mode := range modes {
		conn, err := net.Dial("tcp", addresses[mode])
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		silent[mode] = conn
	}
	half := time.NewTimer(30 * time.Second)
	defer half.Stop()
	_ = silent["STRICT"].SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := silent["STRICT"].Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("STRICT has not sent it away: %v", err)
	}
	<-half.C
	for _, mode := range []string{"PERMISSIVE", "DISABLE"} {
		if err := keepAlive(silent[mode]); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
	}
}

var modes = []string{"STRICT", "PERMISSIVE", "DISABLE"}

// startModes runs a proxy with an app under each mode, and returns the proxy's
// addresses.
func (a *Agent) startModes(t testing.TB, apps ...string) map[string]string {
	t.Helper()
	flags := []string{"--mode", "STRICT"}
	for i, mode := range modes {
		_, port, _ := strings.Cut(apps[i], ":")
		flags = append(flags, "--port-mode", port+"="+mode)
	}
	p := a.startProxyWith(t, flags, apps...)
	addresses := make(map[string]string)
	for i, mode := range modes {
		addresses[mode] = p.addresses[i]
	}
	return addresses
}
