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

	"github.com/meshca/meshca/ca/audit"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/refdoc"
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
	if _, err := build(c, file, serveOptions{stateDir: state, listen: "127.0.0.1:0", policyDir: t.TempDir()}, slog.New(slog.DiscardHandler), metrics, trail); err != nil {
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
