package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/audit"
	"github.com/meshca/meshca/ca/roots"
	"github.com/meshca/meshca/ca/self"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/refdoc"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

var update = flag.Bool("update", false, "write docs/reference/meshca.md")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// initState makes a state directory and a minimal configuration.
func initState(t *testing.T) (state, config string) {
	t.Helper()
	dir := t.TempDir()
	state, config = filepath.Join(dir, "state"), filepath.Join(dir, "meshca.yaml")
	if code, _, stderr := execute(t, "init", "--state-dir", state); code != 0 {
		t.Fatal(stderr)
	}
	issuer, err := tokenissuer.New(tokenissuer.Config{URL: "https://k8s"})
	if err != nil {
		t.Fatal(err)
	}
	keys := filepath.Join(dir, "jwks.json")
	if err := os.WriteFile(keys, issuer.JWKS(), 0o600); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("token_issuers:\n- issuer: https://k8s\n  jwks_file: %s\n", keys)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return state, config
}

func TestReferenceIsCurrent(t *testing.T) {
	state, configFile := initState(t)
	c, file, err := loadConfig(configFile, false)
	if err != nil {
		t.Fatal(err)
	}
	metrics := refdoc.NewRecorder()
	trail, err := audit.New("nowhere", nopCloser{io.Discard}, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	defer trail.Close()
	p, err := build(c, file, serveOptions{stateDir: state, listen: "127.0.0.1:0", policyDir: t.TempDir()}, slog.New(slog.DiscardHandler), metrics, trail)
	if err != nil {
		t.Fatal(err)
	}
	// With a cluster in place of files; nobody is asked yet.
	metrics.Alternatively()
	c.Kubernetes.Issuer = "https://kubernetes"
	td := identitytest.TrustDomain(t, "cluster.local")
	k, err := openCluster(c, &rest.Config{Host: "https://127.0.0.1:1", TLSClientConfig: rest.TLSClientConfig{CAFile: self.AnchorPath(state)}}, "meshca-system", true, td, slog.New(slog.DiscardHandler), metrics)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.distribute(p.authority, metrics); err != nil {
		t.Fatal(err)
	}
	// With a root that is not its own.
	metrics.Alternatively()
	if _, err := openFiles(filesConfig{Dir: operatorsCA(t, state)}, td, nil, slog.New(slog.DiscardHandler), metrics); err != nil {
		t.Fatal(err)
	}
	metrics.Alternatively()
	v := defaultVaultConfig()
	v.Addresses, v.CAFile, v.RootsFile = []string{"https://127.0.0.1:1"}, self.AnchorPath(state), self.AnchorPath(state)
	v.TokenFile = filepath.Join(state, "none")
	if _, err := openVault(v, nil, slog.New(slog.DiscardHandler), metrics); err != nil {
		t.Fatal(err)
	}
	page := refdoc.Head + "# meshca\n\n" + refdoc.Commands(newRoot()) + "\n" + refdoc.Settings(defaultConfig()) + "\n" + metrics.Metrics()
	if err := refdoc.Check("../../docs/reference/meshca.md", page, *update); err != nil {
		t.Error(err)
	}
}

// logLines collects a program's JSON log and tells of lines as they come.
type logLines struct {
	lines chan map[string]any
}

func (l *logLines) Write(p []byte) (int, error) {
	for line := range bytes.Lines(p) {
		var parsed map[string]any
		if err := json.Unmarshal(line, &parsed); err != nil {
			return 0, fmt.Errorf("log line %q is not JSON: %w", line, err)
		}
		select {
		case l.lines <- parsed:
		default:
		}
	}
	return len(p), nil
}

// await waits until there has been a line with each of the messages, in
// whatever order.
func (l *logLines) await(t *testing.T, messages ...string) {
	t.Helper()
	missing := make(map[any]bool)
	for _, m := range messages {
		missing[m] = true
	}
	timeout := time.After(20 * time.Second)
	for len(missing) > 0 {
		select {
		case line := <-l.lines:
			delete(missing, line["msg"])
		case <-timeout:
			t.Fatalf("these never came in the log: %v", missing)
		}
	}
}

func TestServeUntilSIGTERM(t *testing.T) {
	state, config := initState(t)
	ops, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	opsAddr := ops.Addr().String()
	ops.Close()

	log := &logLines{make(chan map[string]any, 100)}
	var stdout bytes.Buffer
	ctx, stop := newContext(t)
	done := make(chan int, 1)
	go func() {
		done <- cli.Execute(ctx, newRoot(), []string{
			"serve", "--config", config, "--state-dir", state, "--listen", "127.0.0.1:0", "--ops-listen", opsAddr,
		}, &stdout, log)
	}()
	// Each of the two may be the last thing that readiness waits for.
	log.await(t, "new serving certificate", "the issuer's keys were read")

	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		resp, err := client.Get("http://" + opsAddr + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	if code, body := get("/readyz"); code != 200 {
		t.Errorf("/readyz: %d %q", code, body)
	}
	if _, body := get("/metrics"); !strings.Contains(body, "meshca_ca_ready 1") {
		t.Error("/metrics does not say that the CA is ready")
	}
	if code, _ := get("/debug/pprof/"); code != 404 {
		t.Errorf("/debug/pprof/ answers %d without --pprof", code)
	}
	stop()
	if code := <-done; code != 0 {
		t.Errorf("serve ended with %d", code)
	}
	if !strings.Contains(stdout.String(), `"kind":"intermediate"`) {
		t.Errorf("no audit record of the intermediate on standard output:\n%s", stdout.String())
	}
}

// operatorsCA is a directory with the files of a CA, which is that of a state directory.
func operatorsCA(t *testing.T, state string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for from, to := range map[string][]string{"root.pem": {"tls.crt", "ca.crt"}, "root.key": {"tls.key"}} {
		data, err := os.ReadFile(filepath.Join(state, "authority", from))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range to {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// serveOnce runs the program until it can sign, or until it has refused to start.
func serveOnce(t *testing.T, config, state string) (code int, said string) {
	t.Helper()
	log := &logLines{make(chan map[string]any, 100)}
	var stdout, stderr bytes.Buffer
	ctx, stop := newContext(t)
	done := make(chan int, 1)
	go func() {
		done <- cli.Execute(ctx, newRoot(), []string{
			"serve", "--config", config, "--state-dir", state, "--listen", "127.0.0.1:0", "--ops-listen", "",
		}, &stdout, io.MultiWriter(&stderr, log))
	}()
	for {
		select {
		case line := <-log.lines:
			if line["msg"] == "new serving certificate" {
				stop()
			}
		case code := <-done:
			return code, stderr.String()
		case <-time.After(20 * time.Second):
			t.Fatal("it neither signs nor ends")
		}
	}
}

// The root of an operator's files in place of our own: no meshca init, and the state
// directory remembers what the mesh was told.
func TestT12_ServeWithAnOperatorsCA(t *testing.T) {
	own, config := initState(t)
	settings, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	settings = fmt.Appendf(settings, "\nupstream: {files: {dir: %q}}\n", operatorsCA(t, own))
	config = filepath.Join(t.TempDir(), "meshca.yaml")
	if err := os.WriteFile(config, settings, 0o600); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(t.TempDir(), "state")
	var before []byte
	for n := range 2 {
		if code, said := serveOnce(t, config, state); code != 0 {
			t.Fatalf("it ended with %d:\n%s", code, said)
		}
		record, err := os.ReadFile(filepath.Join(state, roots.FileName))
		if err != nil {
			t.Fatal(err)
		}
		sequence, _, _ := bytes.Cut(record, []byte(`"roots"`))
		if n > 0 && !bytes.Equal(sequence, before) {
			t.Errorf("after a restart the record is\n%s\nbefore\n%s", sequence, before)
		}
		before = sequence
	}
	// Where there is a root of our own the mesh is not led away from it.
	code, said := serveOnce(t, config, own)
	if code == 0 || !strings.Contains(said, "moving a mesh from one to the other is not built yet") {
		t.Errorf("with a root of its own beside: %d, %s", code, said)
	}
	// Nor is one made in secret where the setting was left out.
	_, plain := initState(t)
	code, said = serveOnce(t, plain, state)
	if code == 0 || !strings.Contains(said, "meshca init") {
		t.Errorf("without the setting: %d, %s", code, said)
	}
}

func newContext(t *testing.T) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	return ctx, cancel
}

func TestV27_OperationsAreOnLoopback(t *testing.T) {
	c, _, err := newRoot().Find([]string{"serve"})
	if err != nil {
		t.Fatal(err)
	}
	host, _, err := net.SplitHostPort(c.Flags().Lookup("ops-listen").DefValue)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		t.Errorf("by default operations are served on %q", host)
	}
}
