package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/server"
	"github.com/meshca/meshca/ca/server/servertest"
	"github.com/meshca/meshca/cmd/internal/cli"
)

// output is what a program says, while it says it.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func serveCA(t *testing.T, kit *catest.Kit) (address string) {
	t.Helper()
	return servertest.Serve(t, server.Config{
		Authority: kit.Authority, Authenticator: kit.Authenticator, Names: ca.ServingNames{IPs: []net.IP{net.IPv4(127, 0, 0, 1)}},
	})
}

// within waits until f returns what is wanted.
func within(t *testing.T, what string, f func() bool) {
	t.Helper()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	deadline := time.After(20 * time.Second)
	for !f() {
		select {
		case <-ticker.C:
		case <-deadline:
			t.Fatalf("after 20 s: not %s", what)
		}
	}
}

// The program as a node runs it: it says what it waits for, is ready once the
// kubelet and the CA have answered, and ends well.
func TestT18_NodeSaysWhatItWaitsFor(t *testing.T) {
	kit := catest.New(t)
	dir := t.TempDir()
	kubelet, token := filepath.Join(dir, "kubelet"), filepath.Join(dir, "token")
	for _, d := range []string{"pods", "plugins", "plugins_registry"} {
		if err := os.MkdirAll(filepath.Join(kubelet, d), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{
		"node", "--ca", serveCA(t, kit), "--trust-anchor", kit.Anchor, "--token-file", token, "--kubelet-dir", kubelet,
		"--node-state-dir", filepath.Join(dir, "state"), "--allow-state-on-disk", "--ops-listen", "127.0.0.1:0", "--log-format", "json",
	}
	var log output
	ctx, cancel := context.WithCancel(t.Context())
	exit := make(chan int, 1)
	go func() { exit <- cli.Execute(ctx, newRoot(), args, io.Discard, &log) }()

	ops := regexp.MustCompile(`"ops":"([^"]+)"`)
	within(t, "serving", func() bool { return ops.MatchString(log.String()) })
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (code int, body string) {
		resp, err := client.Get("http://" + ops.FindStringSubmatch(log.String())[1] + path)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(text)
	}
	within(t, "naming the token", func() bool {
		code, body := get("/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(body, "the kubelet has not registered csi.meshca.dev yet") &&
			strings.Contains(body, "nothing has been heard from a CA yet: token file")
	})
	if err := os.WriteFile(token, []byte(kit.Token(t, "meshca-agents", "meshca-agent")), 0o600); err != nil {
		t.Fatal(err)
	}
	within(t, "content with the CA", func() bool { _, body := get("/readyz"); return !strings.Contains(body, "CA") })

	reg := filepath.Join(kubelet, "plugins_registry", "csi.meshca.dev-reg.sock")
	within(t, "there for the kubelet", func() bool { _, err := os.Lstat(reg); return err == nil })
	notifyRegistered(t, reg)
	within(t, "ready", func() bool { code, _ := get("/readyz"); return code == http.StatusOK })
	if _, body := get("/metrics"); !strings.Contains(body, "meshca_csi_registered 1") || !strings.Contains(body, "meshca_agent_ca_connected 1") {
		t.Errorf("the metrics:\n%s", body)
	}
	cancel()
	if code := <-exit; code != cli.ExitOK {
		t.Errorf("exit %d\n%s", code, log.String())
	}
	if _, err := os.Lstat(reg); err == nil {
		t.Error("the registration is left, which the kubelet would try again and again")
	}
}

// notifyRegistered says what a kubelet says that took the plugin.
func notifyRegistered(t *testing.T, path string) {
	t.Helper()
	folder, err := os.Open(filepath.Dir(path)) // its own path may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = folder.Close() }()
	conn, err := grpc.NewClient("passthrough:///kubelet", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join("/proc/self/fd", strconv.Itoa(int(folder.Fd())), filepath.Base(path)))
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, err = registration.NewRegistrationClient(conn).NotifyRegistrationStatus(t.Context(), &registration.RegistrationStatus{PluginRegistered: true})
	if err != nil {
		t.Fatal(err)
	}
}

// What the supervisor starts is what it was asked for, and no supervisor.
func TestSupervisedCommandLine(t *testing.T) {
	c := newNode()
	if err := c.ParseFlags([]string{"--supervise", "--ca", "a:1,b:2", "--ca=c:3", "--trust-anchor", "/a b", "--log-level=debug", "--pprof", "--restarts=7"}); err != nil {
		t.Fatal(err)
	}
	got := childArgs(c)
	again := newNode()
	if err := again.ParseFlags(got[1:]); err != nil {
		t.Fatal(err)
	}
	if got[0] != "node" || slices.Contains(got, "--supervise=true") {
		t.Errorf("the child is started by %q", got)
	}
	for name, want := range map[string]string{"ca": "[a:1,b:2,c:3]", "trust-anchor": "/a b", "log-level": "debug", "pprof": "true", "supervise": "false", "restarts": "0"} {
		if f := again.Flags().Lookup(name); f.Value.String() != want {
			t.Errorf("--%s is %q for the child, want %q", name, f.Value, want)
		}
	}
}
