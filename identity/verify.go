package identity

import (
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Limits on what a peer may show before any of it is verified. Path building
// over many intermediates has been made expensive more than once (V63:
// CVE-2026-32280, CVE-2025-61729).
//
// With these, the dearest chain that we could make up (P-521) costs 20 ms, against
// 0.2 ms for an honest one (BenchmarkVerifyHostile): crypto/x509 gives up after
// 100 signatures, and so what one signature costs has to be bounded, too.
const (
	maxChain            = 10
	maxCertificateBytes = 16 << 10
	maxRSABits          = 4096
	maxRSAExponent      = 65537
)

// Role is the side of a TLS connection that a certificate is shown for.
type Role int

// The two roles.
const (
	Server Role = iota + 1
	Client
)

func (r Role) String() string {
	switch r {
	case Server:
		return "server"
	case Client:
		return "client"
	}
	return fmt.Sprintf("role %d", int(r))
}

// usage returns the extended key usage that the role needs of leaf.
//
// Where there is an extended key usage, the role's must be in it (X509-SVID
// §4.4). "any" does not count: the standard lists the two it wants, and
// go-spiffe's acceptance of any usage at all is how a code-signing certificate
// becomes a server. An extension that lists nothing allows nothing.
func (r Role) usage(leaf *x509.Certificate) (x509.ExtKeyUsage, error) {
	var want x509.ExtKeyUsage
	switch r {
	case Server:
		want = x509.ExtKeyUsageServerAuth
	case Client:
		want = x509.ExtKeyUsageClientAuth
	default:
		return 0, fmt.Errorf("unknown %v", r)
	}
	if extension(leaf, oidExtKeyUsage) != nil && !slices.Contains(leaf.ExtKeyUsage, want) {
		return 0, leafErrorf("§4.4", "its extended key usage does not allow use as a TLS %v", r)
	}
	return want, nil
}

// maxCause bounds the text of a [VerifyError]'s cause.
const maxCause = 1 << 10

// VerifyError says why a peer's certificates were not believed. It is for our
// log: what the peer gets to see is a TLS alert.
type VerifyError struct {
	ID  ID // what the leaf claims; zero if not even that could be read
	Err error
}

func (e *VerifyError) Error() string {
	// crypto/x509 quotes the peer's names in its errors but does not cut them.
	cause := e.Err.Error()
	if len(cause) > maxCause {
		cause = cause[:maxCause] + "…"
	}
	if e.ID.IsZero() {
		return fmt.Sprintf("verifying a peer's X509-SVID: %s", cause)
	}
	return fmt.Sprintf("verifying the X509-SVID of %s: %s", quote(e.ID.String()), cause)
}

func (e *VerifyError) Unwrap() error { return e.Err }

// Verify checks a peer's certificates, leaf first, as they arrived, and returns
// the ID that they prove (X509-SVID §5). role is the side that the peer is on.
//
// The steps, cheapest first:
//
//  1. at most 10 certificates of at most 16 KiB, RSA keys of at most 4096 bits,
//     at most 100 names in the leaf;
//  2. the leaf is an X509-SVID by itself: no CA, key usage, one URI, a path;
//  3. its extended key usage, if it has any, covers the role;
//  4. the bundle of exactly its own trust domain is there;
//  5. RFC 5280 path validation at now, against that bundle alone.
//
// Name constraints are honoured where Go does so, and never relied upon: Go
// reads a URI constraint as covering subdomains too, and the comparison of
// whole trust domains in step 4 is what keeps domains apart.
//
// The error is a [*VerifyError].
func Verify(certs []*x509.Certificate, role Role, bundles BundleSource, now time.Time) (ID, error) {
	found, err := verify(certs, role, bundles, now)
	return found.id, err
}

// VerifyBoth is [Verify] for both roles, server first. It costs little more than
// for one: a path that is good for both is looked for once.
func VerifyBoth(certs []*x509.Certificate, bundles BundleSource, now time.Time) (ID, error) {
	found, err := verify(certs, Server, bundles, now)
	if err != nil {
		return ID{}, err
	}
	usage, err := Client.usage(certs[0])
	if err == nil && slices.ContainsFunc(found.chains, func(chain []*x509.Certificate) bool { return allows(chain, usage) }) {
		return found.id, nil
	}
	return Verify(certs, Client, bundles, now)
}

// allows reports whether every certificate of a path names a usage, or is not
// restricted: crypto/x509 demands no more of one.
func allows(chain []*x509.Certificate, usage x509.ExtKeyUsage) bool {
	for _, c := range chain {
		restricted := len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0
		if restricted && !slices.Contains(c.ExtKeyUsage, usage) {
			return false
		}
	}
	return true
}

// verified is what a peer's certificates prove, by which bundle, and how.
type verified struct {
	id     ID
	bundle *Bundle
	chains [][]*x509.Certificate // one at least, each from the leaf to an authority
}

func verify(certs []*x509.Certificate, role Role, bundles BundleSource, now time.Time) (verified, error) {
	if err := checkChainCost(certs); err != nil {
		return verified{}, &VerifyError{Err: err}
	}
	return verifyBounded(certs, role, bundles, now)
}

// verifyBounded is verify for certificates that checkChainCost has passed.
func verifyBounded(certs []*x509.Certificate, role Role, bundles BundleSource, now time.Time) (verified, error) {
	leaf := certs[0]
	id, err := leafID(leaf)
	if err != nil {
		return verified{}, &VerifyError{Err: err}
	}
	usage, err := role.usage(leaf)
	if err != nil {
		return verified{}, &VerifyError{ID: id, Err: err}
	}
	bundle, err := bundles.Bundle(id.TrustDomain())
	if err != nil {
		return verified{}, &VerifyError{ID: id, Err: err}
	}
	if bundle == nil {
		return verified{}, &VerifyError{ID: id, Err: &NoBundleError{TrustDomain: id.TrustDomain()}}
	}
	if bundle.td != id.TrustDomain() {
		// A source that answers for another domain would let one domain's
		// authorities vouch for another's workloads.
		return verified{}, &VerifyError{ID: id, Err: fmt.Errorf("the bundle source answered with the bundle of %q", bundle.td)}
	}
	intermediates := x509.NewCertPool()
	for _, c := range certs[1:] {
		intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots:         bundle.pool,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return verified{}, &VerifyError{ID: id, Err: explainPath(leaf, bundle, now, err)}
	}
	return verified{id, bundle, chains}, nil
}

// ClaimedID reads the ID that a leaf claims, and proves nothing: anybody can
// make such a certificate. It is for turning away, before the work of [Verify],
// who would not be let in anyway. Verify either returns the same ID or an error;
// what it demands of a leaf by itself is demanded here too.
func ClaimedID(leaf *x509.Certificate) (ID, error) {
	if err := checkChainCost([]*x509.Certificate{leaf}); err != nil {
		return ID{}, &VerifyError{Err: err}
	}
	id, err := leafID(leaf)
	if err != nil {
		return ID{}, &VerifyError{Err: err}
	}
	return id, nil
}

// checkChainCost bounds what path building will have to work on.
func checkChainCost(certs []*x509.Certificate) error {
	if len(certs) == 0 {
		return errors.New("there is no certificate")
	}
	if len(certs) > maxChain {
		return fmt.Errorf("there are %d certificates; at most %d are looked at", len(certs), maxChain)
	}
	for i, c := range certs {
		if len(c.Raw) > maxCertificateBytes {
			return fmt.Errorf("certificate %d has %d bytes; at most %d are looked at", i+1, len(c.Raw), maxCertificateBytes)
		}
		if key, ok := c.PublicKey.(*rsa.PublicKey); ok && (key.N.BitLen() > maxRSABits || key.E > maxRSAExponent) {
			return fmt.Errorf("certificate %d has an RSA key of %d bits with the exponent %d; at most %d and %d are looked at",
				i+1, key.N.BitLen(), key.E, maxRSABits, maxRSAExponent)
		}
	}
	return nil
}

// explainPath adds to a failed path validation what an operator needs and
// crypto/x509 does not say: both instants of a clock mismatch, and which
// authorities were tried.
func explainPath(leaf *x509.Certificate, b *Bundle, now time.Time, err error) error {
	var unknown x509.UnknownAuthorityError
	switch {
	case now.After(leaf.NotAfter):
		return fmt.Errorf("it ended at %s, %s ago: its agent has not renewed it, or this clock is ahead: %w",
			leaf.NotAfter.UTC().Format(time.RFC3339), now.Sub(leaf.NotAfter).Round(time.Second), err)
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("it begins at %s, in %s: this clock, or the CA's, is wrong: %w",
			leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotBefore.Sub(now).Round(time.Second), err)
	case errors.As(err, &unknown):
		return fmt.Errorf("none of the %d authorities in the bundle of %s (sequence %d) signed its chain (issuer %s): %w",
			len(b.authorities), b.td, b.sequence, quote(leaf.Issuer.String()), err)
	}
	return err
}
