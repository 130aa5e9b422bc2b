package files

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/roots"
	"github.com/meshca/meshca/identity"
)

const (
	ceiling = 10 * time.Minute // of leaves
	// alive is how long a root is needed after the last signature under it, with the
	// keeper's margin and the time between its looks.
	alive = ceiling + 11*time.Minute
)

// mesh runs an authority on the files in dir.
func mesh(t testing.TB, dir string) (*catest.Kit, *Upstream) {
	t.Helper()
	keeper, err := roots.New(roots.Config{
		TrustDomain: domain(t), Store: roots.File{Path: filepath.Join(t.TempDir(), roots.FileName)}, Ceiling: ceiling, Now: time.Now,
	})
	check(t, err)
	u := open(t, dir, func(c *Config) { c.Judge = keeper.Judge })
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 2)
	go func() { ended <- keeper.Run(ctx) }()
	go func() { ended <- u.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		check(t, <-ended)
		check(t, <-ended)
	})
	return catest.New(t, catest.WithUpstream(func(ca.Upstream) ca.Upstream { return u }), catest.WithRoots(keeper),
		catest.WithLeaf(ca.LeafConfig{Lifetime: ceiling, Ceiling: ceiling}), catest.WithIntermediateLifetime(2*time.Hour)), u
}

// A root is replaced as docs/upstreams.md says, and too early at each step: whatever is
// issued on the way is believed by all at any time.
func TestT12_RootIsReplacedWithoutAnOutage(t *testing.T) {
	for name, changes := range map[string][]func(*x509.Certificate){"signs intermediates": nil, "signs leaves": {pathLen0}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				oldRoot, newRoot := newRoot(t, "Old Root"), newRoot(t, "New Root")
				old, young := oldRoot.below(t, "Old", changes...), newRoot.below(t, "New", changes...)
				dir := t.TempDir()
				old.cacerts(t, nil, oldRoot.cert).put(t, dir)
				k, u := mesh(t, dir)
				var issued []*identity.SVID
				step := func(what string, wait time.Duration, wantState, wantIssuer string, wantRoots ...string) {
					t.Helper()
					<-time.After(wait)
					next()
					issued = append(issued, k.SVID(t, "shop", "cart", 0))
					bundle, _ := k.Authority.Bundle()
					for _, svid := range issued {
						if !time.Now().Before(svid.Leaf().NotAfter) {
							continue
						}
						for _, role := range []identity.Role{identity.Client, identity.Server} {
							if _, err := identity.Verify(svid.Certificates(), role, bundle, time.Now()); err != nil {
								t.Errorf("%s: one of %s is not believed: %v", what, svid.Certificates()[1].Subject, err)
							}
						}
					}
					chain := issued[len(issued)-1].Certificates()
					if got := chain[len(chain)-1].Subject.CommonName; got != wantIssuer {
						t.Errorf("%s: issued by %s", what, got)
					}
					if got := subjects(bundle.Authorities()); strings.Join(got, ",") != strings.Join(wantRoots, ",") {
						t.Errorf("%s: the bundle is %v", what, got)
					}
					s := k.Authority.Status()
					if s.UpstreamErr != nil || s.Upstream.State != wantState {
						t.Errorf("%s: %v, %+v", what, s.UpstreamErr, s.Upstream)
					}
					if wantState == StateRefused && !strings.Contains(u.Report().Detail, "root-cert.pem") {
						t.Errorf("%s: %s", what, u.Report().Detail)
					}
				}
				step("before", 0, StateOK, "Old", "Old Root")
				young.cacerts(t, nil, newRoot.cert, oldRoot.cert).put(t, dir)
				step("all at once", 0, StateRefused, "Old", "Old Root")
				old.cacerts(t, nil, oldRoot.cert, newRoot.cert).put(t, dir)
				step("new root beside the old", 0, StateOK, "Old", "Old Root", "New Root")
				young.cacerts(t, nil, oldRoot.cert, newRoot.cert).put(t, dir)
				step("new CA too early", 0, StateRefused, "Old", "Old Root", "New Root")
				step("new CA", roots.DefaultSettle, StateOK, "New", "Old Root", "New Root")
				young.cacerts(t, nil, newRoot.cert).put(t, dir)
				step("old root left out too early", 0, StateRefused, "New", "Old Root", "New Root")
				step("old root left out", alive, StateOK, "New", "New Root")
			})
		})
	}
}

// What a certificate costs by what signs it: Istio's recipe has RSA keys of 4096 bits,
// with which each leaf is signed where the path length is 0.
func BenchmarkLeaf(b *testing.B) {
	key, err := rsa.GenerateKey(rand.Reader, 4096)
	check(b, err)
	root := newRoot(b, "Root")
	given := func(changes ...func(*x509.Certificate)) *authority {
		c := template("CA")
		for _, change := range changes {
			change(c)
		}
		return &authority{cert: signed(b, c, root, key.Public()), key: key}
	}
	for name, a := range map[string]*authority{
		"RSA-4096 signs leaves": given(pathLen0), "RSA-4096 signs intermediates of P-256": given(), "P-256 signs leaves": root.below(b, "CA", pathLen0),
	} {
		b.Run(name, func(b *testing.B) {
			dir := b.TempDir()
			a.cacerts(b, nil, root.cert).put(b, dir)
			k, _ := mesh(b, dir)
			who, pub := k.Caller(b, "shop", "cart"), newKey(b).Public()
			for b.Loop() {
				if _, err := k.Authority.Issue(b.Context(), who, pub, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
