package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/meshca/meshca/identity"
)

// Upstream is the authority above ours: it signs our intermediate and says
// which roots to believe. Nothing that it answers is believed before
// [Authority.Run] has checked it.
type Upstream interface {
	SignIntermediate(ctx context.Context, req IntermediateRequest) (*Signed, error)
}

// Changer is an [Upstream] whose roots or whose signing root change without us, as
// one does that several replicas share. [Authority.Run] asks it anew when it says so,
// and not only at half of an intermediate's life.
type Changer interface {
	// Changed returns a channel that is closed when the answer to a request becomes
	// another one than at the time of the call.
	Changed() <-chan struct{}
}

// Reporter is an [Upstream] that can tell operators how it is. Report is called often
// and must answer at once.
type Reporter interface{ Report() Report }

// Report says how an upstream is, for people and for metrics.
type Report struct {
	Kind  string // "files", "vault", …
	State string // one word of the kind's own closed set; "ok" when all is well
	// Away says that a new intermediate could not be had now: a replica that was
	// restarted would not sign.
	Away   bool
	Detail string // what is wrong and what to do; empty when all is well
	// Next is what the upstream will do by itself at NextAt, such as "renew the
	// token"; empty if there is nothing.
	Next   string
	NextAt time.Time
	Notes  []string // what operators should know though nothing is wrong
}

// RootKeeper keeps which roots the consumers of a bundle were told of, across
// restarts and replicas. It is for an [Upstream] that counts no versions itself, such
// as an operator's files or another program.
type RootKeeper interface {
	// Agree has all roots in the bundle, and returns the bundle that is in force
	// then. anchor is the one of them that the new intermediate's chain ends in. An
	// error means that the chain must not be used: its anchor, say, is one that not
	// everybody trusts yet.
	Agree(ctx context.Context, anchor *x509.Certificate, roots []*x509.Certificate) (*identity.Bundle, error)
	// Bundle returns the bundle in force, nil before one is known, and a channel
	// that is closed when there is another.
	Bundle() (*identity.Bundle, <-chan struct{})
}

// IntermediateRequest is what an upstream is asked to sign: a CA certificate
// with the CSR's subject and key, the trust domain's own SPIFFE ID as its only
// name, path length 0, key usage keyCertSign and cRLSign.
type IntermediateRequest struct {
	CSR         *x509.CertificateRequest
	TrustDomain identity.TrustDomain
	Lifetime    time.Duration // may be shortened to the signing authority's end
}

// Signed is an upstream's answer.
type Signed struct {
	Chain []*x509.Certificate // the new intermediate first, then up to but without a root
	Roots []*x509.Certificate // all roots to believe, the chain's among them
	// Sequence is the version of Roots: who changes them raises it, also across
	// restarts, for consumers refuse a bundle with a lower one. Zero means that the
	// upstream counts none; a [RootKeeper] does then.
	Sequence uint64
	// Key is set by an upstream whose CA may have no intermediate below it: then
	// nothing was signed, Chain begins with that CA's own certificate, and the
	// authority signs leaves with its key.
	Key crypto.Signer
}

var (
	oidSubjectAltName  = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidNameConstraints = asn1.ObjectIdentifier{2, 5, 29, 30}
)

// checkSigned holds an upstream's answer against what was asked for, and returns
// the path from the intermediate up to and with one of the roots. An
// authority above that is careless or worse shows here, not in a peer's refusal
// hours later: Vault, for one, signs an intermediate that outlives its issuer
// and only warns.
func checkSigned(s *Signed, td identity.TrustDomain, pub crypto.PublicKey, now time.Time) (path []*x509.Certificate, err error) {
	if err := s.complete(); err != nil {
		return nil, err
	}
	c := s.Chain[0]
	if err := checkAuthority(c, pub); err != nil {
		return nil, err
	}
	if s.Key == nil {
		if err := checkIntermediate(c, td); err != nil {
			return nil, err
		}
	} else if err := CheckKey(pub); err != nil {
		return nil, fmt.Errorf("the upstream's own key: %w", err)
	}
	if path, err = checkPath(s); err != nil {
		return nil, err
	}
	if now.Before(c.NotBefore) {
		return nil, &MismatchError{Field: "beginning of the intermediate", Want: "at most " + stamp(now), Got: stamp(c.NotBefore)}
	}
	if end := endOf(path); !now.Before(end) {
		return nil, &MismatchError{Field: "end of the intermediate", Want: "after " + stamp(now), Got: stamp(end)}
	}
	return path, nil
}

// endOf is when the first certificate of a path ends.
func endOf(path []*x509.Certificate) time.Time {
	return slices.MinFunc(path, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
}

// complete refuses an answer in which something is missing.
func (s *Signed) complete() error {
	switch {
	case s == nil || len(s.Chain) == 0 || slices.Contains(s.Chain, nil):
		return &MismatchError{Field: "certificates in the chain", Want: "at least one, none empty", Got: "none, or an empty one"}
	case len(s.Roots) == 0 || slices.Contains(s.Roots, nil):
		return &MismatchError{Field: "roots", Want: "at least one, none empty", Got: "none, or an empty one"}
	}
	return nil
}

// checkAuthority looks at what any certificate must have that leaves are signed under.
func checkAuthority(c *x509.Certificate, pub crypto.PublicKey) error {
	key, ok := pub.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !key.Equal(c.PublicKey) {
		return &MismatchError{Field: "public key", Want: fingerprint(pub), Got: fingerprint(c.PublicKey)}
	}
	if !c.BasicConstraintsValid || !c.IsCA {
		return &MismatchError{Field: "CA bit", Want: "true", Got: "false"}
	}
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return &MismatchError{Field: "key usage (bits)", Want: fmt.Sprintf("%09b at least", x509.KeyUsageCertSign), Got: fmt.Sprintf("%09b", c.KeyUsage)}
	}
	if c.SerialNumber.Sign() <= 0 {
		return &MismatchError{Field: "serial number", Want: "above 0", Got: c.SerialNumber.String()}
	}
	if len(c.SubjectKeyId) == 0 {
		return &MismatchError{Field: "subject key identifier", Want: "any", Got: "none"}
	}
	return nil
}

// checkIntermediate looks at a certificate that was signed for us. One that its
// owner made and gave to us is as he wanted it.
func checkIntermediate(c *x509.Certificate, td identity.TrustDomain) error {
	if c.MaxPathLen != 0 || !c.MaxPathLenZero {
		got := fmt.Sprint(c.MaxPathLen)
		if c.MaxPathLen < 0 {
			got = "without limit"
		}
		return &MismatchError{Field: "path length", Want: "0", Got: got}
	}
	const allowed = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	if c.KeyUsage&^allowed != 0 {
		return &MismatchError{Field: "key usage (bits)", Want: fmt.Sprintf("%09b", allowed), Got: fmt.Sprintf("%09b", c.KeyUsage)}
	}
	return checkNames(c, td)
}

// checkNames demands that the SPIFFE ID of the trust domain is the only name,
// by the bytes of the extension: crypto/x509 does not show names of all kinds.
// An empty subject would leave path building by name without a name.
func checkNames(c *x509.Certificate, td identity.TrustDomain) error {
	if len(c.Subject.Names) == 0 {
		return &MismatchError{Field: "subject", Want: "a name", Got: ""}
	}
	id := td.ID().String()
	want, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(id)}})
	if err != nil {
		return fmt.Errorf("encoding %s as a name: %w", id, err)
	}
	for _, e := range c.Extensions {
		if e.Id.Equal(oidSubjectAltName) {
			if !bytes.Equal(e.Value, want) {
				return &MismatchError{Field: "subject alternative name", Want: "URI " + id, Got: describeNames(c, e.Value)}
			}
			return nil
		}
	}
	return &MismatchError{Field: "subject alternative name", Want: "URI " + id, Got: "none"}
}

func describeNames(c *x509.Certificate, raw []byte) string {
	return fmt.Sprintf("URI %s, DNS %s, IP %s, e-mail %s (DER %x)", c.URIs, c.DNSNames, c.IPAddresses, c.EmailAddresses, raw)
}

// checkPath follows the chain by signatures up to one of the roots, and returns it
// with that root.
func checkPath(s *Signed) (path []*x509.Certificate, err error) {
	path = slices.Clone(s.Chain)
	last := path[len(path)-1]
	i := slices.IndexFunc(s.Roots, func(r *x509.Certificate) bool { return last.CheckSignatureFrom(r) == nil })
	if i < 0 {
		return nil, &MismatchError{Field: "issuer of the chain", Want: "one of " + fmt.Sprint(names(s.Roots)), Got: last.Issuer.String()}
	}
	path = append(path, s.Roots[i])
	for i, c := range path {
		if slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidNameConstraints) }) {
			// rustls refuses every chain that has them, GnuTLS does not look at
			// them, and Go reads them more widely than RFC 5280.
			return nil, &MismatchError{Field: "name constraints of " + c.Subject.String(), Want: "none", Got: "some"}
		}
		if i == 0 {
			continue
		}
		below := path[i-1]
		if err := below.CheckSignatureFrom(c); err != nil {
			return nil, &MismatchError{Field: "issuer of " + below.Subject.String(), Want: c.Subject.String(), Got: err.Error()}
		}
		// What others have made may lack the identifier, as OpenSSL 1.1 makes it; then
		// it leads nobody to another certificate.
		foreign := i > 1 || s.Key != nil
		if len(c.SubjectKeyId) > 0 && !(foreign && len(below.AuthorityKeyId) == 0) && !bytes.Equal(below.AuthorityKeyId, c.SubjectKeyId) {
			return nil, &MismatchError{Field: "authority key identifier of " + below.Subject.String(), Want: hex.EncodeToString(c.SubjectKeyId), Got: hex.EncodeToString(below.AuthorityKeyId)}
		}
		if s.Key == nil && path[0].NotAfter.After(c.NotAfter) {
			return nil, &MismatchError{Field: "end of the intermediate", Want: "at most " + stamp(c.NotAfter) + ", the end of " + c.Subject.String(), Got: stamp(path[0].NotAfter)}
		}
		if i < len(path)-1 && slices.ContainsFunc(s.Roots, c.Equal) {
			return nil, &MismatchError{Field: "certificate of the chain", Want: "no root", Got: c.Subject.String()}
		}
	}
	return path, nil
}

func names(certs []*x509.Certificate) []string {
	var out []string
	for _, c := range certs {
		out = append(out, c.Subject.String())
	}
	return out
}

func fingerprint(pub crypto.PublicKey) string {
	k, err := newPublicKey(pub)
	if err != nil {
		return fmt.Sprintf("%T", pub)
	}
	return k.fingerprint
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
