package certs

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// kind is one kind of certificate that we make, in files that every program
// can read.
type kind struct {
	name string
	// The leaf alone, what is between it and the root, both, the root, and the
	// key. CA certificates have no key; there the "leaf" is themselves.
	leaf, intermediates, chain, root, key string
	id                                    string // SPIFFE ID; empty for "serving"
	host                                  string // DNS name; "serving" only
	certificate                           *x509.Certificate

	// What our side of a handshake shows and believes; nil where the kind is for
	// no mutual TLS.
	ours    *identity.SVID
	bundle  *identity.Bundle
	foreign bool // ours chains to a root that nobody trusts: every handshake must fail
}

// kinds makes all of them, with a CA that still runs.
func kinds(t *testing.T) (all []*kind, running *catest.Kit) {
	t.Helper()
	dir := t.TempDir()
	kit := catest.New(t, catest.WithLeaf(ca.LeafConfig{TestLifetimes: true}))
	bundle, _ := kit.Authority.Bundle()
	for _, c := range kit.Certificates(t) {
		k := write(t, dir, c)
		if c.Key != nil && c.SPIFFEID != "" {
			k.ours, k.bundle = svidOf(t, c), bundle
		}
		all = append(all, k)
	}
	short := kit.SVID(t, "shop", "cart", time.Minute)
	all = append(all, writeSVID(t, dir, "svid-test-lifetime", short, bundle))

	clampedKit, clamped := clampedSVID(t)
	clampedBundle, _ := clampedKit.Authority.Bundle()
	all = append(all, writeSVID(t, dir, "svid-clamped", clamped, clampedBundle))

	stranger := writeSVID(t, dir, "stranger", kit.SVID(t, "shop", "cart", time.Hour), bundle)
	stranger.ours, stranger.foreign = identitytest.NewCA(t, kit.TrustDomain).SVID(t, short.ID()), true
	return append(all, stranger), kit
}

// clampedSVID has an SVID issued at a moment when its issuer ends before the
// lifetime that was asked for.
func clampedSVID(t *testing.T) (*catest.Kit, *identity.SVID) {
	t.Helper()
	var behind atomic.Int64 // how far the CA's clock is
	behind.Store(int64(90 * time.Minute))
	kit := catest.New(t,
		catest.WithClock(func() time.Time { return time.Now().Add(-time.Duration(behind.Load())) }),
		catest.WithLeaf(ca.LeafConfig{Ceiling: time.Hour}), catest.WithIntermediateLifetime(2*time.Hour))
	behind.Store(0)
	svid := kit.SVID(t, "shop", "cart", time.Hour)
	issuer := svid.Certificates()[1]
	if leaf := svid.Leaf(); !leaf.NotAfter.Equal(issuer.NotAfter) || time.Until(leaf.NotAfter) > 31*time.Minute {
		t.Fatalf("the leaf ends at %s and its issuer at %s; the leaf was to be clamped", leaf.NotAfter, issuer.NotAfter)
	}
	return kit, svid
}

func svidOf(t *testing.T, c catest.Certificate) *identity.SVID {
	t.Helper()
	chain, err := identity.ParsePEM(append(append([]byte(nil), c.PEM...), c.Intermediates...))
	must(t, err)
	svid, err := identity.NewSVID(chain, c.Key)
	must(t, err)
	return svid
}

func writeSVID(t *testing.T, dir, name string, svid *identity.SVID, bundle *identity.Bundle) *kind {
	t.Helper()
	chain := svid.Certificates()
	k := write(t, dir, catest.Certificate{
		Name: name, PEM: identity.EncodePEM(chain[0]), Intermediates: identity.EncodePEM(chain[1:]...),
		Root: identity.EncodePEM(bundle.Authorities()...), Key: svid.PrivateKey(), SPIFFEID: svid.ID().String(),
	})
	k.ours, k.bundle = svid, bundle
	return k
}

func write(t *testing.T, dir string, c catest.Certificate) *kind {
	t.Helper()
	file := func(part string, content []byte) string {
		name := filepath.Join(dir, c.Name+"."+part+".pem")
		must(t, os.WriteFile(name, content, 0o600))
		return name
	}
	certs, err := identity.ParsePEM(c.PEM)
	must(t, err)
	k := &kind{
		name: c.Name, id: c.SPIFFEID, host: c.DNS, certificate: certs[0],
		leaf: file("leaf", c.PEM), root: file("root", c.Root),
		chain: file("chain", append(append([]byte(nil), c.PEM...), c.Intermediates...)),
	}
	if len(c.Intermediates) > 0 {
		k.intermediates = file("intermediates", c.Intermediates)
	}
	if c.Key != nil {
		k.key = file("key", keyPEM(t, c.Key))
	}
	return k
}

func keyPEM(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func (k *kind) isCA() bool { return k.key == "" }

// usages are what the certificate is for, as openssl's -purpose names it.
func (k *kind) usages() []string {
	switch {
	case k.isCA():
		return nil
	case k.host != "":
		return []string{"sslserver"}
	}
	return []string{"sslserver", "sslclient"}
}

// row is the kind as a line of the file that our scripts read; ports says where
// something of ours listens for it.
func (k *kind) row(port string) string {
	return strings.Join([]string{k.name, k.host, k.id, k.chain, k.key, k.root, port}, "\t") + "\n"
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
