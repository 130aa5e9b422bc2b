package identity_test

import (
	"crypto/x509"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// Who was believed is known again, and is believed for exactly as long as somebody who
// is not known would be.
func TestSPIFFE22_T11_RememberedPeersAreJudgedAgain(t *testing.T) {
	ca, id := newCA(t), identitytest.ID(t, cart)
	chain, _ := ca.Leaf(t, id)
	bundle := ca.Bundle()
	source := domains{ca.TrustDomain: bundle}
	now := time.Now()
	peers := identity.NewPeers(identity.Client)
	believed := func(what string, at time.Time) {
		t.Helper()
		got, err := peers.Verify(chain, source, at)
		if err != nil || got != id {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
	refused := func(what string, certs []*x509.Certificate, at time.Time) {
		t.Helper()
		var verr *identity.VerifyError
		if got, err := peers.Verify(certs, source, at); !errors.As(err, &verr) || !got.IsZero() {
			t.Errorf("%s: %v, %v; want a refusal", what, got, err)
		}
	}
	believed("at first", now)
	if peers.Known() != 1 {
		t.Fatalf("%d are remembered", peers.Known())
	}
	believed("again", now)

	ends, begins := chain[0].NotAfter, chain[0].NotBefore
	for _, c := range chain[1:] {
		if c.NotAfter.Before(ends) || c.NotBefore.After(begins) {
			t.Fatal("the leaf is not what ends first")
		}
	}
	believed("at its end", ends)
	refused("after its end", chain, ends.Add(time.Second))
	believed("at its beginning", begins)
	refused("before its beginning", chain, begins.Add(-time.Second))

	source[ca.TrustDomain] = newCA(t).Bundle()
	refused("with another bundle", chain, now)
	delete(source, ca.TrustDomain)
	refused("without a bundle", chain, now)
	source[ca.TrustDomain] = bundle
	believed("with its bundle", now)

	// One byte, or another order, and it is somebody else.
	refused("without its intermediate", chain[:1], now)
	other, _ := ca.Leaf(t, identitytest.ID(t, "spiffe://"+ca.TrustDomain.String()+"/ns/shop/sa/root"))
	if got, err := peers.Verify(slices.Concat(other[:1], chain[1:]), source, now); err != nil || got == id {
		t.Errorf("another leaf before the same intermediate: %v, %v", got, err)
	}
	forged := *chain[0]
	forged.Raw = slices.Clone(forged.Raw)
	forged.Raw[len(forged.Raw)-1] ^= 1
	forged.Signature = slices.Clone(forged.Signature)
	forged.Signature[len(forged.Signature)-1] ^= 1
	before := peers.Known()
	refused("with another signature", slices.Concat([]*x509.Certificate{&forged}, chain[1:]), now)
	if peers.Known() != before {
		t.Error("who was refused is remembered")
	}
}

// An intermediate that ends before its leaves ends what is remembered of them.
func TestSPIFFE22_RememberedPathsEndWithTheirFirstCertificate(t *testing.T) {
	now := time.Now()
	ca := newCA(t)
	soon := ca.NewIntermediate(t, func(c *x509.Certificate) { c.NotAfter = now.Add(time.Minute).Truncate(time.Second) }, identitytest.NewKey(t))
	chain, _ := ca.Leaf(t, identitytest.ID(t, cart), identitytest.WithIssuer(soon, soon.Certificate))
	source := domains{ca.TrustDomain: ca.Bundle()}
	peers := identity.NewPeers(identity.Server)
	if _, err := peers.Verify(chain, source, now); err != nil {
		t.Fatal(err)
	}
	if _, err := peers.Verify(chain, source, soon.Certificate.NotAfter); err != nil {
		t.Errorf("at the intermediate's end: %v", err)
	}
	if _, err := peers.Verify(chain, source, soon.Certificate.NotAfter.Add(time.Second)); err == nil {
		t.Error("believed after the intermediate's end")
	}
}

func BenchmarkVerifyKnown(b *testing.B) {
	ca := identitytest.NewCA(b, identitytest.TrustDomain(b, "cluster.local"))
	chain, _ := ca.Leaf(b, identitytest.ID(b, cart))
	source := domains{ca.TrustDomain: ca.Bundle()}
	peers := identity.NewPeers(identity.Client)
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := peers.Verify(chain, source, now); err != nil {
			b.Fatal(err)
		}
	}
}
