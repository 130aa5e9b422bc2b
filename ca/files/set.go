package files

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"slices"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

// leastUse is what must be left of an authority's life for it to be taken: the shortest
// certificate that workloads are given outside of tests.
const leastUse = 5 * time.Minute

// set is an authority that has been judged. It is immutable.
//
// The key lies in memory from when it was read. Read for each signature, it would be
// gone with its file: a Secret that is deleted, or replaced by one that is refused,
// would end the signing that is to go on.
type set struct {
	files names
	key   crypto.Signer
	path  []*x509.Certificate // the given certificate first, up to and with the anchor
	roots []*x509.Certificate // all of the root file, the anchor first
	// limit is the certificate of the path because of whose path length nothing can be
	// signed below the given one; nil if an intermediate can.
	limit *x509.Certificate
	end   *x509.Certificate // of the path, the one that ends first
	notes []string
}

// newSet judges how the parts of a set go together: everything that would have a peer,
// or the authority itself, refuse what is signed with it.
func newSet(m *material, td identity.TrustDomain, now time.Time) (*set, error) {
	if err := m.checkAuthorities(td); err != nil {
		return nil, err
	}
	s := &set{files: m.files, key: m.key}
	var err error
	if s.path, err = m.findPath(now); err != nil {
		return nil, err
	}
	s.order(m.roots)
	if err := s.checkTimes(now); err != nil {
		return nil, err
	}
	if err := s.checkLinks(); err != nil {
		return nil, err
	}
	if s.limit, err = s.limiting(); err != nil {
		return nil, err
	}
	s.note(m, now)
	if err := s.verify(now); err != nil {
		return nil, &Error{File: m.files.cert, Reason: fmt.Sprintf("%s is not believed: %v", name(m.cert), err), Do: "have the CA made anew without what is named here", Err: err}
	}
	return s, nil
}

// checkAuthorities looks at each certificate alone.
func (m *material) checkAuthorities(td identity.TrustDomain) error {
	if len(m.cert.SubjectKeyId) == 0 {
		return &Error{File: m.files.cert, Reason: fmt.Sprintf("%s has no subject key identifier", name(m.cert)), Do: "have it made with one: certificates below it name it"}
	}
	for _, f := range []struct {
		file  string
		certs []*x509.Certificate
	}{{m.files.cert, []*x509.Certificate{m.cert}}, {m.chainFile(), m.chain}, {m.files.roots, m.roots}} {
		for _, c := range f.certs {
			if reason, do := unfit(c, td); reason != "" {
				return &Error{File: f.file, Reason: name(c) + " " + reason, Do: do}
			}
		}
	}
	return nil
}

func (m *material) chainFile() string {
	if m.files.chain != "" {
		return m.files.chain
	}
	return m.files.cert
}

var oidNameConstraints = asn1.ObjectIdentifier{2, 5, 29, 30}

// unfit says why a certificate can be no authority of this trust domain.
func unfit(c *x509.Certificate, td identity.TrustDomain) (reason, do string) {
	switch {
	case !c.BasicConstraintsValid || !c.IsCA:
		return "is not a CA certificate", "give the CA's certificate, not one that it has signed"
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return "may not sign certificates: its key usage lacks keyCertSign", "have it made with that key usage"
	case len(c.Subject.Names) == 0:
		return "has an empty subject, so that nothing can name it as issuer", "have it made with a name"
	case c.SerialNumber.Sign() <= 0:
		return "has no serial number above 0", "have it made with one"
	case slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidNameConstraints) }):
		// rustls refuses every chain that has them, GnuTLS does not look at them, and
		// Go reads them more widely than RFC 5280.
		return "has name constraints, for which some TLS libraries refuse every certificate below", "have it made without them"
	case len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 &&
		// Not even "any usage" is enough: OpenSSL wants them by name.
		!(slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)):
		return "is limited to other extended key usages than serverAuth and clientAuth, both of which workloads need", "have it made with both, or without any"
	}
	for _, u := range c.URIs {
		if u.Scheme == "spiffe" && u.String() != td.ID().String() {
			return fmt.Sprintf("is of %.128q, and this trust domain is %q", u, td), "give the CA of this trust domain, or correct trust_domain"
		}
	}
	return "", ""
}

// order puts the anchor first among the roots: who verifies a chain by the roots then
// finds that one, also where another has the same name and key.
func (s *set) order(roots []*x509.Certificate) {
	s.roots = []*x509.Certificate{s.anchor()}
	for _, r := range roots {
		if !r.Equal(s.anchor()) {
			s.roots = append(s.roots, r)
		}
	}
}

func (s *set) cert() *x509.Certificate   { return s.path[0] }
func (s *set) anchor() *x509.Certificate { return s.path[len(s.path)-1] }

// above is what goes with a certificate that the given one has signed: the given one
// and its chain, without the root.
func (s *set) above() []*x509.Certificate {
	return slices.Clone(s.path[:len(s.path)-1])
}

// fileOf names the file in which a certificate of the path lies.
func (s *set) fileOf(c *x509.Certificate) string {
	switch {
	case c.Equal(s.cert()):
		return s.files.cert
	case c.Equal(s.anchor()):
		return s.files.roots
	case s.files.chain != "":
		return s.files.chain
	}
	return s.files.cert
}

// checkTimes demands that the whole path holds now and for long enough.
func (s *set) checkTimes(now time.Time) error {
	s.end = slices.MinFunc(s.path, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
	for _, c := range s.path {
		switch {
		case now.Before(c.NotBefore):
			return &Error{File: s.fileOf(c), Reason: fmt.Sprintf("%s holds only from %s on, and this clock shows %s", name(c), stamp(c.NotBefore), stamp(now)), Do: "wait, or correct the clock"}
		case !now.Before(c.NotAfter):
			return &Error{File: s.fileOf(c), Reason: fmt.Sprintf("%s expired at %s, and this clock shows %s", name(c), stamp(c.NotAfter), stamp(now)), Do: "put a new one there, which may be of the same key"}
		case c.NotAfter.Sub(now) < leastUse:
			return &Error{File: s.fileOf(c), Reason: fmt.Sprintf("%s ends at %s, in less than %v: no certificate that is of use ends before it", name(c), stamp(c.NotAfter), leastUse), Do: "put a new one there, which may be of the same key"}
		}
	}
	return nil
}

// checkLinks compares the key identifiers by which some verifiers find their way.
func (s *set) checkLinks() error {
	for i, c := range s.path[1:] {
		below := s.path[i]
		// One that names no key, as OpenSSL 1.1 makes it, leads nobody astray.
		if len(c.SubjectKeyId) > 0 && len(below.AuthorityKeyId) > 0 && !bytes.Equal(below.AuthorityKeyId, c.SubjectKeyId) {
			return &Error{
				File:   s.fileOf(below),
				Reason: fmt.Sprintf("%s names %x as its issuer's key, and that of %s is %x", name(below), below.AuthorityKeyId, name(c), c.SubjectKeyId),
				Do:     "have it signed again with authorityKeyIdentifier = keyid",
			}
		}
	}
	return nil
}

// limiting returns the certificate because of whose path length the given one can sign
// leaves only, or nil. As crypto/x509 does, and unlike RFC 5280, it counts certificates
// that are issued under their own name.
func (s *set) limiting() (*x509.Certificate, error) {
	var limit *x509.Certificate
	for i, c := range s.path {
		if c.MaxPathLen < 0 {
			continue
		}
		switch {
		case c.MaxPathLen < i:
			return nil, &Error{File: s.fileOf(c), Reason: fmt.Sprintf("%s has path length %d, and %d CA certificates lie below it", name(c), c.MaxPathLen, i), Do: "have the chain made with a path length that allows for it"}
		case c.MaxPathLen == i && limit == nil:
			limit = c
		}
	}
	if limit != nil && len(s.path) == 1 {
		return nil, &Error{File: s.files.cert, Reason: fmt.Sprintf("%s is a root with path length 0, so that its own key would sign the leaves", name(limit)), Do: "make a root without path length, or an intermediate under it"}
	}
	return limit, nil
}

// note collects what operators should know though nothing is wrong.
func (s *set) note(m *material, now time.Time) {
	if s.limit != nil {
		whose := fmt.Sprintf("%q has path length 0", s.files.cert)
		if !s.limit.Equal(s.cert()) {
			whose = fmt.Sprintf("%s has a path length that ends at %q", name(s.limit), s.files.cert)
		}
		// Reports are cut: what it is about comes first.
		s.notes = append(s.notes, fmt.Sprintf("the replicas sign leaves with the CA's own key, for %s; meshca cannot rotate that key, which lies in %q and in each replica's memory: "+
			"whoever has it can be any workload until %s. Under a CA with path length 1 or more the replicas have keys of their own, which live for days",
			whose, s.files.key, stamp(s.end.NotAfter)))
	}
	if a := s.anchor(); !bytes.Equal(a.RawIssuer, a.RawSubject) {
		s.notes = append(s.notes, fmt.Sprintf("the root %s in %q is not self-signed: programs that use OpenSSL's defaults do not believe it", name(a), s.files.roots))
	}
	for _, r := range s.roots[1:] {
		if !now.Before(r.NotAfter) {
			s.notes = append(s.notes, fmt.Sprintf("root %s in %q expired at %s and can be left out", name(r), s.files.roots, stamp(r.NotAfter)))
		}
	}
	for _, c := range m.chain {
		if !slices.ContainsFunc(s.path, c.Equal) && !slices.ContainsFunc(s.roots, c.Equal) {
			s.notes = append(s.notes, fmt.Sprintf("%s in %q is not on the way to the root and is not used", name(c), m.chainFile()))
		}
	}
}

// verify has crypto/x509 verify the given certificate by the roots, for both roles of
// those below it. It finds what nobody thought of here, such as an extension that is
// critical and that no verifier knows. Nothing is signed for that: the authority proves
// each issuer with a throwaway leaf before it signs for anybody.
func (s *set) verify(now time.Time) error {
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now}
	for _, r := range s.roots {
		opts.Roots.AddCert(r)
	}
	for _, c := range s.above() {
		opts.Intermediates.AddCert(c)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		opts.KeyUsages = []x509.ExtKeyUsage{usage}
		if _, err := s.cert().Verify(opts); err != nil {
			return err
		}
	}
	return nil
}

// sign answers a request.
func (s *set) sign(ctx context.Context, req ca.IntermediateRequest, now time.Time) (*ca.Signed, error) {
	if !now.Before(s.end.NotAfter) {
		return nil, &ExpiredError{File: s.fileOf(s.end), End: s.end.NotAfter}
	}
	signed := &ca.Signed{Chain: s.above(), Roots: slices.Clone(s.roots)}
	if s.limit != nil {
		signed.Key = s.key
		return signed, nil
	}
	// What ends first may lie higher up than the certificate that signs.
	req.Lifetime = min(req.Lifetime, s.end.NotAfter.Sub(now))
	root := ca.Root{
		TrustDomain: req.TrustDomain, Certificate: s.cert(),
		Key: func() (crypto.Signer, error) { return s.key, nil },
		Now: func() time.Time { return now },
	}
	cert, err := root.Sign(ctx, req)
	if err != nil {
		return nil, err
	}
	signed.Chain = append([]*x509.Certificate{cert}, signed.Chain...)
	return signed, nil
}
