package identitytest_test

import (
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestSVIDIsBelieved(t *testing.T) {
	ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "cluster.local"))
	id := identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/cart")
	svid := ca.SVID(t, id)
	for _, role := range []identity.Role{identity.Server, identity.Client} {
		got, err := identity.Verify(svid.Certificates(), role, ca.Bundle(), time.Now())
		if err != nil || got != id {
			t.Errorf("as %v: got %v, %v", role, got, err)
		}
	}
	if _, err := identity.Verify(svid.Certificates(), identity.Server, ca.Bundle(), svid.NotAfter().Add(time.Second)); err == nil {
		t.Error("believed after its end")
	}
}
