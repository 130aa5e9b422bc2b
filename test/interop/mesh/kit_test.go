package mesh

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// trustDomain is that of deploy/envoy/mtls.yaml.
const trustDomain = "example.org"

func spiffeID(serviceAccount string) string {
	return "spiffe://" + trustDomain + "/ns/shop/sa/" + serviceAccount
}

// Mesh is a trust domain: a root in a state directory, the configuration of its
// CA, and somebody who issues tokens.
type Mesh struct {
	dir       string
	serveArgs []string
	issuer    *tokenissuer.Issuer

	mu       sync.Mutex
	cas      int
	programs int
	secrets  [][]byte // that no log may hold
}

// newMesh makes a trust domain whose certificates live as long as said, or an
// hour for zero.
func newMesh(t testing.TB, lifetime time.Duration) *Mesh {
	t.Helper()
	m := &Mesh{dir: shortDir(t)}
	config := m.issueTokens(t)
	if lifetime != 0 {
		config += fmt.Sprintf("leaf: {lifetime: %s, floor: %s}\n", lifetime, min(lifetime, 10*time.Second))
		m.serveArgs = append(m.serveArgs, "--test-lifetimes")
	}
	m.configure(t, config)
	if out, err := initCommand(t, m.state()).CombinedOutput(); err != nil {
		t.Fatalf("meshca init: %v\n%s", err, out)
	}
	return m
}

func initCommand(t testing.TB, state string) *exec.Cmd {
	return exec.Command(programs.path(t, "meshca"), "init", "--state-dir", state, "--trust-domain", trustDomain)
}

// issueTokens makes an issuer, and the part of the CA's configuration that
// believes it.
func (m *Mesh) issueTokens(t testing.TB) (config string) {
	t.Helper()
	var err error
	if m.issuer, err = tokenissuer.New(tokenissuer.Config{URL: "https://tokens.test"}); err != nil {
		t.Fatal(err)
	}
	return "token_issuers:\n- issuer: https://tokens.test\n  jwks_file: " + m.write(t, "jwks.json", m.issuer.JWKS()) + "\n"
}

// configure writes the programs' configuration files. Whatever the test does,
// its logs are looked at in the end.
func (m *Mesh) configure(t testing.TB, config string) {
	t.Helper()
	m.write(t, "meshca.yaml", []byte("trust_domain: "+trustDomain+"\n"+config))
	m.write(t, "agent.yaml", []byte("trust_domain: "+trustDomain+"\n"))
	t.Cleanup(func() { m.checkLogs(t) })
}

func (m *Mesh) state() string  { return filepath.Join(m.dir, "state") }
func (m *Mesh) anchor() string { return filepath.Join(m.state(), "root.pem") }

func (m *Mesh) write(t testing.TB, name string, content []byte) (path string) {
	t.Helper()
	path = filepath.Join(m.dir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// unique makes a program's name its own: its log is called by it.
func (m *Mesh) unique(name string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.programs++
	return fmt.Sprintf("%s%d", name, m.programs)
}

// keep remembers a token, no part of whose signature may be in any log.
func (m *Mesh) keep(token string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.secrets = append(m.secrets, []byte(token[strings.LastIndex(token, ".")+1:]))
	return token
}

// checkLogs wants no secret in any log, and shows the logs of a failed test.
func (m *Mesh) checkLogs(t testing.TB) {
	logs, err := filepath.Glob(filepath.Join(m.dir, "*.log"))
	if err != nil || len(logs) == 0 {
		t.Errorf("no logs to look at: %v", err)
	}
	for _, file := range logs {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
		}
		for _, secret := range append(m.secrets, []byte("PRIVATE KEY")) {
			if bytes.Contains(content, secret) {
				t.Errorf("%s holds a secret", file)
			}
		}
		if t.Failed() {
			t.Logf("%s:\n%s", filepath.Base(file), content[max(0, len(content)-4000):])
		}
	}
}

// CA is a `meshca serve`.
type CA struct {
	program
	address string // host:port, the same after a restart
}

// startCA runs a CA. Several of one mesh are replicas: they share the root.
func (m *Mesh) startCA(t testing.TB) *CA {
	t.Helper()
	m.mu.Lock()
	m.cas++
	name := fmt.Sprintf("ca%d", m.cas)
	m.mu.Unlock()
	c := &CA{
		program: program{name: name, binary: programs.path(t, "meshca"), dir: m.dir},
		address: "127.0.0.1:0",
	}
	c.args = append([]string{
		"serve", "--state-dir", m.state(), "--config", filepath.Join(m.dir, "meshca.yaml"),
		"--audit-log", filepath.Join(m.dir, name+"-audit.log"),
		"--listen", c.address, "--ops-listen", "127.0.0.1:0",
	}, m.serveArgs...)
	t.Cleanup(func() { c.stop(t) })
	c.Restart(t)
	return c
}

// Restart runs a new process at the same address, and returns once it can sign.
func (c *CA) Restart(t testing.TB) {
	t.Helper()
	for i, arg := range c.args {
		if arg == "--listen" {
			c.args[i+1] = c.address
		}
	}
	serving, err := c.start(t.Context())
	if err == nil {
		c.address = serving.text("listen")
		err = waitReady(t.Context(), c.name, serving.text("ops"))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Workload is a ServiceAccount of namespace shop, with its token in a file.
type Workload struct {
	mesh      *Mesh
	name, id  string
	tokenFile string
}

// workload gives a ServiceAccount a token.
func (m *Mesh) workload(t testing.TB, serviceAccount string) *Workload {
	t.Helper()
	token, err := m.issuer.Issue(tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: serviceAccount,
		PodName: serviceAccount + "-0", PodUID: "uid-of-" + serviceAccount, NodeName: "node", NodeUID: "uid-of-node",
		Audience: []string{"meshca"}, Lifetime: 30 * time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	return m.workloadWith(t, serviceAccount, token)
}

// workloadWith is the same for a token that somebody else issued.
func (m *Mesh) workloadWith(t testing.TB, serviceAccount, token string) *Workload {
	t.Helper()
	return &Workload{
		mesh: m, name: serviceAccount, id: spiffeID(serviceAccount),
		tokenFile: m.write(t, serviceAccount+".token", []byte(m.keep(token))),
	}
}

// Agent is an agent that keeps one workload's identity.
type Agent struct {
	program
	*Workload
	socket string
	ops    string
}

// startAgent runs an agent for the workload.
func (w *Workload) startAgent(t testing.TB, cas ...*CA) *Agent {
	t.Helper()
	a := &Agent{
		program:  program{name: w.name, binary: programs.path(t, "agent"), dir: w.mesh.dir},
		Workload: w,
		socket:   filepath.Join(w.mesh.dir, w.name+".sock"),
	}
	a.args = []string{
		"--config", filepath.Join(w.mesh.dir, "agent.yaml"), "--trust-anchor", w.mesh.anchor(),
		"--token-file", w.tokenFile, "--socket", a.socket, "--ops-listen", "127.0.0.1:0",
	}
	for _, ca := range cas {
		a.args = append(a.args, "--ca", ca.address)
	}
	t.Cleanup(func() { a.stop(t) })
	a.Restart(t)
	return a
}

// Restart runs a new process on the same socket, and returns once it serves,
// which is before it has an SVID.
func (a *Agent) Restart(t testing.TB) {
	t.Helper()
	serving, err := a.start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a.ops = serving.text("ops")
}

// startReadyAgent is startAgent, and returns once the agent has an SVID.
func (w *Workload) startReadyAgent(t testing.TB, cas ...*CA) *Agent {
	t.Helper()
	a := w.startAgent(t, cas...)
	if err := waitReady(t.Context(), a.program.name, a.ops); err != nil {
		t.Fatal(err)
	}
	return a
}

// obtained matches the line about a new certificate.
func obtained(l logLine) bool { return strings.HasPrefix(l.text("msg"), "certificate obtained") }

// shortDir is a directory whose sockets' paths fit into the 108 bytes that
// the kernel allows, which t.TempDir's do not always.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mesh")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
