package identity_test

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

const cart = "spiffe://cluster.local/ns/shop/sa/cart"

var (
	oidSAN         = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage    = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidExtKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidBasic       = asn1.ObjectIdentifier{2, 5, 29, 19}
	bothRoles      = []identity.Role{identity.Server, identity.Client}
)

// believe demands that the leaf made with these options proves cart in both roles.
func believe(t *testing.T, ca *identitytest.CA, opts ...identitytest.Option) {
	t.Helper()
	chain, _ := ca.Leaf(t, identitytest.ID(t, cart), opts...)
	for _, role := range bothRoles {
		if id, err := identity.Verify(chain, role, ca.Bundle(), time.Now()); err != nil || id.String() != cart {
			t.Errorf("as %v: %v, %v", role, id, err)
		}
	}
}

// refuseLeaf demands that the leaf made with these options is refused in both
// roles, by the section of the standard and before anything is looked up or
// verified; and that no SVID can be made of it.
func refuseLeaf(t *testing.T, section string, ca *identitytest.CA, opts ...identitytest.Option) {
	t.Helper()
	chain, key := ca.Leaf(t, identitytest.ID(t, cart), opts...)
	var leafErr *identity.LeafError
	for _, role := range bothRoles {
		id, err := identity.Verify(chain, role, untouched{t}, time.Now())
		if !errors.As(err, &leafErr) || leafErr.Section != section || !id.IsZero() {
			t.Errorf("as %v: %v, %v; want a refusal by %s", role, id, err, section)
		}
	}
	if _, err := identity.NewSVID(chain, key); !errors.As(err, &leafErr) || leafErr.Section != section {
		t.Errorf("NewSVID: %v; want a refusal by %s", err, section)
	}
}

// untouched is a source that must not be asked.
type untouched struct{ t *testing.T }

func (u untouched) Bundle(td identity.TrustDomain) (*identity.Bundle, error) {
	u.t.Helper()
	u.t.Errorf("the bundle of %s was asked for", td)
	return nil, errors.New("not here")
}

func newCA(t *testing.T, opts ...identitytest.CAOption) *identitytest.CA {
	t.Helper()
	return identitytest.NewCA(t, identitytest.TrustDomain(t, "cluster.local"), opts...)
}

func withURIs(t *testing.T, uris ...string) identitytest.Option {
	t.Helper()
	return identitytest.WithTemplate(func(c *x509.Certificate) {
		c.URIs = nil
		for _, u := range uris {
			c.URIs = append(c.URIs, identitytest.URL(t, u))
		}
	})
}

func withKeyUsage(u x509.KeyUsage) identitytest.Option {
	return identitytest.WithTemplate(func(c *x509.Certificate) { c.KeyUsage = u })
}

func TestSPIFFE11_SPIFFE25_ExactlyOneURI(t *testing.T) {
	ca := newCA(t)
	believe(t, ca)
	believe(t, ca, identitytest.WithTemplate(func(c *x509.Certificate) {
		c.DNSNames = []string{"cart.shop.svc"}
		c.EmailAddresses = []string{"cart@example.org"}
		c.IPAddresses = append(c.IPAddresses, []byte{192, 0, 2, 7})
	}))
	const other = "spiffe://cluster.local/ns/shop/sa/pay"
	refuseLeaf(t, "§2", ca, withURIs(t, cart, other))
	refuseLeaf(t, "§2", ca, withURIs(t, other, cart))
	refuseLeaf(t, "§2", ca, withURIs(t, cart, cart))
	refuseLeaf(t, "§2", ca, withURIs(t, cart, "https://example.org/"))
	refuseLeaf(t, "§2", ca, withURIs(t))
	refuseLeaf(t, "§2", ca, withURIs(t), identitytest.WithTemplate(func(c *x509.Certificate) { c.DNSNames = []string{"cart"} }))
}

func TestSPIFFE12_SPIFFE26_IDOfALeaf(t *testing.T) {
	ca := newCA(t)
	refuseLeaf(t, "§5.2", ca, withURIs(t, "spiffe://cluster.local"))
	for _, s := range []string{"spiffe://cluster.local/", "https://cluster.local/ns/shop/sa/cart", "spiffe:///ns/shop/sa/cart",
		"urn:spiffe:cluster.local", "/ns/shop/sa/cart", cart + "?a=b", cart + "#a", "spiffe://Cluster.local/ns/shop/sa/cart",
		"spiffe://user@cluster.local/ns/shop/sa/cart", "spiffe://cluster.local:1/ns/shop/sa/cart", "spiffe://cluster.local/ns//sa/cart",
		"spiffe://cluster.local/ns/shop/sa/%63art", cart + "/", "spiffe://cluster.local/" + strings.Repeat("a", identity.MaxIDLength)} {
		refuseLeaf(t, "§2", ca, withURIs(t, s))
	}
}

// The bytes that were signed count, not what net/url makes of them: the second
// of these prints without its question mark once it has been parsed.
func TestSPIFFE5_SignedBytesAreTheID(t *testing.T) {
	ca := newCA(t)
	for _, s := range []string{cart + "?", cart + "#"} {
		refuseLeaf(t, "§2", ca, identitytest.WithExtension(rawSAN(uriName(s))))
	}
}

func TestSPIFFE13_EmptySubjectNeedsCriticalSAN(t *testing.T) {
	ca := newCA(t)
	plain := rawSAN(uriName(cart))
	plain.Critical = false
	refuseLeaf(t, "§2", ca, identitytest.WithExtension(plain))
	believe(t, ca, identitytest.WithExtension(plain), identitytest.WithTemplate(func(c *x509.Certificate) {
		c.Subject = pkix.Name{Organization: []string{"shop"}}
	}))
}

func TestSPIFFE14_SPIFFE20_SPIFFE23_NoCACertificateAuthenticates(t *testing.T) {
	ca := newCA(t)
	for _, usage := range []x509.KeyUsage{x509.KeyUsageDigitalSignature, x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign} {
		refuseLeaf(t, "§4.1", ca, withKeyUsage(usage), identitytest.WithTemplate(func(c *x509.Certificate) { c.IsCA = true }))
	}
	for _, a := range []*identitytest.Authority{ca.Root, ca.Intermediate} {
		if id, err := identity.Verify([]*x509.Certificate{a.Certificate}, identity.Client, ca.Bundle(), time.Now()); err == nil {
			t.Errorf("the authority %s authenticates as %s", a.Certificate.Subject, id)
		}
	}
	// A certificate without basic constraints is no CA either.
	believe(t, ca, identitytest.WithTemplate(func(c *x509.Certificate) { c.BasicConstraintsValid = false }))
}

func TestSPIFFE15_KeyUsageIsThereAndCritical(t *testing.T) {
	ca := newCA(t)
	refuseLeaf(t, "§4.3", ca, withKeyUsage(0))
	refuseLeaf(t, "§4.3", ca, identitytest.WithExtension(pkix.Extension{Id: oidKeyUsage, Value: []byte{0x03, 0x02, 0x07, 0x80}}))
}

func TestSPIFFE16_SPIFFE24_KeyUsageOfALeaf(t *testing.T) {
	ca := newCA(t)
	const sign = x509.KeyUsageDigitalSignature
	for _, usage := range []x509.KeyUsage{sign, sign | x509.KeyUsageKeyEncipherment, sign | x509.KeyUsageKeyAgreement} {
		believe(t, ca, withKeyUsage(usage))
	}
	for _, usage := range []x509.KeyUsage{x509.KeyUsageKeyEncipherment, x509.KeyUsageCertSign, x509.KeyUsageCRLSign,
		sign | x509.KeyUsageCertSign, sign | x509.KeyUsageCRLSign, sign | x509.KeyUsageCertSign | x509.KeyUsageCRLSign} {
		refuseLeaf(t, "§4.3", ca, withKeyUsage(usage))
	}
}

func TestSPIFFE18_V13_V31_ExtendedKeyUsageByRole(t *testing.T) {
	ca := newCA(t)
	const server, client, any = x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageAny
	unknown := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}
	empty := identitytest.WithExtension(pkix.Extension{Id: oidExtKeyUsage, Value: []byte{0x30, 0x00}})
	usages := func(known []x509.ExtKeyUsage, unknown ...asn1.ObjectIdentifier) identitytest.Option {
		return identitytest.WithTemplate(func(c *x509.Certificate) { c.ExtKeyUsage, c.UnknownExtKeyUsage = known, unknown })
	}
	for _, c := range []struct {
		name                 string
		opt                  identitytest.Option
		asServer, asClient   bool
		oneOfTwoIsEnoughHere bool
	}{
		{"both", usages([]x509.ExtKeyUsage{server, client}), true, true, false},
		{"none", usages(nil), true, true, false},
		{"both and another", usages([]x509.ExtKeyUsage{server, client, x509.ExtKeyUsageCodeSigning}, unknown), true, true, false},
		{"server only", usages([]x509.ExtKeyUsage{server}), true, false, true},
		{"client only", usages([]x509.ExtKeyUsage{client}), false, true, true},
		{"any", usages([]x509.ExtKeyUsage{any}), false, false, false},
		{"code signing", usages([]x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}), false, false, false},
		{"unknown", usages(nil, unknown), false, false, false},
		{"empty", empty, false, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			chain, key := ca.Leaf(t, identitytest.ID(t, cart), c.opt)
			for role, want := range map[identity.Role]bool{identity.Server: c.asServer, identity.Client: c.asClient} {
				_, err := identity.Verify(chain, role, ca.Bundle(), time.Now())
				var leafErr *identity.LeafError
				if want && err != nil || !want && (!errors.As(err, &leafErr) || leafErr.Section != "§4.4") {
					t.Errorf("as %v: %v", role, err)
				}
			}
			// Our own SVID must do in both roles.
			if _, err := identity.NewSVID(chain, key); (err == nil) != (c.asServer && c.asClient) {
				t.Errorf("NewSVID: %v", err)
			}
		})
	}
	if _, err := identity.Verify(ca.SVID(t, identitytest.ID(t, cart)).Certificates(), identity.Role(0), ca.Bundle(), time.Now()); err == nil {
		t.Error("a role that does not exist is accepted")
	}
}

// An intermediate that is good for clients only makes no servers.
func TestV13_ExtendedKeyUsageOfTheIntermediate(t *testing.T) {
	ca := newCA(t, identitytest.WithIntermediateTemplate(func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}))
	chain, _ := ca.Leaf(t, identitytest.ID(t, cart))
	if _, err := identity.Verify(chain, identity.Client, ca.Bundle(), time.Now()); err != nil {
		t.Error(err)
	}
	if _, err := identity.Verify(chain, identity.Server, ca.Bundle(), time.Now()); err == nil {
		t.Error("believed as a server")
	}
}

// name makes one GeneralName.
func name(tag int, compound bool, content string) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: compound, Bytes: []byte(content)}
}

func uriName(s string) asn1.RawValue { return name(6, false, s) }

// otherName is a Microsoft user principal name, the common otherName.
func otherName(t testing.TB, tag int, text string) asn1.RawValue {
	t.Helper()
	oid := mustDER(t, asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 20, 2, 3})
	value := mustDER(t, asn1.RawValue{Class: asn1.ClassUniversal, Tag: tag, Bytes: []byte(text)})
	return name(0, true, string(oid)+string(mustDER(t, asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: value})))
}

func mustDER(t testing.TB, v any) []byte {
	t.Helper()
	der, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func namesDER(names ...asn1.RawValue) []byte {
	der, err := asn1.Marshal(names)
	if err != nil {
		panic(err) // of RawValues; cannot be
	}
	return der
}

func rawSAN(names ...asn1.RawValue) pkix.Extension {
	return pkix.Extension{Id: oidSAN, Critical: true, Value: namesDER(names...)}
}

func TestV32_NamesHoldPrintableASCIIOnly(t *testing.T) {
	for _, bad := range []string{"a\x00b", "\x00", cart + "\x00.evil", "a\nb", "a\rb", "a\tb", "\x1b[31m", "a\x7f", "é", "ａ", "a\xffb", "\u202e"} {
		for kind, n := range map[string]asn1.RawValue{
			"e-mail": name(1, false, bad), "DNS": name(2, false, bad), "URI": name(6, false, bad),
			"otherName":   otherName(t, asn1.TagUTF8String, bad),
			"IA5 other":   otherName(t, asn1.TagIA5String, bad),
			"T61 other":   otherName(t, asn1.TagT61String, bad),
			"BMP other":   otherName(t, asn1.TagBMPString, "\x00a"+bad),
			"directory":   name(4, true, string(directoryName(t, bad))),
			"general str": otherName(t, asn1.TagGeneralString, bad),
		} {
			if uris, err := identity.SANURIs(namesDER(uriName(cart), n)); err == nil {
				t.Errorf("%s %q is accepted beside %q", kind, bad, uris)
			} else if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < 0x20 || r == 0x7f || r == 0x202e }) {
				t.Errorf("the refusal of %s %q repeats it as it is: %s", kind, bad, err)
			}
		}
	}
	good := []asn1.RawValue{uriName(cart), name(2, false, "a.example.org"), name(1, false, "a b@example.org"), name(7, false, "\xc0\x00\x02\x07"),
		name(8, false, "\x2a\x03"), otherName(t, asn1.TagUTF8String, "cart@shop"), name(4, true, string(directoryName(t, "cart, shop")))}
	if uris, err := identity.SANURIs(namesDER(good...)); err != nil || !slices.Equal(uris, []string{cart}) {
		t.Errorf("good names: %q, %v", uris, err)
	}

	// The same in certificates, those that crypto/x509 reads without complaint.
	ca := newCA(t)
	believe(t, ca, identitytest.WithExtension(rawSAN(good...)))
	for _, n := range []asn1.RawValue{otherName(t, asn1.TagUTF8String, "cart\x00.evil"), name(4, true, string(directoryName(t, "a\x00b"))),
		name(1, false, "a@exa\x01mple.org")} {
		chain, ok := tryLeaf(t, ca, rawSAN(uriName(cart), n))
		if !ok {
			continue // crypto/x509 has learnt to refuse it by itself
		}
		if id, err := identity.Verify(chain, identity.Client, untouched{t}, time.Now()); err == nil {
			t.Errorf("%q is believed as %s", n.Bytes, id)
		}
	}
}

func directoryName(t testing.TB, organization string) []byte {
	t.Helper()
	value := asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagUTF8String, Bytes: []byte(organization)}
	return mustDER(t, pkix.RDNSequence{{{Type: asn1.ObjectIdentifier{2, 5, 4, 10}, Value: value}}})
}

// tryLeaf makes a chain with the SAN given, if crypto/x509 can read it back.
func tryLeaf(t *testing.T, ca *identitytest.CA, san pkix.Extension) ([]*x509.Certificate, bool) {
	t.Helper()
	chain, key := ca.Leaf(t, identitytest.ID(t, cart))
	template := *chain[0]
	template.URIs, template.ExtraExtensions = nil, []pkix.Extension{san}
	der, err := x509.CreateCertificate(rand.Reader, &template, ca.Intermediate.Certificate, key.Public(), ca.Intermediate.Key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	return []*x509.Certificate{leaf, ca.Intermediate.Certificate}, err == nil
}

// One certificate, one meaning: what a lenient reader could take for another
// name is refused.
func TestSANsHaveOneEncoding(t *testing.T) {
	utf8 := string(mustDER(t, "text"))
	deep := utf8
	for range 20 {
		deep = string(mustDER(t, asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: []byte(deep)}))
	}
	for what, der := range map[string][]byte{
		"empty input":           nil,
		"text after the names":  append(namesDER(uriName(cart)), 0),
		"a set of names":        append([]byte{0x31}, namesDER(uriName(cart))[1:]...),
		"a primitive sequence":  append([]byte{0x10}, namesDER(uriName(cart))[1:]...),
		"a constructed URI":     namesDER(name(6, true, string(mustDER(t, asn1.RawValue{Tag: asn1.TagIA5String, Bytes: []byte(cart)})))),
		"a constructed DNS":     namesDER(uriName(cart), name(2, true, utf8)),
		"a primitive otherName": namesDER(uriName(cart), name(0, false, utf8)),
		"a kind that is none":   namesDER(uriName(cart), name(9, false, "a")),
		"a universal string":    namesDER(uriName(cart), asn1.RawValue{Tag: asn1.TagIA5String, Bytes: []byte(cart)}),
		"a truncated name":      {0x30, 0x03, 0x86, 0x05, 'a'},
		"an indefinite length":  {0x30, 0x80, 0x86, 0x01, 'a', 0, 0},
		"a long-form length":    {0x30, 0x81, 0x03, 0x86, 0x01, 'a'},
		"broken nesting":        namesDER(uriName(cart), name(0, true, "\x30\x05\x00")),
		"deep nesting":          namesDER(uriName(cart), name(0, true, deep)),
	} {
		if uris, err := identity.SANURIs(der); err == nil {
			t.Errorf("%s: read as %q", what, uris)
		}
	}
}

func TestV63_NamesAreCounted(t *testing.T) {
	many := func(n int) []asn1.RawValue {
		names := []asn1.RawValue{uriName(cart)}
		for i := 1; i < n; i++ {
			names = append(names, name(2, false, fmt.Sprintf("n%d.example.org", i)))
		}
		return names
	}
	ca := newCA(t)
	believe(t, ca, identitytest.WithExtension(rawSAN(many(100)...)))
	refuseLeaf(t, "§2", ca, identitytest.WithExtension(rawSAN(many(101)...)))
}
