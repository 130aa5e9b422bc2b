package vault

import (
	"net/http"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/vault"
)

// tokens are the accessors of all tokens but root's own.
func tokens(t *testing.T, w *world) (accessors []string) {
	t.Helper()
	all, err := w.Call(t.Context(), "LIST", "auth/token/accessors", nil)
	must(t, err)
	keys, _ := all["keys"].([]any)
	for _, key := range keys {
		a, _ := key.(string)
		about, err := w.Call(t.Context(), http.MethodPut, "auth/token/lookup-accessor", map[string]any{"accessor": a})
		must(t, err)
		if about["path"] == "auth/approle/login" {
			accessors = append(accessors, a)
		}
	}
	return accessors
}

// A token that is revoked costs one new login, and the next signature succeeds.
func TestF46_TokenRevoked(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	u, _ := start(t, counting(w))
	state(t, u, 10*time.Second, vault.OK)
	w.signs(t, u)
	if n := logins(t, w, ""); n != 1 {
		t.Fatalf("%v logins", n)
	}
	for i := range 3 { // not only for the first time
		held := tokens(t, w)
		if len(held) != 1 {
			t.Fatalf("tokens %q", held)
		}
		_, err := w.Call(t.Context(), http.MethodPut, "auth/token/revoke-accessor", map[string]any{"accessor": held[0]})
		must(t, err)
		w.signs(t, u)
		if n, ok := logins(t, w, ""), logins(t, w, "ok"); n != float64(i+2) || ok != n {
			t.Errorf("%v logins and %v good ones after %d revocations", n, ok, i+1)
		}
		if r := u.Report(); r.State != string(vault.OK) || r.Detail != "" {
			t.Errorf("report %+v", r)
		}
		w.signs(t, u)
	}
	if n := logins(t, w, ""); n != 4 {
		t.Errorf("%v logins", n)
	}
}

// A policy that is taken away is told as that, without a storm of logins, and nobody
// has to do anything once it is back.
func TestF47_PolicyTakenAway(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	u, _ := start(t, counting(w))
	state(t, u, 10*time.Second, vault.OK)
	w.signs(t, u)
	_, err := w.Call(t.Context(), http.MethodPut, "sys/policies/acl/meshca", map[string]any{"policy": "# nothing\n"})
	must(t, err)
	before := logins(t, w, "")
	const want = "pki/issuer/meshca/sign-intermediate"
	for i, end := 0, time.Now().Add(20*time.Second); time.Now().Before(end); i++ {
		// An authority asks at most every half second or so; this asks without end.
		e := fails(t, w, u, 15*time.Second, vault.Forbidden)
		if i == 0 {
			holds(t, e.Error(), want, "403", "docs/vault.md")
		}
		r := u.Report()
		if r.State != string(vault.Forbidden) || !r.Away {
			t.Fatalf("report %+v", r)
		}
		holds(t, r.Detail, want, "the policy of the CA in Vault must allow it")
		if t.Failed() {
			t.FailNow()
		}
	}
	if n := logins(t, w, "") - before; n > 3 {
		t.Errorf("%v logins in 20 s", n)
	} else {
		t.Logf("%v logins in 20 s", n)
	}
	w.script(t, nil, "policy")
	within(t, 10*time.Second, "signing again", func() error {
		_, err := u.SignIntermediate(t.Context(), w.request(t))
		return err
	})
	if r := u.Report(); r.State != string(vault.OK) {
		t.Errorf("report %+v", r)
	}
}
