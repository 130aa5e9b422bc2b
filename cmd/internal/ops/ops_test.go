package ops_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/meshca/meshca/cmd/internal/ops"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// get serves one configuration and asks it for each path in turn.
func get(t *testing.T, c ops.Config, paths ...string) (codes []int, bodies []string) {
	t.Helper()
	l, err := ops.Open("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- l.Serve(ctx, c) }()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for _, p := range paths {
		resp, err := client.Get("http://" + l.Address() + p)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		codes, bodies = append(codes, resp.StatusCode), append(bodies, string(body))
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve ended with %v", err)
	}
	return codes, bodies
}

func config(ready error) ops.Config {
	return ops.Config{
		Ready:   func() error { return ready },
		Metrics: prometheus.NewRegistry(),
		Log:     slog.New(slog.DiscardHandler),
	}
}

func TestT18_ReadinessIsNotLiveness(t *testing.T) {
	codes, bodies := get(t, config(errors.New("cannot sign: no intermediate yet")), "/readyz", "/livez")
	if codes[0] != http.StatusServiceUnavailable || !strings.Contains(bodies[0], "no intermediate yet") {
		t.Errorf("/readyz answered %d %q; want 503 with the reason", codes[0], bodies[0])
	}
	if codes[1] != http.StatusOK {
		t.Errorf("/livez answered %d while not ready; want 200", codes[1])
	}
	if codes, _ := get(t, config(nil), "/readyz"); codes[0] != http.StatusOK {
		t.Errorf("/readyz answered %d while ready", codes[0])
	}
}

// Nothing can be changed here, and nothing else is here.
func TestV35_OperationsOnlyRead(t *testing.T) {
	l, err := ops.Open("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- l.Serve(ctx, config(nil)) }()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH"} {
		for _, path := range []string{"/livez", "/readyz", "/metrics", "/quitquitquit", "/shutdown", "/"} {
			req, err := http.NewRequestWithContext(ctx, method, "http://"+l.Address()+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusMethodNotAllowed && resp.StatusCode != http.StatusNotFound {
				t.Errorf("%s %s: %d", method, path, resp.StatusCode)
			}
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestV27_ProfilesOnlyWhenAskedFor(t *testing.T) {
	c := config(nil)
	if codes, _ := get(t, c, "/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/cmdline"); codes[0] != 404 || codes[1] != 404 || codes[2] != 404 {
		t.Errorf("pprof answers without having been asked for: %v", codes)
	}
	c.Profiles = true
	if codes, _ := get(t, c, "/debug/pprof/heap"); codes[0] != 200 {
		t.Errorf("pprof answers %d when asked for", codes[0])
	}
}
