package identity_test

import (
	"crypto/x509"
	"errors"
	"testing"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// What is claimed is what Verify would return, whoever signed it.
func TestClaimedID(t *testing.T) {
	td, err := identity.ParseTrustDomain("example.org")
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.WorkloadID(td, "shop", "cart")
	if err != nil {
		t.Fatal(err)
	}
	ca := identitytest.NewCA(t, td)
	if got, err := identity.ClaimedID(ca.SVID(t, id).Leaf()); err != nil || got != id {
		t.Errorf("%v, %v; want %v", got, err, id)
	}
	noUsage, _ := ca.Leaf(t, id, identitytest.WithTemplate(func(c *x509.Certificate) { c.KeyUsage = 0 }))
	for name, leaf := range map[string]*x509.Certificate{"an authority": ca.Root.Certificate, "no key usage": noUsage[0]} {
		var refused *identity.VerifyError
		if got, err := identity.ClaimedID(leaf); !errors.As(err, &refused) || !got.IsZero() {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}
