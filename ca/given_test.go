package ca_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
)

// given is an upstream whose CA may have none below it, as Istio's recipe makes
// them: it answers with that CA's own certificate and key.
type given struct {
	*hostile
	mu  sync.Mutex
	key crypto.Signer
	ca  *x509.Certificate
}

func (g *given) SignIntermediate(context.Context, ca.IntermediateRequest) (*ca.Signed, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return &ca.Signed{Chain: []*x509.Certificate{g.ca}, Roots: []*x509.Certificate{g.root}, Sequence: 5, Key: g.key}, nil
}

// give makes another CA, changed by what is wrong with it.
func (g *given) give(key crypto.Signer, change func(*x509.Certificate)) {
	serial, err := ca.NewSerial()
	check(g.t, err)
	now := time.Now().Truncate(time.Second)
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"Istio"}, CommonName: "Intermediate CA", Locality: []string{"cluster1"}},
		DNSNames:     []string{"istiod.istio-system.svc"},
		NotBefore:    now.Add(-time.Minute), NotAfter: now.Add(2 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage:     x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment | x509.KeyUsageKeyEncipherment | x509.KeyUsageCertSign,
		SubjectKeyId: serial.Bytes(),
	}
	if change != nil {
		change(template)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.key, g.ca = key, g.sign(template, g.root, key.Public())
}

func newGiven(t *testing.T) *given {
	g := &given{hostile: newHostile(t)}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	check(t, err)
	g.give(key, nil)
	return g
}

// Leaves are signed with the key that was given, over and over with the same
// certificate, until its owner gives another.
func TestGivenAuthoritySignsLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGiven(t)
		up := &changer{channel: make(chan struct{})}
		k := catest.New(t, append(short(), catest.WithUpstream(func(ca.Upstream) ca.Upstream { up.Upstream = g; return up }))...)
		first := k.Authority.Status()
		if first.SignsUntil != g.ca.NotAfter {
			t.Errorf("signs until %v, the CA ends at %v", first.SignsUntil, g.ca.NotAfter)
		}
		svid := k.SVID(t, "shop", "cart", 0)
		if chain := svid.Certificates(); len(chain) != 2 || !chain[1].Equal(g.ca) {
			t.Fatalf("the chain is %v", chain)
		}
		for _, role := range []identity.Role{identity.Client, identity.Server} {
			if _, err := identity.Verify(svid.Certificates(), role, k.Authority.Bundles(), time.Now()); err != nil {
				t.Errorf("as %v: %v", role, err)
			}
		}

		time.Sleep(time.Until(first.RenewAt) + time.Second)
		synctest.Wait()
		s := k.Authority.Status()
		if s.UpstreamErr != nil || s.Authority != first.Authority || up.calls.Load() != 2 || !s.RenewAt.After(time.Now()) {
			t.Errorf("asked again: %+v after %d calls", s, up.calls.Load())
		}

		other := catest.NewKey(t)
		g.give(other, nil)
		up.change()
		synctest.Wait()
		if chain := k.SVID(t, "shop", "cart", 0).Certificates(); !chain[1].Equal(g.ca) {
			t.Error("the new CA is not used")
		}
	})
}

// A CA that was given is as its owner made it, but not whatever it is.
func TestT16_F49_GivenAuthorityIsJudged(t *testing.T) {
	strong := catest.NewKey(t)
	weak, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	check(t, err)
	for _, tt := range []struct {
		name   string
		key    crypto.Signer
		change func(*x509.Certificate)
		after  func(*given)
		field  string // of a MismatchError
	}{
		{name: "another key", key: strong, after: func(g *given) { g.key = catest.NewKey(t) }, field: "public key"},
		{name: "no CA", key: strong, change: func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }, field: "CA bit"},
		{name: "may not sign", key: strong, change: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }, field: "key usage (bits)"},
		{name: "over", key: strong, change: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, field: "end of the intermediate"},
		{name: "name constraints", key: strong, change: func(c *x509.Certificate) { c.PermittedURIDomains = []string{"cluster.local"} }, field: "name constraints of CN=Intermediate CA,O=Istio,L=cluster1"},
		{name: "another root's", key: strong, after: func(g *given) {
			stranger := newHostile(t)
			g.ca = stranger.sign(&x509.Certificate{
				SerialNumber: big.NewInt(5), Subject: pkix.Name{CommonName: "x"}, NotAfter: time.Now().Add(time.Hour),
				IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{5},
			}, stranger.root, g.key.Public())
		}, field: "issuer of the chain"},
		{name: "weak key", key: weak},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGiven(t)
				g.give(tt.key, tt.change)
				if tt.after != nil {
					tt.after(g)
				}
				err := answer(t, g)
				var mismatch *ca.MismatchError
				if tt.field == "" {
					if !errors.As(err, new(*ca.KeyError)) {
						t.Errorf("got %v", err)
					}
				} else if !errors.As(err, &mismatch) || mismatch.Field != tt.field {
					t.Errorf("got %v, want a mismatch of %q", err, tt.field)
				}
			})
		})
	}
}

// A CA that outlives its root: what ends first counts.
func TestT6_GivenAuthorityEndsWithItsRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGiven(t)
		g.give(catest.NewKey(t), func(c *x509.Certificate) { c.NotAfter = g.root.NotAfter.Add(time.Hour) })
		k := catest.New(t, append(short(), catest.WithUpstream(func(ca.Upstream) ca.Upstream { return g }))...)
		if end := k.Authority.Status().SignsUntil; !end.Equal(g.root.NotAfter) {
			t.Errorf("signs until %v, its root ends at %v", end, g.root.NotAfter)
		}
	})
}
