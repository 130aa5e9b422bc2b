package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/roots"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// uncounted is the kit's own root as an upstream that counts no versions, and that
// can show another root beside.
type uncounted struct {
	ca.Upstream
	beside []*x509.Certificate
	anchor *x509.Certificate
}

func (u *uncounted) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	s, err := u.Upstream.SignIntermediate(ctx, req)
	if err != nil {
		return nil, err
	}
	u.anchor = s.Roots[0]
	s.Sequence, s.Roots = 0, append(slices.Clone(s.Roots), u.beside...)
	return s, nil
}

func keeper(t *testing.T, store roots.Store) *roots.Keeper {
	t.Helper()
	k, err := roots.New(roots.Config{TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Store: store, Ceiling: 10 * time.Minute, Now: time.Now})
	check(t, err)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); check(t, k.Run(ctx)) }()
	t.Cleanup(func() { stop(); <-ended })
	return k
}

// Another replica's operator has added a root: it is in the bundle within seconds,
// and the upstream, which is away, is not asked for it.
func TestT12_BundleIsTakenOverWhileTheUpstreamIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := roots.File{Path: filepath.Join(t.TempDir(), roots.FileName)}
		here, there := keeper(t, store), keeper(t, store)
		up := &uncounted{}
		var gone tap
		k := catest.New(t, append(short(), catest.WithRoots(here), catest.WithUpstream(func(real ca.Upstream) ca.Upstream {
			up.Upstream = real
			gone.Upstream = up
			return &gone
		}))...)
		before, changed := k.Authority.Bundle()
		first := k.Authority.Status()
		gone.down.Store(true)
		other, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: k.TrustDomain, Now: time.Now})
		check(t, err)
		_, err = there.Agree(t.Context(), up.anchor, []*x509.Certificate{up.anchor, other})
		check(t, err)
		<-changed
		after, _ := k.Authority.Bundle()
		if after.Sequence() <= before.Sequence() || len(after.Authorities()) != 2 {
			t.Errorf("bundle %d of %d roots after %d", after.Sequence(), len(after.Authorities()), before.Sequence())
		}
		if s := k.Authority.Status(); s.Authority != first.Authority || s.RenewAt != first.RenewAt || gone.calls.Load() != 1 {
			t.Errorf("the upstream was asked %d times: %+v", gone.calls.Load(), s)
		}
		svid := k.SVID(t, "shop", "cart", 0)
		issued, err := k.Authority.Issue(t.Context(), k.Caller(t, "shop", "cart"), catest.NewKey(t).Public(), 0)
		check(t, err)
		if issued.Bundle != after {
			t.Error("a certificate comes with the older bundle")
		}
		if _, err := identity.Verify(svid.Certificates(), identity.Client, k.Authority.Bundles(), time.Now()); err != nil {
			t.Error(err)
		}
	})
}

// A root that the keeper will not have is an upstream's trouble: what is in force
// stays.
func TestT12_RootsMustBeAgreedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := roots.File{Path: filepath.Join(t.TempDir(), roots.FileName)}
		other, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Now: time.Now})
		check(t, err)
		_, err = keeper(t, store).Agree(t.Context(), other, []*x509.Certificate{other})
		check(t, err)
		k := catest.New(t, append(short(), catest.WithRoots(keeper(t, store)), catest.WithoutWaiting(),
			catest.WithUpstream(func(real ca.Upstream) ca.Upstream {
				return &uncounted{Upstream: real, beside: []*x509.Certificate{other}}
			}))...)
		synctest.Wait()
		if s := k.Authority.Status(); !errors.As(s.UpstreamErr, new(*roots.UntrustedError)) || k.Authority.Ready() == nil {
			t.Errorf("ready: %v; %+v", k.Authority.Ready(), s)
		}
	})
}

// Without a keeper nobody would count.
func TestT12_UncountedRootsNeedAKeeper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHostile(t)
		h.after = func(s *ca.Signed) { s.Sequence = 0 }
		if err := answer(t, h); err == nil || !strings.Contains(err.Error(), "counts no versions") {
			t.Errorf("it signs under roots without a version: %v", err)
		}
	})
}
