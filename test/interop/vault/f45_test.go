package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/vault"
	"github.com/meshca/meshca/test/vaulttest"
)

// nodes are two servers of one Vault, the first of them active.
func nodes(t *testing.T) (w *world, a, b *vaulttest.Server) {
	t.Helper()
	ctx := t.Context()
	a = vaulttest.Start(t, "a")
	must(t, a.Init(ctx))
	must(t, a.Unseal(ctx))
	w = setUpOn(t, a)
	b = vaulttest.Start(t, "b")
	must(t, b.Join(ctx, a))
	must(t, b.SendUnseal(ctx))
	within(t, 60*time.Second, "a standby", func() error { return is(ctx, b, true) })
	within(t, 60*time.Second, "two voters", func() error {
		answer, err := a.Call(ctx, http.MethodGet, "sys/storage/raft/configuration", nil)
		if err != nil {
			return err
		}
		config, _ := answer["config"].(map[string]any)
		servers, _ := config["servers"].([]any)
		for _, s := range servers {
			if server, _ := s.(map[string]any); server["voter"] != true {
				return fmt.Errorf("servers %v", servers)
			}
		}
		if len(servers) != 2 {
			return fmt.Errorf("servers %v", servers)
		}
		return nil
	})
	return w, a, b
}

// is wants a server to be standby, or active.
func is(ctx context.Context, s *vaulttest.Server, standby bool) error {
	h, err := s.Call(ctx, http.MethodGet, "sys/health?standbycode=200&perfstandbycode=200", nil)
	if err == nil && (h["sealed"] != false || h["standby"] != standby) {
		err = fmt.Errorf("health %v", h)
	}
	return err
}

// bothCAs is a file with the authorities of both servers' certificates.
func bothCAs(t *testing.T, servers ...*vaulttest.Server) string {
	t.Helper()
	var all []byte
	for _, s := range servers {
		one, err := os.ReadFile(s.CAFile())
		must(t, err)
		all = append(all, one...)
	}
	file := filepath.Join(t.TempDir(), "vault-ca.pem")
	write(t, file, string(all))
	return file
}

// serials counts what the mount has signed.
func serials(t *testing.T, s *vaulttest.Server) int {
	t.Helper()
	answer, err := s.Call(t.Context(), "LIST", "pki/certs", nil)
	must(t, err)
	keys, _ := answer["keys"].([]any)
	return len(keys)
}

// When another server becomes active, signing goes on there, each call has one
// certificate at most, and a login more is not needed: the token is the cluster's.
func TestF45_LeaderChanges(t *testing.T) {
	t.Parallel()
	w, a, b := nodes(t)
	cas := bothCAs(t, a, b)
	config := counting(w)
	config.Addresses, config.CAFile = []string{a.URL(), b.URL()}, cas
	u, _ := start(t, config)
	state(t, u, 10*time.Second, vault.OK)
	w.signs(t, u)
	before := logins(t, w, "")

	active, next := a, b
	for range 2 { // there and back
		had := serials(t, active)
		_, err := active.Call(t.Context(), http.MethodPut, "sys/step-down", nil)
		must(t, err)
		down := time.Now()
		calls, good := 0, 0
		within(t, 15*time.Second, "signing on the other", func() error {
			calls++
			_, err := u.SignIntermediate(t.Context(), w.request(t))
			if err == nil {
				good++
			} else if e := new(vault.Error); !errors.As(err, &e) || e.State == vault.Forbidden || e.State == vault.Expired {
				t.Fatalf("a change of leaders is told as %v", err)
			}
			return err
		})
		t.Logf("signed after %v and %d calls", time.Since(down), calls)
		within(t, 15*time.Second, "the other to be active", func() error { return is(t.Context(), next, false) })
		if n := serials(t, next) - had; n != good {
			t.Errorf("%d certificates for %d calls, of which %d returned one", n, calls, good)
		}
		state(t, u, 10*time.Second, vault.OK)
		active, next = next, active
		within(t, 30*time.Second, "the old one to stand by", func() error { return is(t.Context(), next, true) })
	}
	if n := logins(t, w, ""); n != before {
		t.Errorf("%v logins, and %v before", n, before)
	}
}

// Without its active server, and with no other that can become active, a Vault is
// away; with it back, it is used.
func TestF45_LeaderKilled(t *testing.T) {
	t.Parallel()
	w, a, b := nodes(t)
	config := w.config()
	config.Addresses, config.CAFile = []string{a.URL(), b.URL()}, bothCAs(t, a, b)
	u, _ := start(t, config)
	state(t, u, 10*time.Second, vault.OK)
	had := serials(t, a)
	w.signs(t, u)
	must(t, a.Kill())
	fails(t, w, u, 35*time.Second, vault.Standby, vault.Unreachable, vault.Slow)
	if r := u.Report(); !r.Away || r.Detail == "" {
		t.Errorf("report %+v", r)
	}
	must(t, a.Restart(t.Context()))
	must(t, a.SendUnseal(t.Context()))
	var active *vaulttest.Server
	within(t, 60*time.Second, "an active server", func() error {
		for _, s := range []*vaulttest.Server{a, b} {
			if is(t.Context(), s, false) == nil {
				active = s
				return nil
			}
		}
		return errors.New("none")
	})
	state(t, u, 15*time.Second, vault.OK)
	w.signs(t, u)
	if n := serials(t, active) - had; n != 2 {
		t.Errorf("%d certificates for 2 signatures", n)
	}
}
