package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/refdoc"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/proxy"
	"github.com/meshca/meshca/sds"
	"github.com/meshca/meshca/sds/client"
)

var update = flag.Bool("update", false, "write docs/reference/proxy.md")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestReferenceIsCurrent(t *testing.T) {
	metrics := refdoc.NewRecorder()
	source, err := client.New(client.Config{Socket: "agent.sock", Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	s := settings{inbound: []proxy.Inbound{{Listen: ":8443", App: "127.0.0.1:8080"}}, modes: &fixedModes{}}
	if _, err := build(s, options{}, source, s.modes, discard(), metrics); err != nil {
		t.Fatal(err)
	}
	page := refdoc.Head + "# proxy\n\n" + refdoc.Commands(newRoot()) + "\n" + metrics.Metrics()
	if err := refdoc.Check("../../docs/reference/proxy.md", page, *update); err != nil {
		t.Error(err)
	}
}

func TestF63_StartIsRefused(t *testing.T) {
	in := []string{"--inbound", ":8443=127.0.0.1:8080"}
	fixed := append(slices.Clip(in), "--mode", "STRICT")
	for _, tt := range []struct {
		name string
		args []string
		want string
	}{
		{"nothing to do", nil, "there is nothing to do"},
		{"no app", []string{"--inbound", ":8443"}, `--inbound ":8443" is not ADDR=APP`},
		{"bad app", []string{"--inbound", ":8443=8080"}, `app "8080" of inbound listener ":8443": it is not host:port`},
		{"no ID", []string{"--outbound", "127.0.0.1:1=10.0.3.7:8443"}, "is not LISTEN=TARGET,SPIFFE-ID"},
		{"bad ID", []string{"--outbound", "127.0.0.1:1=10.0.3.7:8443,https://cart"}, "--outbound"},
		{"outbound for all", []string{"--outbound", ":1=10.0.3.7:8443,spiffe://example.org/ns/shop/sa/cart"}, "not on loopback"},
		{"lower case", append(in, "--mode", "strict"), `--mode: "strict" is none of STRICT, PERMISSIVE and DISABLE`},
		{"UNSET", append(in, "--mode", "UNSET"), "none of STRICT"},
		{"empty mode", append(in, "--mode", ""), "none of STRICT"},
		{"port mode alone", append(in, "--port-mode", "8080=DISABLE"), "--port-mode goes with --mode"},
		{"no port mode", append(fixed, "--port-mode", "8080"), `--port-mode "8080" is not PORT=MODE`},
		{"port 0", append(fixed, "--port-mode", "0=STRICT"), "is not PORT=MODE"},
		{"unknown port mode", append(fixed, "--port-mode", "8080=OFF"), `--port-mode 8080: "OFF" is none of`},
		{"port twice", append(fixed, "--port-mode", "8080=STRICT", "--port-mode", "8080=DISABLE"), "has a mode already"},
		{"no socket", append(in, "--socket", ""), "--socket is empty"},
		{"no time", append(in, "--handshake-time", "0s"), "must be longer than nothing"},
		{"no room", append(in, "--max-connections", "0"), "must be at least 1"},
		{"pprof to nowhere", append(in, "--pprof"), "--pprof is served on --ops-listen, which is empty"},
		{"argument", append(in, "extra"), `unexpected argument "extra"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // what starts by mistake ends at once
			var out, errs bytes.Buffer
			code := cli.Execute(ctx, newRoot(), tt.args, &out, &errs)
			if code != cli.ExitUsage || !strings.Contains(errs.String(), tt.want) {
				t.Errorf("exit %d, %q; want exit %d with %q", code, errs.String(), cli.ExitUsage, tt.want)
			}
		})
	}
}

func TestModesByPort(t *testing.T) {
	m, err := parseModes("STRICT", []string{"9090=DISABLE", "8080=PERMISSIVE"})
	if err != nil {
		t.Fatal(err)
	}
	for port, want := range map[uint16]proxy.Decision{
		9090: {Mode: policy.Disable, Source: "--port-mode"},
		8080: {Mode: policy.Permissive, Source: "--port-mode"},
		80:   {Mode: policy.Strict, Source: "--mode"},
	} {
		if got, err := m.Decide(port); err != nil || got != want {
			t.Errorf("%d: %v, %v, want %v", port, got, err, want)
		}
	}
	if got := m.unused([]proxy.Inbound{{App: "127.0.0.1:8080"}}); len(got) != 1 || got[0] != 9090 {
		t.Errorf("unused: %d", got)
	}
}

// lines is a log whose lines can be waited for.
type lines struct {
	mu   sync.Mutex
	text string
	more chan struct{}
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text += string(p)
	close(l.more)
	l.more = make(chan struct{})
	return len(p), nil
}

// after waits until the log has a line with want, and returns what follows
// mark in it, up to the next quote.
func (l *lines) after(t *testing.T, want, mark string) string {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		l.mu.Lock()
		text, more := l.text, l.more
		l.mu.Unlock()
		for line := range strings.Lines(text) {
			if strings.Contains(line, want) {
				_, rest, _ := strings.Cut(line, mark)
				value, _, _ := strings.Cut(rest, `"`)
				return value
			}
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("no line with %q in:\n%s", want, text)
		}
	}
}

// The program from its command line to the app and back, with the identity from
// an agent's real socket; ready and listening only once that is there.
func TestT10_ProgramFromSocketToApp(t *testing.T) {
	dir, err := os.MkdirTemp("", "meshca")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "agent.sock")
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	go func() {
		if c, err := app.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	}()

	log := &lines{more: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int, 1)
	go func() {
		done <- cli.Execute(ctx, newRoot(), []string{
			"--inbound", "127.0.0.1:0=" + app.Addr().String(), "--socket", socket,
			"--ops-listen", "127.0.0.1:0", "--mode", "STRICT", "--port-mode", "1=DISABLE", "--drain-time", "1ms",
		}, io.Discard, log)
	}()
	ops := log.after(t, `"msg":"starting"`, `"ops":"`)
	log.after(t, `"msg":"not listening yet"`, "")
	log.after(t, "names a port that no --inbound leads to", "")
	if code := ready(t, ops); code != http.StatusServiceUnavailable {
		t.Errorf("/readyz answers %d without a certificate", code)
	}

	ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))
	serveAgent(t, socket, ca)
	address := log.after(t, `"msg":"listening"`, `"address":"`)
	peer, err := identity.ClientTLS(identity.TLSConfig{
		SVIDs:   ca.SVID(t, identitytest.ID(t, "spiffe://example.org/ns/shop/sa/frontend")),
		Bundles: ca.Bundle(), Now: time.Now,
		Authorize: identity.AuthorizeIDs(identitytest.ID(t, "spiffe://example.org/ns/shop/sa/cart")),
	})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := dialTLS(address, peer)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	for ready(t, ops) != http.StatusOK { // the listener is open a moment earlier
		if t.Context().Err() != nil {
			t.Fatal("never ready")
		}
	}
	cancel()
	if code := <-done; code != cli.ExitOK {
		t.Errorf("exit %d", code)
	}
	_ = conn.Close()
	log.after(t, `"end":"drain"`, "")
}

func ready(t *testing.T, ops string) int {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := c.Get("http://" + ops + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Body.Close()
	return r.StatusCode
}

// serveAgent publishes an identity on an agent's real socket, and returns how to
// publish it with a policy.
func serveAgent(t *testing.T, socket string, ca *identitytest.CA) (publish func(*policy.Resolved)) {
	t.Helper()
	feed := sds.NewFeed()
	state := sds.State{SVID: ca.SVID(t, identitytest.ID(t, "spiffe://example.org/ns/shop/sa/cart")), Bundle: ca.Bundle()}
	feed.Publish(state)
	server, err := sds.NewServer(sds.Config{Feed: feed, Log: discard(), Metrics: prometheus.NewRegistry(), Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	l, err := sds.Listen(socket, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("agent: %v", err)
		}
	})
	return func(p *policy.Resolved) {
		state.Policy = p
		feed.Publish(state)
	}
}

// Without --mode the agent's policies decide: nothing is listened on before there
// is one, a change is in force on what is open, and its source is in the log.
func TestT10_F43_ModesComeFromTheAgent(t *testing.T) {
	dir, err := os.MkdirTemp("", "meshca")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "agent.sock")
	publish := serveAgent(t, socket, identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org")))
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	go func() {
		for {
			c, err := app.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	log := &lines{more: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int, 1)
	go func() {
		done <- cli.Execute(ctx, newRoot(), []string{"--inbound", "127.0.0.1:0=" + app.Addr().String(), "--socket", socket}, io.Discard, log)
	}()
	log.after(t, "the agent has none", "")

	shop := policy.Source{Level: policy.LevelNamespace, Policy: policy.Ref{Namespace: "shop", Name: "default"}}
	publish(&policy.Resolved{Version: 1, Result: policy.Decided(policy.Permissive, policy.Source{Level: policy.LevelDefault}, policy.Ref{}, nil)})
	conn, err := net.Dial("tcp", log.after(t, `"msg":"listening"`, `"address":"`))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got := make([]byte, 5)
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Fatalf("plaintext under PERMISSIVE: %q, %v", got, err)
	}
	publish(&policy.Resolved{Version: 2, Result: policy.Decided(policy.Strict, shop, policy.Ref{}, nil)})
	if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(got); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("under STRICT the open connection: %v", err)
	}
	log.after(t, `"policy":"namespace shop/default"`, "")
	cancel()
	if code := <-done; code != cli.ExitOK {
		t.Errorf("exit %d", code)
	}
}

func dialTLS(address string, conf *tls.Config) (net.Conn, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 20 * time.Second}, Config: conf}
	return d.Dial("tcp", address)
}

func TestSPIFFE44_SocketOfTheEnvironment(t *testing.T) {
	for _, tt := range []struct {
		name, env, flag string
		given           bool
		want, refused   string
	}{
		{name: "nothing said", want: "agent.sock"},
		{name: "the variable", env: "unix:///run/meshca/agent.sock", want: "/run/meshca/agent.sock"},
		{name: "without slashes", env: "unix:/run/meshca/agent.sock", want: "/run/meshca/agent.sock"},
		{name: "the flag first", env: "unix:///run/x", flag: "y.sock", given: true, want: "y.sock"},
		{name: "relative", env: "unix:run/x", refused: "absolute path"},
		{name: "an authority", env: "unix://run/x", refused: "absolute path"},
		{name: "a query", env: "unix:///run/x?y", refused: "absolute path"},
		{name: "a path alone", env: "/run/x", refused: "absolute path"},
		{name: "TCP", env: "tcp://127.0.0.1:8000", refused: "Unix socket only"},
		{name: "no URI", env: "unix://%zz", refused: "no URI"},
		{name: "an empty flag", env: "unix:///run/x", given: true, refused: "--socket is empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("SPIFFE_ENDPOINT_SOCKET", tt.env)
			got, err := (&options{socket: tt.flag, socketGiven: tt.given}).agentSocket()
			if got != tt.want || (err != nil) != (tt.refused != "") || err != nil && !strings.Contains(err.Error(), tt.refused) {
				t.Errorf("%q, %v; want %q, %q", got, err, tt.want, tt.refused)
			}
		})
	}
}
