package identitytest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
)

// Lifetimes and the allowance for clocks that are behind, as in meshca's profile.
const (
	rootLifetime         = 10 * 365 * 24 * time.Hour
	intermediateLifetime = 72 * time.Hour
	leafLifetime         = time.Hour
	backdate             = 2 * time.Minute
)

// CA is a root and an intermediate of one trust domain. It is safe for
// concurrent use as long as nobody assigns to its fields.
type CA struct {
	TrustDomain identity.TrustDomain
	Root        *Authority
	// Intermediate signs the leaves; chains hold it and not the root.
	Intermediate *Authority

	tb  testing.TB
	now func() time.Time
}

// Authority is a CA certificate with its key.
type Authority struct {
	Certificate *x509.Certificate
	Key         crypto.Signer
}

// CAOption changes what [NewCA] makes.
type CAOption func(*caConfig)

type caConfig struct {
	now                func() time.Time
	root, intermediate func(*x509.Certificate)
	newKey             func(testing.TB) crypto.Signer
}

// WithClock replaces time.Now, by which validity periods are set.
func WithClock(now func() time.Time) CAOption { return func(c *caConfig) { c.now = now } }

// WithRootTemplate changes the root's template before it is signed.
func WithRootTemplate(f func(*x509.Certificate)) CAOption { return func(c *caConfig) { c.root = f } }

// WithIntermediateTemplate changes the intermediate's template before it is signed.
func WithIntermediateTemplate(f func(*x509.Certificate)) CAOption {
	return func(c *caConfig) { c.intermediate = f }
}

// WithCAKeys makes the keys of root and intermediate; P-256 if not given.
func WithCAKeys(newKey func(testing.TB) crypto.Signer) CAOption {
	return func(c *caConfig) { c.newKey = newKey }
}

// NewCA makes a root and an intermediate for td, with keys of their own.
func NewCA(tb testing.TB, td identity.TrustDomain, opts ...CAOption) *CA {
	tb.Helper()
	keep := func(*x509.Certificate) {}
	conf := caConfig{now: time.Now, root: keep, intermediate: keep, newKey: NewKey}
	for _, o := range opts {
		o(&conf)
	}
	ca := &CA{TrustDomain: td, tb: tb, now: conf.now}

	key := conf.newKey(tb)
	template := ca.caTemplate(tb, "root", key, rootLifetime)
	conf.root(template)
	ca.Root = &Authority{Certificate: sign(tb, template, template, key.Public(), key), Key: key}
	ca.Intermediate = ca.NewIntermediate(tb, conf.intermediate, conf.newKey(tb))
	return ca
}

// NewIntermediate makes another intermediate under the root. Assign it to
// ca.Intermediate to sign leaves with it. change may be nil.
func (ca *CA) NewIntermediate(tb testing.TB, change func(*x509.Certificate), key crypto.Signer) *Authority {
	tb.Helper()
	template := ca.caTemplate(tb, "intermediate", key, intermediateLifetime)
	template.MaxPathLenZero = true
	if change != nil {
		change(template)
	}
	return &Authority{Certificate: ca.Root.Sign(tb, template, key.Public()), Key: key}
}

// Bundle returns the trust bundle with the root, sequence 1.
func (ca *CA) Bundle() *identity.Bundle {
	ca.tb.Helper()
	b, err := identity.NewBundle(ca.TrustDomain, identity.BundleConfig{
		Sequence:    1,
		Authorities: []*x509.Certificate{ca.Root.Certificate},
	})
	if err != nil {
		ca.tb.Fatalf("identitytest: the root was changed into no authority: %v", err)
	}
	return b
}

// Option changes one leaf.
type Option func(*leafConfig)

type leafConfig struct {
	lifetime time.Duration
	changes  []func(*x509.Certificate)
	key      crypto.Signer
	issuer   *Authority
	chain    []*x509.Certificate
}

// WithLifetime sets how long the leaf is valid from now; one hour if not given.
// A negative one makes a leaf that has ended already.
func WithLifetime(d time.Duration) Option { return func(c *leafConfig) { c.lifetime = d } }

// WithTemplate changes the template before it is signed, after all else has
// been filled in. Given more than once, the changes apply in order.
func WithTemplate(f func(*x509.Certificate)) Option {
	return func(c *leafConfig) { c.changes = append(c.changes, f) }
}

// WithKey gives the leaf's key; a new P-256 key if not given.
func WithKey(key crypto.Signer) Option { return func(c *leafConfig) { c.key = key } }

// WithIssuer signs with another authority than ca.Intermediate. chain follows
// the leaf; it should begin with the issuer's certificate unless that is a root.
func WithIssuer(a *Authority, chain ...*x509.Certificate) Option {
	return func(c *leafConfig) { c.issuer, c.chain = a, chain }
}

// WithExtension adds a raw extension in place of the one of the same kind that
// would otherwise be made.
func WithExtension(e pkix.Extension) Option {
	return WithTemplate(func(c *x509.Certificate) { c.ExtraExtensions = append(c.ExtraExtensions, e) })
}

// SVID makes an SVID for id, chain and key. The test fails when the options
// make it a leaf that [identity.NewSVID] refuses; use [CA.Leaf] for those.
func (ca *CA) SVID(tb testing.TB, id identity.ID, opts ...Option) *identity.SVID {
	tb.Helper()
	chain, key := ca.Leaf(tb, id, opts...)
	svid, err := identity.NewSVID(chain, key)
	if err != nil {
		tb.Fatalf("identitytest: SVID for %s: %v", id, err)
	}
	return svid
}

// Leaf makes the chain and the key of an SVID for id without judging them.
func (ca *CA) Leaf(tb testing.TB, id identity.ID, opts ...Option) ([]*x509.Certificate, crypto.Signer) {
	tb.Helper()
	conf := leafConfig{
		lifetime: leafLifetime,
		issuer:   ca.Intermediate,
		chain:    []*x509.Certificate{ca.Intermediate.Certificate},
	}
	for _, o := range opts {
		o(&conf)
	}
	if conf.key == nil {
		conf.key = NewKey(tb)
	}
	now := ca.now().UTC().Truncate(time.Second)
	template := &x509.Certificate{
		SerialNumber:          serial(tb),
		NotBefore:             now.Add(min(0, conf.lifetime) - backdate),
		NotAfter:              now.Add(conf.lifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          keyID(tb, conf.key.Public()),
		URIs:                  []*url.URL{URL(tb, id.String())},
	}
	if _, ok := conf.key.Public().(*rsa.PublicKey); ok {
		template.KeyUsage |= x509.KeyUsageKeyEncipherment
	}
	for _, change := range conf.changes {
		change(template)
	}
	leaf := conf.issuer.Sign(tb, template, conf.key.Public())
	return append([]*x509.Certificate{leaf}, conf.chain...), conf.key
}

// Sign signs template, as it is, for pub.
func (a *Authority) Sign(tb testing.TB, template *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	tb.Helper()
	return sign(tb, template, a.Certificate, pub, a.Key)
}

// caTemplate is meshca's profile of a CA certificate.
func (ca *CA) caTemplate(tb testing.TB, role string, key crypto.Signer, lifetime time.Duration) *x509.Certificate {
	tb.Helper()
	now, id := ca.now().UTC().Truncate(time.Second), keyID(tb, key.Public())
	return &x509.Certificate{
		SerialNumber: serial(tb),
		Subject: pkix.Name{
			Organization: []string{ca.TrustDomain.String()},
			CommonName:   "meshca " + role,
			SerialNumber: fmt.Sprintf("%x", id[:8]),
		},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(lifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          id,
		URIs:                  []*url.URL{URL(tb, ca.TrustDomain.ID().String())},
	}
}

func sign(tb testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		tb.Fatalf("identitytest: signing: %v", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatalf("identitytest: reading back what was signed: %v", err)
	}
	return c
}

// NewKey makes a P-256 key.
func NewKey(tb testing.TB) crypto.Signer {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// TrustDomain parses a trust domain's name.
func TrustDomain(tb testing.TB, name string) identity.TrustDomain {
	tb.Helper()
	td, err := identity.ParseTrustDomain(name)
	if err != nil {
		tb.Fatal(err)
	}
	return td
}

// ID parses a SPIFFE ID.
func ID(tb testing.TB, s string) identity.ID {
	tb.Helper()
	id, err := identity.ParseID(s)
	if err != nil {
		tb.Fatal(err)
	}
	return id
}

// URL parses a URI for a template's URIs.
func URL(tb testing.TB, s string) *url.URL {
	tb.Helper()
	u, err := url.Parse(s)
	if err != nil {
		tb.Fatal(err)
	}
	return u
}

// keyID is 160 bits of SHA-256 over the encoded public key: unique, which is all
// that RFC 5280 §4.2.1.2 asks of a key identifier.
func keyID(tb testing.TB, pub crypto.PublicKey) []byte {
	tb.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		tb.Fatal(err)
	}
	sum := sha256.Sum256(der)
	return sum[:20]
}

// serial is 16 random bytes with the top bit clear and the next one set, so
// that it is positive and of one length.
func serial(tb testing.TB) *big.Int {
	tb.Helper()
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		tb.Fatal(err)
	}
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b)
}
