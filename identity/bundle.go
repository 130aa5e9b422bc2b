package identity

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Limits on what is read as a bundle, before anything is parsed.
const (
	MaxBundleBytes       = 1 << 20   // of a bundle document
	MaxCertificatePEM    = 256 << 10 // of a PEM file of certificates
	MaxBundleAuthorities = 64
)

// Bundle is the X.509 part of a trust bundle: the authorities to believe for
// one trust domain, with the sequence number that orders its versions. It is
// immutable; one value may be shared by any number of goroutines. A bundle
// without authorities is valid and means that nothing of the domain is trusted
// (SPIFFE_Trust_Domain_and_Bundle §4.1.3).
type Bundle struct {
	td          TrustDomain
	sequence    uint64
	refresh     time.Duration
	authorities []*x509.Certificate
	pool        *x509.CertPool
}

// BundleConfig is what [NewBundle] takes beside the trust domain.
type BundleConfig struct {
	// Sequence orders versions of one domain's bundle: it rises whenever the
	// contents change (spiffe_sequence).
	Sequence uint64
	// RefreshHint tells consumers how often to look again; zero gives none. It
	// is cut to whole seconds, as it travels (spiffe_refresh_hint).
	RefreshHint time.Duration
	// Authorities are CA certificates: cA=true and keyCertSign. Duplicates are
	// dropped, order is kept.
	Authorities []*x509.Certificate
}

// NewBundle makes a bundle. It refuses anchors that are no authorities, since
// a leaf taken for a root would let its holder be anyone (CVE-2024-2048).
func NewBundle(td TrustDomain, c BundleConfig) (*Bundle, error) {
	if td.IsZero() {
		return nil, errors.New("bundle without a trust domain")
	}
	if c.RefreshHint < 0 {
		return nil, fmt.Errorf("bundle of %s: the refresh hint %v is negative", td, c.RefreshHint)
	}
	b := &Bundle{td: td, sequence: c.Sequence, refresh: c.RefreshHint.Truncate(time.Second), pool: x509.NewCertPool()}
	for _, a := range c.Authorities {
		if err := checkAuthority(a); err != nil {
			return nil, fmt.Errorf("bundle of %s: %w", td, err)
		}
		if slices.ContainsFunc(b.authorities, a.Equal) {
			continue
		}
		if len(b.authorities) == MaxBundleAuthorities {
			return nil, fmt.Errorf("bundle of %s: more than %d authorities", td, MaxBundleAuthorities)
		}
		b.authorities = append(b.authorities, a)
		b.pool.AddCert(a)
	}
	return b, nil
}

// checkAuthority holds X509-SVID §4.1 and §4.3 for a certificate that is to be
// believed as an anchor.
func checkAuthority(c *x509.Certificate) error {
	switch {
	case !c.BasicConstraintsValid || !c.IsCA:
		return fmt.Errorf("certificate %s (serial %s) is no CA certificate and cannot be an authority", quote(c.Subject.String()), SerialString(c))
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("certificate %s (serial %s) lacks the key usage keyCertSign and cannot be an authority", quote(c.Subject.String()), SerialString(c))
	}
	return nil
}

// TrustDomain returns the domain that the bundle is about.
func (b *Bundle) TrustDomain() TrustDomain { return b.td }

// Sequence returns the version number; see [BundleConfig].
func (b *Bundle) Sequence() uint64 { return b.sequence }

// RefreshHint returns how often to look for a new version; zero if not said.
func (b *Bundle) RefreshHint() time.Duration { return b.refresh }

// Authorities returns the authorities. The caller must not change the slice.
func (b *Bundle) Authorities() []*x509.Certificate { return b.authorities }

// Equal reports whether both hold the same authorities in the same order under
// the same domain, sequence and hint. A nil bundle equals nil alone.
func (b *Bundle) Equal(o *Bundle) bool {
	if b == nil || o == nil {
		return b == o
	}
	return b.td == o.td && b.sequence == o.sequence && b.refresh == o.refresh &&
		slices.EqualFunc(b.authorities, o.authorities, (*x509.Certificate).Equal)
}

// MarshalDER returns the authorities as concatenated DER, the form of the
// Workload API.
func (b *Bundle) MarshalDER() []byte {
	var der []byte
	for _, a := range b.authorities {
		der = append(der, a.Raw...)
	}
	return der
}

// MarshalPEM returns the authorities as PEM blocks, each newline-ended.
func (b *Bundle) MarshalPEM() []byte { return EncodePEM(b.authorities...) }

// EncodePEM returns certificates as PEM blocks, each newline-ended.
func EncodePEM(certs ...*x509.Certificate) []byte {
	var out bytes.Buffer
	for _, c := range certs {
		out.Grow(len(c.Raw)*3/2 + 64)
		// Writing to a bytes.Buffer cannot fail, and there are no headers to reject.
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return out.Bytes()
}

// Markers of the blocks that [ParsePEM] takes.
var (
	pemAnyBegin  = []byte("-----BEGIN ")
	pemCertBegin = []byte("-----BEGIN CERTIFICATE-----")
)

// ParsePEM reads one or more certificates from PEM: nothing but CERTIFICATE
// blocks, at most [MaxCertificatePEM] bytes, no text in between.
//
// Text is refused, and so is a broken block: encoding/pem skips both without a
// word, and a file that lost one character of a block would silently hold one
// certificate less. The errors name the line and repeat nothing of it, since
// the file may be one of secrets that was named here by mistake.
func ParsePEM(data []byte) ([]*x509.Certificate, error) {
	if len(data) > MaxCertificatePEM {
		return nil, fmt.Errorf("PEM certificates: %d bytes, at most %d are allowed", len(data), MaxCertificatePEM)
	}
	var certs []*x509.Certificate
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		c, after, err := parsePEMBlock(rest)
		if err != nil {
			line := 1 + bytes.Count(data[:bytes.LastIndex(data, rest)], []byte("\n"))
			return nil, fmt.Errorf("PEM certificates: line %d: %w", line, err)
		}
		certs, rest = append(certs, c), after
	}
	if len(certs) == 0 {
		return nil, errors.New("PEM certificates: none found")
	}
	return certs, nil
}

// parsePEMBlock reads the block that text begins with, and returns what follows.
func parsePEMBlock(text []byte) (*x509.Certificate, []byte, error) {
	switch {
	case bytes.HasPrefix(text, pemCertBegin):
	case bytes.HasPrefix(text, pemAnyBegin):
		return nil, nil, errors.New("a block of another kind begins; only CERTIFICATE blocks are allowed")
	default:
		return nil, nil, errors.New("there is text outside of CERTIFICATE blocks")
	}
	block, after := pem.Decode(text)
	// Decode passes over whatever it cannot read until it finds a block that it can.
	if block == nil || bytes.Count(text[:len(text)-len(after)], pemAnyBegin) != 1 {
		return nil, nil, errors.New("the block that begins here is malformed")
	}
	if len(block.Headers) != 0 {
		return nil, nil, errors.New("the block that begins here has headers")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	return c, after, err
}
