package vault

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/vault"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/test/testenv"
	"github.com/meshca/meshca/test/vaulttest"
)

const lifetime = 72 * time.Hour

// world is a Vault that setup.sh has set up, and what a CA needs to use it.
type world struct {
	*vaulttest.Server
	td      identity.TrustDomain
	roots   string // file
	roleID  string
	secret  string // file of a SecretID
	log     *logBuffer
	metrics *prometheus.Registry
	ahead   ahead
}

// setUp starts a Vault and has our own script set it up with AppRole.
func setUp(t *testing.T) *world {
	t.Helper()
	return setUpOn(t, vaulttest.New(t))
}

func setUpOn(t *testing.T, s *vaulttest.Server) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{
		Server: s, roots: filepath.Join(dir, "root.pem"), secret: filepath.Join(dir, "secret-id"),
		log: &logBuffer{}, metrics: prometheus.NewRegistry(),
	}
	var err error
	w.td, err = identity.ParseTrustDomain("cluster.local")
	must(t, err)
	w.script(t, []string{"ROOT_FILE=" + w.roots}, "pki", "policy", "approle")
	answer, err := w.Call(t.Context(), http.MethodGet, "auth/approle/role/meshca/role-id", nil)
	must(t, err)
	w.roleID, _ = answer["role_id"].(string)
	w.newSecretID(t)
	return w
}

// script runs deploy/vault/setup.sh as it is.
func (w *world) script(t *testing.T, env []string, args ...string) []byte {
	t.Helper()
	out, err := w.Run(t.Context(), env, script(t), args...)
	must(t, err)
	return out
}

func script(t *testing.T) string {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	must(t, err)
	return filepath.Join(root, "deploy", "vault", "setup.sh")
}

// newSecretID delivers a SecretID.
func (w *world) newSecretID(t *testing.T) (accessor string) {
	t.Helper()
	answer, err := w.Call(t.Context(), http.MethodPut, "auth/approle/role/meshca/secret-id", map[string]any{})
	must(t, err)
	write(t, w.secret, fmt.Sprint(answer["secret_id"]))
	return fmt.Sprint(answer["secret_id_accessor"])
}

func (w *world) appRole() vault.AppRole {
	return vault.AppRole{Mount: "approle", RoleID: w.roleID, SecretIDFile: w.secret}
}

// config is that of a CA which logs in by AppRole.
func (w *world) config() vault.Config {
	return vault.Config{
		Addresses: []string{w.URL()}, CAFile: w.CAFile(), Mount: "pki", Issuer: "meshca", RootsFile: w.roots,
		Auth: w.appRole(), Now: w.ahead.now, Log: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// start runs an upstream until the test ends, or until stop.
func start(t *testing.T, c vault.Config) (u *vault.Upstream, stop func()) {
	t.Helper()
	u, err := vault.New(c)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := u.Run(ctx); err != nil {
			t.Errorf("running the upstream: %v", err)
		}
	})
	stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(stop)
	return u, stop
}

// request is what an authority asks for, over a new key.
func (w *world) request(t *testing.T) ca.IntermediateRequest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	name, _, err := ca.AuthorityName(w.td, ca.RoleIntermediate, key.Public())
	must(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: name, URIs: []*url.URL{w.td.ID().SPIFFE().URL()},
	}, key)
	must(t, err)
	csr, err := x509.ParseCertificateRequest(der)
	must(t, err)
	return ca.IntermediateRequest{CSR: csr, TrustDomain: w.td, Lifetime: lifetime}
}

// signs has an intermediate signed.
func (w *world) signs(t *testing.T, u *vault.Upstream) *ca.Signed {
	t.Helper()
	signed, err := u.SignIntermediate(t.Context(), w.request(t))
	must(t, err)
	return signed
}

// state waits until the upstream is in a state.
func state(t *testing.T, u *vault.Upstream, d time.Duration, want vault.State) ca.Report {
	t.Helper()
	var r ca.Report
	within(t, d, "state "+string(want), func() error {
		if r = u.Report(); r.State != string(want) {
			return fmt.Errorf("state %q: %s", r.State, r.Detail)
		}
		return nil
	})
	return r
}

// holds wants all of the texts in one.
func holds(t *testing.T, text string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("%q lacks %q", text, want)
		}
	}
}

func within(t *testing.T, d time.Duration, what string, is func() error) {
	t.Helper()
	deadline := time.NewTimer(d)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := is()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("%s: not within %v; the last: %v", what, d, err)
		case <-tick.C:
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	must(t, os.WriteFile(path+".new", []byte(content), 0o600))
	must(t, os.Rename(path+".new", path))
}

// ahead is a clock that is so far ahead of the wall clock.
type ahead struct{ d atomic.Int64 }

func (a *ahead) add(d time.Duration) { a.d.Add(int64(d)) }
func (a *ahead) now() time.Time      { return time.Now().Add(time.Duration(a.d.Load())) }

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
