package catest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"maps"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

// contextOf returns a context that outlives the test's own: cleanups still need it.
func contextOf(tb testing.TB) (context.Context, context.CancelFunc) {
	return context.WithCancel(context.WithoutCancel(tb.Context()))
}

// Certificate is one certificate of a kind that we make, with what another
// program needs in order to verify it. All is PEM.
type Certificate struct {
	Name          string // "root", "intermediate", "svid-rsa-2048", "serving", …
	PEM           []byte // the certificate alone
	Intermediates []byte // those between it and the root; empty for CA certificates
	Root          []byte
	Key           crypto.Signer // nil for CA certificates
	SPIFFEID      string        // empty for "serving"
	DNS           string        // a name in it; "serving" only
}

// LeafKeys makes one key of each kind that leaves may have, by name. Large RSA
// keys take seconds to make.
func LeafKeys(tb testing.TB) map[string]crypto.Signer {
	tb.Helper()
	keys := QuickLeafKeys(tb)
	for name, bits := range map[string]int{"rsa-3072": 3072, "rsa-4096": 4096} {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		check(tb, err)
		keys[name] = key
	}
	return keys
}

// QuickLeafKeys are those of [LeafKeys] that are made at once: one of each
// algorithm.
func QuickLeafKeys(tb testing.TB) map[string]crypto.Signer {
	tb.Helper()
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	check(tb, err)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	check(tb, err)
	small, err := rsa.GenerateKey(rand.Reader, 2048)
	check(tb, err)
	return map[string]crypto.Signer{"p256": NewKey(tb), "p384": p384, "ed25519": ed, "rsa-2048": small}
}

// Certificates returns one certificate of every kind that we make, issued by
// the Kit's authority.
func (k *Kit) Certificates(tb testing.TB) []Certificate {
	tb.Helper()
	root := identity.EncodePEM(k.Upstream.Root())
	who := k.Caller(tb, "shop", "cart")
	out := []Certificate{{Name: "root", PEM: root, Root: root, SPIFFEID: k.TrustDomain.ID().String()}}
	keys := LeafKeys(tb)
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		key := keys[name]
		issued, err := k.Authority.Issue(tb.Context(), who, key.Public(), time.Hour)
		check(tb, err)
		if len(out) == 1 {
			out = append(out, Certificate{
				Name: "intermediate", PEM: identity.EncodePEM(issued.Chain[1]), Root: root, SPIFFEID: k.TrustDomain.ID().String(),
			})
		}
		out = append(out, Certificate{
			Name: "svid-" + name, PEM: identity.EncodePEM(issued.Chain[0]), Intermediates: identity.EncodePEM(issued.Chain[1:]...),
			Root: root, Key: key, SPIFFEID: who.ID().String(),
		})
	}
	key := NewKey(tb)
	const host = "meshca.meshca-system.svc"
	chain, err := k.Authority.IssueServing(tb.Context(), ca.ServingNames{
		DNS: []string{host, "istiod.istio-system.svc", "localhost"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}, key.Public())
	check(tb, err)
	return append(out, Certificate{
		Name: "serving", PEM: identity.EncodePEM(chain[0]), Intermediates: identity.EncodePEM(chain[1:]...),
		Root: root, Key: key, DNS: host,
	})
}
