package identity_test

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// domains is a source of several bundles.
type domains map[identity.TrustDomain]*identity.Bundle

func (d domains) Bundle(td identity.TrustDomain) (*identity.Bundle, error) {
	b, ok := d[td]
	if !ok {
		return nil, &identity.NoBundleError{TrustDomain: td}
	}
	return b, nil
}

func sourceOf(cas ...*identitytest.CA) domains {
	d := make(domains)
	for _, ca := range cas {
		d[ca.TrustDomain] = ca.Bundle()
	}
	return d
}

// verifyError demands a refusal of the leaf for id, in the type that is promised.
func verifyError(t *testing.T, chain []*x509.Certificate, bundles identity.BundleSource) *identity.VerifyError {
	t.Helper()
	return verifyErrorAt(t, chain, bundles, time.Now())
}

func verifyErrorAt(t *testing.T, chain []*x509.Certificate, bundles identity.BundleSource, now time.Time) *identity.VerifyError {
	t.Helper()
	var verr *identity.VerifyError
	for _, role := range bothRoles {
		id, err := identity.Verify(chain, role, bundles, now)
		if !errors.As(err, &verr) || !id.IsZero() {
			t.Fatalf("as %v: %v, %v; want a refusal", role, id, err)
		}
	}
	return verr
}

// What is signed is what is believed: not one byte of ID or key can be another.
func TestSPIFFE10_IDAndKeyAreSigned(t *testing.T) {
	ca := newCA(t)
	chain, _ := ca.Leaf(t, identitytest.ID(t, cart))
	point := chain[0].RawSubjectPublicKeyInfo[len(chain[0].RawSubjectPublicKeyInfo)-64:]
	other := identitytest.NewKey(t).Public()
	otherSPKI, err := x509.MarshalPKIXPublicKey(other)
	if err != nil {
		t.Fatal(err)
	}
	for what, swap := range map[string][2][]byte{
		"ID":  {[]byte("/sa/cart"), []byte("/sa/root")},
		"key": {point, otherSPKI[len(otherSPKI)-64:]},
	} {
		der := bytes.Replace(chain[0].Raw, swap[0], swap[1], 1)
		forged, err := x509.ParseCertificate(der)
		if err != nil || bytes.Equal(der, chain[0].Raw) {
			t.Fatalf("%s: nothing forged: %v", what, err)
		}
		verifyError(t, []*x509.Certificate{forged, chain[1]}, ca.Bundle())
	}
}

func TestSPIFFE22_SPIFFE83_T11_OwnBundleOnly(t *testing.T) {
	local := newCA(t)
	partner := identitytest.NewCA(t, identitytest.TrustDomain(t, "partner.example"))
	both := sourceOf(local, partner)

	for _, ca := range []*identitytest.CA{local, partner} {
		id := identitytest.ID(t, "spiffe://"+ca.TrustDomain.String()+"/ns/shop/sa/cart")
		if got, err := identity.Verify(ca.SVID(t, id).Certificates(), identity.Client, both, time.Now()); err != nil || got != id {
			t.Errorf("%s: %v, %v", id, got, err)
		}
	}
	// The partner's authority vouches for our domain: the root is believed, for
	// another domain.
	forged, _ := partner.Leaf(t, identitytest.ID(t, cart))
	verr := verifyError(t, forged, both)
	var unknown x509.UnknownAuthorityError
	if !errors.As(verr, &unknown) || verr.ID.String() != cart {
		t.Errorf("refused with %v", verr)
	}
	// No bundle, no trust, whoever signed. No name is near enough to another.
	for _, td := range []string{"evil.cluster.local", "cluster.local.evil", "xcluster.local", "cluster.loca", "cluster-local", "local", "cluster",
		"cluster_local", "clusterlocal"} {
		chain, _ := local.Leaf(t, identitytest.ID(t, "spiffe://"+td+"/ns/shop/sa/cart"))
		var none *identity.NoBundleError
		if verr := verifyError(t, chain, both); !errors.As(verr, &none) || none.TrustDomain.String() != td {
			t.Errorf("%s: refused with %v", td, verr)
		}
		if verr := verifyError(t, chain, local.Bundle()); !errors.As(verr, &none) {
			t.Errorf("%s: refused with %v", td, verr)
		}
	}
}

// liar answers every question with one bundle.
type liar struct{ b *identity.Bundle }

func (l liar) Bundle(identity.TrustDomain) (*identity.Bundle, error) { return l.b, nil }

func TestSPIFFE36_ABundleStaysBoundToItsDomain(t *testing.T) {
	ca := newCA(t)
	chain, _ := ca.Leaf(t, identitytest.ID(t, "spiffe://evil.cluster.local/ns/shop/sa/cart"))
	verifyError(t, chain, liar{ca.Bundle()})
	if _, err := identity.NewBundle(identity.TrustDomain{}, identity.BundleConfig{}); err == nil {
		t.Error("a bundle of no trust domain is accepted")
	}
	if _, err := identity.ParseBundle(identity.TrustDomain{}, []byte(`{"keys":[]}`)); err == nil {
		t.Error("a bundle document for no trust domain is accepted")
	}
	// Sources that answer nothing at all.
	good, _ := ca.Leaf(t, identitytest.ID(t, cart))
	verifyError(t, good, liar{nil})
	verifyError(t, good, (*identity.Bundle)(nil))
	verifyError(t, good, liar{new(identity.Bundle)})
}

// crypto/x509 takes a URI constraint for the domain and all below it, and
// believes this chain. Whole domains are compared before it is asked.
func TestT5_SPIFFE21_NameConstraintsAreNotReliedUpon(t *testing.T) {
	constrain := func(c *x509.Certificate) {
		c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"cluster.local"}, true
	}
	ca := newCA(t, identitytest.WithIntermediateTemplate(constrain))
	believe(t, ca)

	evil := identitytest.ID(t, "spiffe://evil.cluster.local/ns/shop/sa/cart")
	chain, _ := ca.Leaf(t, evil)
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(ca.Root.Certificate)
	intermediates.AddCert(chain[1])
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates})
	t.Logf("crypto/x509 by itself, about %s: %v", evil, err)

	var none *identity.NoBundleError
	if verr := verifyError(t, chain, ca.Bundle()); !errors.As(verr, &none) || none.TrustDomain != evil.TrustDomain() {
		t.Errorf("refused with %v", verr)
	}
	// Without any constraint the answer is the same.
	free := newCA(t)
	chain, _ = free.Leaf(t, evil)
	if verr := verifyError(t, chain, free.Bundle()); !errors.As(verr, &none) {
		t.Errorf("refused with %v", verr)
	}
}

// Rotation makes roots of one name and different keys. Each has to be tried.
func TestSPIFFE27_RootsOfOneName(t *testing.T) {
	sameName := func(c *x509.Certificate) { c.Subject, c.SubjectKeyId = pkix.Name{CommonName: "root"}, nil }
	first := newCA(t, identitytest.WithRootTemplate(sameName))
	second := newCA(t, identitytest.WithRootTemplate(sameName))
	for _, order := range [][]*x509.Certificate{
		{first.Root.Certificate, second.Root.Certificate},
		{second.Root.Certificate, first.Root.Certificate},
	} {
		b := newBundle(t, identity.BundleConfig{Authorities: order})
		for i, ca := range []*identitytest.CA{first, second} {
			chain, _ := ca.Leaf(t, identitytest.ID(t, cart))
			if _, err := identity.Verify(chain, identity.Client, b, time.Now()); err != nil {
				t.Errorf("root %d: %v", i+1, err)
			}
		}
		stranger, _ := newCA(t, identitytest.WithRootTemplate(sameName)).Leaf(t, identitytest.ID(t, cart))
		verifyError(t, stranger, b)
	}
}

func newBundle(t testing.TB, c identity.BundleConfig) *identity.Bundle {
	t.Helper()
	b, err := identity.NewBundle(identitytest.TrustDomain(t, "cluster.local"), c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSPIFFE28_EmptyBundleTrustsNobody(t *testing.T) {
	ca := newCA(t)
	chain, _ := ca.Leaf(t, identitytest.ID(t, cart))
	b, err := identity.ParseBundle(ca.TrustDomain, []byte(`{"keys":[]}`))
	if err != nil {
		t.Fatal(err)
	}
	verifyError(t, chain, b)
}

// The bounds come before anything is looked up, let alone verified.
func TestV63_ChainsAreBoundedFirst(t *testing.T) {
	ca := newCA(t)
	chain, _ := ca.Leaf(t, identitytest.ID(t, cart))
	chain = slices.Clip(chain)
	pad := func(n int) []*x509.Certificate {
		out := chain
		for len(out) < n {
			out = append(out, ca.Intermediate.Certificate)
		}
		return out
	}
	if _, err := identity.Verify(pad(10), identity.Client, ca.Bundle(), time.Now()); err != nil {
		t.Errorf("10 certificates: %v", err)
	}
	for _, n := range []int{11, 100} {
		verifyError(t, pad(n), untouched{t})
	}
	verifyError(t, nil, untouched{t})

	// Copies of an intermediate with another size or key: the bound looks at no more.
	fat := func(n int) []*x509.Certificate {
		c := *ca.Intermediate.Certificate
		c.Raw = make([]byte, n)
		return append(pad(2), &c)
	}
	if _, err := identity.Verify(fat(16<<10), identity.Client, ca.Bundle(), time.Now()); err != nil {
		t.Errorf("16 KiB: %v", err)
	}
	verifyError(t, fat(16<<10+1), untouched{t})

	heavy := func(bits int, e int) []*x509.Certificate {
		c := *ca.Intermediate.Certificate
		c.PublicKey = &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), uint(bits-1)), E: e}
		return append(pad(2), &c)
	}
	if _, err := identity.Verify(heavy(4096, 65537), identity.Client, ca.Bundle(), time.Now()); err != nil {
		t.Errorf("RSA of 4096 bits: %v", err)
	}
	for _, c := range [][2]int{{4097, 65537}, {16384, 65537}, {2048, 65539}, {2048, 1<<31 - 1}} {
		verifyError(t, heavy(c[0], c[1]), untouched{t})
	}
}

func TestVerifyTakesTheChainsThatPeersShow(t *testing.T) {
	ca := newCA(t)
	id := identitytest.ID(t, cart)
	leafOnly, _ := ca.Leaf(t, id, identitytest.WithIssuer(ca.Root))
	good, _ := ca.Leaf(t, id)
	good = slices.Clip(good)
	stranger := newCA(t)
	for what, chain := range map[string][]*x509.Certificate{
		"straight from the root":     leafOnly,
		"with the root sent along":   append(good, ca.Root.Certificate),
		"unrelated certificates too": append(good, stranger.Intermediate.Certificate, stranger.Root.Certificate),
		"an intermediate twice":      append(good, ca.Intermediate.Certificate),
	} {
		if got, err := identity.Verify(chain, identity.Client, ca.Bundle(), time.Now()); err != nil || got != id {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}

	deep := newCA(t) // its intermediate has path length 0 and signs a CA all the same
	deepRoots := deep.Bundle()
	deep.Root = deep.Intermediate
	below := deep.NewIntermediate(t, nil, identitytest.NewKey(t))
	tooDeep, _ := deep.Leaf(t, id, identitytest.WithIssuer(below, below.Certificate, deep.Intermediate.Certificate))
	verifyError(t, tooDeep, deepRoots)

	notLeafFirst := []*x509.Certificate{good[1], good[0]}
	for what, chain := range map[string][]*x509.Certificate{
		"intermediate missing":         good[:1],
		"another CA's chain":           stranger.SVID(t, id).Certificates(),
		"intermediate first":           notLeafFirst,
		"leaf signed by another leaf":  leafUnderLeaf(t, ca),
		"intermediate is no authority": noAuthorityBetween(t, ca),
		"unknown critical extension": first(ca.Leaf(t, id, identitytest.WithExtension(pkix.Extension{
			Id: []int{1, 3, 6, 1, 4, 1, 99999, 2}, Critical: true, Value: []byte{0x05, 0x00}}))),
	} {
		t.Run(what, func(t *testing.T) { verifyError(t, chain, ca.Bundle()) })
	}
}

func first[A, B any](a A, _ B) A { return a }

func leafUnderLeaf(t *testing.T, ca *identitytest.CA) []*x509.Certificate {
	t.Helper()
	svid := ca.SVID(t, identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/pay"))
	chain, _ := ca.Leaf(t, identitytest.ID(t, cart), identitytest.WithIssuer(
		&identitytest.Authority{Certificate: svid.Leaf(), Key: svid.PrivateKey()}, svid.Certificates()...))
	return chain
}

func noAuthorityBetween(t *testing.T, ca *identitytest.CA) []*x509.Certificate {
	t.Helper()
	key := identitytest.NewKey(t)
	a := ca.NewIntermediate(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, key)
	chain, _ := ca.Leaf(t, identitytest.ID(t, cart), identitytest.WithIssuer(a, a.Certificate))
	return chain
}

func TestVerifyByTheInstantGiven(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	ca := newCA(t, identitytest.WithClock(func() time.Time { return now }))
	svid := ca.SVID(t, identitytest.ID(t, cart))
	leaf := svid.Leaf()
	for _, at := range []time.Time{leaf.NotBefore, now, leaf.NotAfter} {
		if _, err := identity.Verify(svid.Certificates(), identity.Server, ca.Bundle(), at); err != nil {
			t.Errorf("at %v: %v", at, err)
		}
	}
	for at, hint := range map[time.Time]string{
		leaf.NotBefore.Add(-time.Second): "it begins at " + leaf.NotBefore.UTC().Format(time.RFC3339) + ", in 1s",
		leaf.NotAfter.Add(time.Second):   "it ended at " + leaf.NotAfter.UTC().Format(time.RFC3339) + ", 1s ago",
	} {
		verr := verifyErrorAt(t, svid.Certificates(), ca.Bundle(), at)
		if !strings.Contains(verr.Error(), hint) || verr.ID != svid.ID() {
			t.Errorf("at %v: %v; want %q in it", at, verr, hint)
		}
	}
	// A root that has ended ends everything under it.
	old := newCA(t, identitytest.WithRootTemplate(func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }))
	chain, _ := old.Leaf(t, identitytest.ID(t, cart))
	verifyErrorAt(t, chain, old.Bundle(), now)
}

// What a peer writes into its certificates reaches our log quoted and cut.
func TestV66_ErrorsQuoteAndCutThePeersText(t *testing.T) {
	nasty := "evil\n\x1b[31m" + strings.Repeat("x", 8<<10)
	rename := func(c *x509.Certificate) { c.Subject.CommonName = nasty }
	ca := newCA(t)
	stranger := newCA(t, identitytest.WithRootTemplate(rename), identitytest.WithIntermediateTemplate(rename))
	chain, _ := stranger.Leaf(t, identitytest.ID(t, cart))
	long := "spiffe://cluster.local/" + strings.Repeat("a", 2000)
	longID, _ := stranger.Leaf(t, identitytest.ID(t, long))
	dns, _ := ca.Leaf(t, identitytest.ID(t, cart), identitytest.WithExtension(rawSAN(uriName(cart), otherName(t, 12, nasty))))
	for what, c := range map[string][]*x509.Certificate{"issuer": chain, "ID": longID, "name": dns} {
		text := verifyError(t, c, ca.Bundle()).Error()
		if len(text) > 2<<10 || strings.ContainsAny(text, "\n\x1b") || strings.Contains(text, strings.Repeat("x", 2000)) {
			t.Errorf("%s: a text of %d bytes: %.300q", what, len(text), text)
		}
	}
	if _, err := identity.ParseID(nasty); err == nil || len(err.Error()) > 1<<10 || strings.ContainsAny(err.Error(), "\n\x1b") {
		t.Errorf("ParseID: %.300q", err)
	}
	if _, err := identity.ParseTrustDomain(nasty); err == nil || len(err.Error()) > 1<<10 || strings.ContainsAny(err.Error(), "\n\x1b") {
		t.Errorf("ParseTrustDomain: %.300q", err)
	}
}

func TestVerifyKeyTypes(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{rsaKey, edKey} {
		ca := newCA(t, identitytest.WithCAKeys(func(testing.TB) crypto.Signer { return key }))
		believe(t, ca, identitytest.WithKey(key))
	}
}
