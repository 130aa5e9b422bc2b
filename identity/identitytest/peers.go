package identitytest

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
)

// Peer is what some peer shows, with the verdict that every verifier must reach.
type Peer struct {
	Name  string
	Chain []*x509.Certificate
	Key   crypto.Signer
	// AsClient and AsServer say whether it is believed on that side of TLS.
	AsClient, AsServer bool
	// Claims is the ID that a believed peer has.
	Claims identity.ID
}

// Peers is the set of peers that whatever verifies peers is tried with.
type Peers struct {
	Now time.Time // at which all of them are judged
	// Own is the CA of the verifier's trust domain. The verifier holds the
	// bundle of Partner's domain, too.
	Own, Partner *CA
	All          []Peer

	bundles []*identity.Bundle
}

// Bundle answers for the two domains; Peers is what a verifier's source is.
func (p *Peers) Bundle(td identity.TrustDomain) (*identity.Bundle, error) {
	for _, b := range p.bundles {
		if b.TrustDomain() == td {
			return b, nil
		}
	}
	return nil, &identity.NoBundleError{TrustDomain: td}
}

// SVID is one of the verifier's own, for id.
func (p *Peers) SVID(tb testing.TB, id identity.ID) *identity.SVID {
	tb.Helper()
	return p.Own.SVID(tb, id)
}

// Refused calls f for those that are believed on neither side.
func (p *Peers) Refused(f func(Peer)) {
	for _, peer := range p.All {
		if !peer.AsClient && !peer.AsServer {
			f(peer)
		}
	}
}

// NewPeers makes the set for a verifier of id's trust domain; those that are
// believed are id.
func NewPeers(tb testing.TB, id identity.ID) *Peers {
	tb.Helper()
	now := time.Now().Truncate(time.Second)
	clock := WithClock(func() time.Time { return now })
	p := &Peers{
		Now: now, Own: NewCA(tb, id.TrustDomain(), clock),
		Partner: NewCA(tb, TrustDomain(tb, "partner.test"), clock),
	}
	p.bundles = []*identity.Bundle{p.Own.Bundle(), p.Partner.Bundle()}
	m := maker{TB: tb, Peers: p, id: id, clock: clock}
	m.leaves()
	m.times()
	m.domains()
	m.paths()
	m.constraints()
	return p
}

type maker struct {
	testing.TB
	*Peers
	id    identity.ID
	clock CAOption
}

// add notes a peer. server and client say where it is believed.
func (m *maker) add(name string, server, client bool, key crypto.Signer, chain ...*x509.Certificate) {
	peer := Peer{Name: name, Chain: chain, Key: key, AsServer: server, AsClient: client}
	if server || client {
		peer.Claims = m.id
	}
	m.All = append(m.All, peer)
}

// leaf adds a peer whose leaf is made with these options.
func (m *maker) leaf(name string, server, client bool, opts ...Option) {
	m.Helper()
	chain, key := m.Own.Leaf(m, m.id, opts...)
	m.add(name, server, client, key, chain...)
}

// with adds a good leaf with other certificates behind it than the intermediate.
func (m *maker) with(name string, good bool, issuer *Authority, behind ...*x509.Certificate) {
	m.Helper()
	m.leaf(name, good, good, WithIssuer(issuer, behind...))
}

func (m *maker) uris(list ...string) Option {
	return WithTemplate(func(c *x509.Certificate) {
		c.URIs = nil
		for _, u := range list {
			c.URIs = append(c.URIs, URL(m, u))
		}
	})
}

// named adds a peer whose leaf has these bytes for its one URI, also where
// crypto/x509 cannot read them: a certificate then has its encoding and nothing
// else.
func (m *maker) named(name, uri string) {
	m.Helper()
	der, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)}})
	if err != nil {
		panic(err) // of bytes; cannot be
	}
	chain, key := m.Own.Leaf(m, m.id)
	template := *chain[0]
	template.URIs = nil
	template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: der}}
	der, err = x509.CreateCertificate(rand.Reader, &template, chain[1], key.Public(), m.Own.Intermediate.Key)
	if err != nil {
		m.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		leaf = &x509.Certificate{Raw: der}
	}
	m.add(name, false, false, key, leaf, chain[1])
}

func usage(u x509.KeyUsage) Option {
	return WithTemplate(func(c *x509.Certificate) { c.KeyUsage = u })
}

func purposes(list ...x509.ExtKeyUsage) Option {
	return WithTemplate(func(c *x509.Certificate) { c.ExtKeyUsage = list })
}

// leaves are about the leaf by itself.
func (m *maker) leaves() {
	const sign = x509.KeyUsageDigitalSignature
	m.leaf("good", true, true)
	m.leaf("no extended key usage", true, true, purposes())
	m.leaf("servers only", true, false, purposes(x509.ExtKeyUsageServerAuth))
	m.leaf("clients only", false, true, purposes(x509.ExtKeyUsageClientAuth))
	m.leaf("any usage", false, false, purposes(x509.ExtKeyUsageAny))
	m.leaf("code signing", false, false, purposes(x509.ExtKeyUsageCodeSigning))
	m.leaf("no URI", false, false, m.uris(), WithTemplate(func(c *x509.Certificate) { c.DNSNames = []string{"cart.shop"} }))
	m.leaf("two URIs", false, false, m.uris(m.id.String(), m.id.String()+"-2"))
	m.leaf("a URI of another kind besides", false, false, m.uris(m.id.String(), "https://example.org/"))
	m.leaf("no path", false, false, m.uris(m.id.TrustDomain().ID().String()))
	m.leaf("the root of paths", false, false, m.uris(m.id.TrustDomain().ID().String()+"/"))
	m.leaf("an empty segment", false, false, m.uris(strings.Replace(m.id.String(), "/sa/", "//sa/", 1)))
	m.named("an escaped segment", strings.Replace(m.id.String(), "/sa/", "/%73a/", 1))
	m.named("a NUL", m.id.String()+"\x00.test")
	m.leaf("an e-mail address with a control character", false, false, WithTemplate(func(c *x509.Certificate) { c.EmailAddresses = []string{"a\x01b@example.org"} }))
	m.leaf("a CA", false, false, WithTemplate(func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }))
	m.leaf("a CA by its constraints alone", false, false, WithTemplate(func(c *x509.Certificate) { c.IsCA = true }))
	m.leaf("it may sign certificates", false, false, usage(sign|x509.KeyUsageCertSign))
	m.leaf("it may sign lists", false, false, usage(sign|x509.KeyUsageCRLSign))
	m.leaf("it may not sign", false, false, usage(x509.KeyUsageKeyEncipherment))
	m.leaf("no key usage", false, false, usage(0))
	m.leaf("an unknown critical extension", false, false, WithExtension(pkix.Extension{
		Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 2}, Critical: true, Value: []byte{0x05, 0x00}}))
	for _, a := range []struct {
		name string
		*Authority
	}{{"the root itself", m.Own.Root}, {"the intermediate itself", m.Own.Intermediate}} {
		m.add(a.name, false, false, a.Key, a.Certificate)
	}
}

func lasting(from, to time.Time) Option {
	return WithTemplate(func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, to })
}

func (m *maker) times() {
	hour := m.Now.Add(time.Hour)
	m.leaf("its last second", true, true, lasting(m.Now.Add(-time.Minute), m.Now))
	m.leaf("its first second", true, true, lasting(m.Now, hour))
	m.leaf("over for a second", false, false, lasting(m.Now.Add(-time.Minute), m.Now.Add(-time.Second)))
	m.leaf("it begins in a second", false, false, lasting(m.Now.Add(time.Second), hour))
	old := m.Own.NewIntermediate(m, func(c *x509.Certificate) { c.NotAfter = m.Now.Add(-time.Second) }, NewKey(m))
	m.with("its intermediate is over for a second", false, old, old.Certificate)
}

// domains are about who may vouch for whom.
func (m *maker) domains() {
	td, path := m.id.TrustDomain().String(), m.id.Path()
	partner := ID(m, m.Partner.TrustDomain.ID().String()+path)
	chain, key := m.Partner.Leaf(m, partner)
	m.All = append(m.All, Peer{"a federated domain", chain, key, true, true, partner})

	chain, key = m.Partner.Leaf(m, m.id)
	m.add("our domain by a federated root", false, false, key, chain...)
	chain, key = m.Partner.Leaf(m, m.id, WithKey(m.All[0].Key))
	m.add("our domain by a federated root, with a good peer's key", false, false, key, chain...)
	m.leaf("a federated domain by our root", false, false, m.uris(partner.String()))
	m.leaf("another domain with a good peer's key", false, false, m.uris("spiffe://other.test"+path), WithKey(m.All[0].Key))
	for _, alias := range [][2]string{
		{"in upper case", strings.ToUpper(td)},
		{"with a suffix", td + ".test"},
		{"with a prefix", "x" + td},
		{"a subdomain", "a." + td},
		{"its parent", td[strings.Index(td, ".")+1:]},
		{"with a dot at the end", td + "."},
		{"with a port", td + ":443"},
		{"without its dot", strings.ReplaceAll(td, ".", "-")},
	} {
		m.named("our domain "+alias[0], "spiffe://"+alias[1]+path)
	}
	stranger := NewCA(m, m.id.TrustDomain(), m.clock)
	chain, key = stranger.Leaf(m, m.id)
	m.add("an unknown root", false, false, key, chain...)
	m.add("an unknown root, sent along", false, false, key, append(slices.Clip(chain), stranger.Root.Certificate)...)
	m.leaf("unrelated certificates besides", true, true,
		WithIssuer(m.Own.Intermediate, m.Own.Intermediate.Certificate, stranger.Intermediate.Certificate, stranger.Root.Certificate))

	self := NewKey(m)
	own, _ := m.Own.Leaf(m, m.id, WithKey(self), WithIssuer(&Authority{Certificate: &x509.Certificate{}, Key: self}))
	m.add("a leaf that is its own root", false, false, self, own[0])
}

// paths are about what stands between the leaf and the root.
func (m *maker) paths() {
	own, middle := m.Own, m.Own.Intermediate.Certificate
	m.with("straight from the root", true, own.Root)
	m.with("the root sent along", true, own.Intermediate, middle, own.Root.Certificate)
	m.with("an intermediate twice", true, own.Intermediate, middle, middle)
	m.with("the intermediate missing", false, own.Intermediate)
	m.with("the root in the intermediate's place", false, own.Intermediate, own.Root.Certificate)
	copies := func(n int) []*x509.Certificate { return slices.Repeat([]*x509.Certificate{middle}, n-1) }
	m.with("10 certificates", true, own.Intermediate, copies(10)...)
	m.with("11 certificates", false, own.Intermediate, copies(11)...)
	m.with("100 certificates", false, own.Intermediate, copies(100)...)
	chain, _ := own.Leaf(m, m.id)
	m.add("the intermediate first", false, false, own.Intermediate.Key, chain[1], chain[0])

	under := func(issuer *Authority, change func(*x509.Certificate)) *Authority {
		below := *own
		below.Root = issuer
		return below.NewIntermediate(m, change, NewKey(m))
	}
	deep := under(own.Intermediate, nil) // whose issuer has path length 0
	m.with("deeper than the path length lets", false, deep, deep.Certificate, middle)
	mute := under(own.Root, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })
	m.with("an intermediate that may not sign", false, mute, mute.Certificate)
	fake := under(own.Root, func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false })
	m.with("an intermediate that is no CA", false, fake, fake.Certificate)
	svid := own.SVID(m, m.id)
	m.with("a leaf under a leaf", false, &Authority{Certificate: svid.Leaf(), Key: svid.PrivateKey()}, svid.Certificates()...)
	forClients := under(own.Root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
	m.leaf("an intermediate for clients only", false, true, WithIssuer(forClients, forClients.Certificate))

	m.loop()
	m.crossSigned()
}

// loop makes two authorities that vouch for each other, and one for itself.
func (m *maker) loop() {
	one, two := *m.Own.Intermediate.Certificate, *m.Own.Intermediate.Certificate
	one.Subject.CommonName, two.Subject.CommonName = "loop one", "loop two"
	one.SubjectKeyId, two.SubjectKeyId = []byte{1}, []byte{2}
	first, second := &Authority{&one, NewKey(m)}, &Authority{&two, NewKey(m)}
	one.PublicKey, two.PublicKey = first.Key.Public(), second.Key.Public()
	a := second.Sign(m, &one, first.Key.Public())
	b := first.Sign(m, &two, second.Key.Public())
	c := first.Sign(m, &one, first.Key.Public())
	m.with("a loop of two", false, first, a, b)
	m.with("a loop of one", false, first, c)
	m.with("loops beside a good chain", true, m.Own.Intermediate, m.Own.Intermediate.Certificate, a, b, c)
}

// crossSigned makes one authority with two certificates.
func (m *maker) crossSigned() {
	stranger := NewCA(m, m.id.TrustDomain(), m.clock)
	key := NewKey(m)
	ours := m.Own.NewIntermediate(m, nil, key)
	theirs := stranger.Root.Sign(m, ours.Certificate, key.Public())
	m.with("cross-signed, ours first", true, ours, ours.Certificate, theirs)
	m.with("cross-signed, ours last", true, ours, theirs, ours.Certificate)
	m.with("cross-signed, ours not shown", false, ours, theirs, stranger.Root.Certificate)
}

// constraints are about names in CA certificates. They may take away and never
// give: one domain's authority vouches for no other, whatever is permitted.
func (m *maker) constraints() {
	td := m.id.TrustDomain().String()
	permit := func(names ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.PermittedURIDomains, c.PermittedDNSDomainsCritical = names, true }
	}
	exclude := func(names ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExcludedURIDomains, c.PermittedDNSDomainsCritical = names, true }
	}
	for _, c := range []struct {
		name   string
		change func(*x509.Certificate)
		good   bool
	}{
		{"our domain permitted", permit(td), true},
		{"several permitted", permit("other.test", td), true},
		{"another excluded", exclude("other.test"), true},
		{"another permitted", permit("other.test"), false},
		{"our domain excluded", exclude(td), false},
	} {
		a := m.Own.NewIntermediate(m, c.change, NewKey(m))
		m.with("constraint: "+c.name, c.good, a, a.Certificate)
	}
	all := m.Own.NewIntermediate(m, permit(td, "other.test", "partner.test"), NewKey(m))
	for _, other := range []string{"a." + td, "other.test", "partner.test"} {
		m.leaf("constraint: it permits "+other, false, false, WithIssuer(all, all.Certificate),
			WithTemplate(func(c *x509.Certificate) { c.URIs = []*url.URL{URL(m, "spiffe://"+other+m.id.Path())} }))
	}
}
