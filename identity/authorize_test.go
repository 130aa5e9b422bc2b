package identity_test

import (
	"testing"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// A list from which the last name was removed must not open the door that the
// names guarded.
func TestV50_EmptyListLetsNobodyIn(t *testing.T) {
	peer := identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/cart")
	if err := identity.AuthorizeIDs()(peer); err == nil {
		t.Errorf("an empty list lets %s in", peer)
	}
	if err := identity.AuthorizeIDs(peer)(peer); err != nil {
		t.Errorf("a list with %s keeps it out: %v", peer, err)
	}
	var none identity.TrustDomain
	if err := identity.AuthorizeTrustDomain(none)(peer); err == nil {
		t.Errorf("no trust domain lets %s in", peer)
	}
}
