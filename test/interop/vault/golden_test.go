package vault

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/vault"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/test/kubetest"
)

// A CA whose intermediate a real Vault signs issues certificates that verify against
// the pinned root, and revokes its token when it ends.
func TestV42_AppRole(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	u, stop := start(t, w.config())
	k := catest.New(t, catest.WithUpstream(func(ca.Upstream) ca.Upstream { return u }))
	svid := k.SVID(t, "shop", "cart", 0)
	if id, err := identity.Verify(svid.Certificates(), identity.Client, k.Authority.Bundles(), time.Now()); err != nil || id.String() != "spiffe://cluster.local/ns/shop/sa/cart" {
		t.Fatalf("ID %v, error %v", id, err)
	}
	if r := u.Report(); r.State != "ok" || r.Kind != "vault" || r.Next != "renew the token" || r.NextAt.IsZero() {
		t.Errorf("report %+v", r)
	}
	signed := w.signs(t, u)
	if n := len(signed.Chain); n != 1 || len(signed.Roots) != 1 || signed.Sequence != 0 || signed.Key != nil {
		t.Errorf("%d certificates and %d roots: %+v", n, len(signed.Roots), signed)
	}
	c := signed.Chain[0]
	if left := time.Until(c.NotAfter); left > lifetime || left < lifetime-time.Minute {
		t.Errorf("good for %v", left)
	}
	accessors := func() int {
		all, err := w.Call(t.Context(), "LIST", "auth/token/accessors", nil)
		must(t, err)
		keys, _ := all["keys"].([]any)
		return len(keys)
	}
	before := accessors()
	stop()
	if after := accessors(); after != before-1 {
		t.Errorf("%d tokens before the end and %d after", before, after)
	}
}

// Vault reviews our ServiceAccount's token, which has an audience of Vault's own, at
// the real API server.
func TestV42_KubernetesAuth(t *testing.T) {
	t.Parallel()
	w, c := setUp(t), cluster.Get(t)
	ctx := t.Context()
	must(t, c.CreateNamespace(ctx, "meshca-system"))
	must(t, c.CreateNamespace(ctx, "vault"))
	for _, sa := range [][2]string{{"meshca-system", "meshca"}, {"meshca-system", "other"}, {"vault", "reviewer"}} {
		_, err := c.CreateServiceAccount(ctx, sa[0], sa[1])
		must(t, err)
	}
	_, err := c.Create(ctx, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", map[string]any{
		"metadata": map[string]any{"name": "vault-reviewer"},
		"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
		"subjects": []any{map[string]any{"kind": "ServiceAccount", "namespace": "vault", "name": "reviewer"}},
	})
	must(t, err)
	dir := t.TempDir()
	token := func(namespace, name, audience string) string {
		var audiences []string
		if audience != "" {
			audiences = []string{audience}
		}
		raw, err := c.Token(ctx, namespace, name, kubetest.TokenRequest{Audiences: audiences, Seconds: 600})
		must(t, err)
		return raw
	}
	reviewer, own := filepath.Join(dir, "reviewer"), filepath.Join(dir, "own")
	write(t, reviewer, token("vault", "reviewer", ""))
	w.script(t, []string{"KUBERNETES_HOST=" + c.URL(), "KUBERNETES_CA_FILE=" + c.CAFile(), "REVIEWER_TOKEN_FILE=" + reviewer}, "kubernetes")

	config := w.config()
	config.Auth = vault.Kubernetes{Mount: "kubernetes", Role: "meshca", TokenFile: own}
	for name, bad := range map[string]string{
		"another audience":       token("meshca-system", "meshca", "meshca"),
		"another ServiceAccount": token("meshca-system", "other", "vault"),
		"no token":               "eyJhbGciOiJub25lIn0.e30.",
	} {
		write(t, own, bad)
		u, stop := start(t, config)
		r := state(t, u, 10*time.Second, vault.Forbidden)
		holds(t, r.Detail, "auth/kubernetes/login", `role "meshca"`, "audience")
		if strings.Contains(r.Detail+w.log.String(), bad) {
			t.Errorf("%s: the token is in what is printed", name)
		}
		stop()
	}
	write(t, own, token("meshca-system", "meshca", "vault"))
	u, _ := start(t, config)
	state(t, u, 10*time.Second, vault.OK)
	w.signs(t, u)
}

// A token that something else puts into a file is used, not revoked, and replaced.
func TestV42_TokenFile(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	file := filepath.Join(t.TempDir(), "token")
	make := func() string {
		answer, err := w.Call(t.Context(), http.MethodPut, "auth/token/create", map[string]any{"policies": []string{"meshca"}, "no_default_policy": true, "ttl": "1h"})
		must(t, err)
		token, _ := answer["client_token"].(string)
		write(t, file, token)
		return token
	}
	first := make()
	config := w.config()
	config.Auth = vault.TokenFile(file)
	u, stop := start(t, config)
	state(t, u, 10*time.Second, vault.OK)
	w.signs(t, u)
	_, err := w.Call(t.Context(), http.MethodPut, "auth/token/revoke", map[string]any{"token": first})
	must(t, err)
	if _, err := u.SignIntermediate(t.Context(), w.request(t)); err == nil {
		t.Fatal("signed with a revoked token")
	}
	holds(t, state(t, u, time.Second, vault.Expired).Detail, file, "put a new one there")
	second := make()
	state(t, u, 10*time.Second, vault.OK)
	w.signs(t, u)
	stop()
	if _, err := w.CallAs(t.Context(), second, http.MethodGet, "auth/token/lookup-self", nil); err != nil {
		t.Errorf("a token of a file was revoked: %v", err)
	}
}

// A wrapped SecretID is unwrapped once; one that somebody else has unwrapped, or that
// is none, is an alarm.
func TestV42_WrappedSecretID(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	wrap := func(path string) string {
		out, err := w.Run(t.Context(), nil, "vault", "write", "-wrap-ttl=5m", "-field=wrapping_token", "-f", path)
		must(t, err)
		return strings.TrimSpace(string(out))
	}
	auth := w.appRole()
	auth.Wrapped = true
	config := w.config()
	config.Auth = auth
	const path = "auth/approle/role/meshca/secret-id"

	write(t, w.secret, wrap(path))
	u, stop := start(t, config)
	r := state(t, u, 10*time.Second, vault.OK)
	if notes := strings.Join(r.Notes, "; "); !strings.Contains(notes, "a restart needs a new one") || !strings.Contains(notes, "the SecretID ends at") {
		t.Errorf("notes %q", notes)
	}
	w.signs(t, u)
	stop()

	for name, bad := range map[string]func() string{
		"used": func() string { return "" }, // the one that is there
		"of a token": func() string {
			return wrap("auth/token/create")
		},
	} {
		if token := bad(); token != "" {
			write(t, w.secret, token)
		}
		u, stop := start(t, config)
		r := state(t, u, 10*time.Second, vault.Expired)
		holds(t, r.Detail, "unwrapping the SecretID", "somebody else has", w.secret)
		holds(t, w.log.String(), "somebody else may have it")
		stop()
		_ = name
	}
}
