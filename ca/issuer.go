package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/meshca/meshca/identity"
)

// issuer is an intermediate with its key and all that signing needs of it. It
// is immutable: the signing path takes one by an atomic load and is then
// untouched by a renewal.
type issuer struct {
	chain   []*x509.Certificate // the intermediate first, without a root
	key     crypto.Signer       // in this process's memory only, unless it was given
	given   bool                // the upstream gave its own certificate and key
	bundle  *identity.Bundle
	id      string    // key identifier, hex
	began   time.Time // when it was activated, wall clock
	begin   time.Time // NotBefore
	end     time.Time // the earliest NotAfter up to the root
	renewAt time.Time // half of its life
}

func (i *issuer) cert() *x509.Certificate { return i.chain[0] }

// newIssuer makes a key, has the upstream sign it, and checks all that comes
// back. What it returns has signed nothing yet; see [Authority.prove].
func (a *Authority) newIssuer(ctx context.Context) (*issuer, error) {
	key, err := a.newKey()
	if err != nil {
		return nil, fmt.Errorf("making the intermediate's key: %w", err)
	}
	csr, err := intermediateCSR(a.td, key)
	if err != nil {
		return nil, err
	}
	signed, err := a.askUpstream(ctx, csr)
	if err != nil {
		return nil, err
	}
	given := signed.Key != nil
	if given {
		key = signed.Key
	}
	now := a.now()
	path, err := checkSigned(signed, a.td, key.Public(), now)
	if err != nil {
		return nil, err
	}
	c, end := signed.Chain[0], endOf(path)
	if old := a.active.Load(); !given && old != nil && old.cert().SerialNumber.Cmp(c.SerialNumber) == 0 {
		return nil, &MismatchError{Field: "serial number", Want: "a new one", Got: identity.SerialString(c)}
	}
	bundle, err := a.nextBundle(ctx, signed, path[len(path)-1])
	if err != nil {
		return nil, err
	}
	return &issuer{
		chain: signed.Chain, key: key, given: given, bundle: bundle,
		id:    hex.EncodeToString(c.SubjectKeyId),
		began: now, begin: c.NotBefore, end: end,
		renewAt: now.Add(end.Sub(now) / 2),
	}, nil
}

// same reports whether i is o, asked for again: a certificate that was given stays
// the same until its owner gives another.
func (i *issuer) same(o *issuer) bool {
	return o != nil && i.given && o.given && slices.EqualFunc(i.chain, o.chain, (*x509.Certificate).Equal)
}

func newP256() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// intermediateCSR asks for exactly what the profile of our CA certificates has;
// an upstream that copies from CSRs then makes it, and one that does not is
// told the same in the request.
func intermediateCSR(td identity.TrustDomain, key crypto.Signer) (*x509.CertificateRequest, error) {
	name, _, err := AuthorityName(td, RoleIntermediate, key.Public())
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: name,
		URIs:    []*url.URL{td.ID().SPIFFE().URL()},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("making the CSR for an intermediate: %w", err)
	}
	return x509.ParseCertificateRequest(der)
}

// askUpstream has the CSR signed, with a record before and one after.
func (a *Authority) askUpstream(ctx context.Context, csr *x509.CertificateRequest) (*Signed, error) {
	event := Event{
		Kind: KindIntermediate, SPIFFEID: a.td.ID().String(),
		Key: fingerprint(csr.PublicKey), Lifetime: a.intermediateLifetime,
	}
	if err := a.record(ctx, Intent, event); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	signed, err := a.upstream.SignIntermediate(ctx, IntermediateRequest{
		CSR: csr, TrustDomain: a.td, Lifetime: a.intermediateLifetime,
	})
	if err == nil {
		err = signed.complete()
	}
	if err != nil {
		err = fmt.Errorf("having an intermediate signed: %w", err)
		event.Err = err
		if rerr := a.record(ctx, Failed, event); rerr != nil {
			a.log.Error("audit", "error", rerr)
		}
		return nil, err
	}
	if signed.Key != nil {
		event.Key = fingerprint(signed.Chain[0].PublicKey)
	}
	event.Serial = identity.SerialString(signed.Chain[0])
	event.NotAfter = signed.Chain[0].NotAfter
	if err := a.record(ctx, Done, event); err != nil {
		return nil, err
	}
	return signed, nil
}

// nextBundle makes the bundle of an upstream's roots, among which is the anchor of
// the chain.
func (a *Authority) nextBundle(ctx context.Context, s *Signed, anchor *x509.Certificate) (*identity.Bundle, error) {
	if s.Sequence != 0 {
		b, err := identity.NewBundle(a.td, identity.BundleConfig{Sequence: s.Sequence, Authorities: s.Roots})
		if err != nil {
			return nil, err
		}
		return a.succeeding(b)
	}
	if a.roots == nil {
		return nil, errors.New("the upstream counts no versions of its roots, and nothing is configured that does")
	}
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	b, err := a.roots.Agree(ctx, anchor, s.Roots)
	if err != nil {
		return nil, fmt.Errorf("agreeing on the roots: %w", err)
	}
	if !slices.ContainsFunc(b.Authorities(), anchor.Equal) {
		return nil, &MismatchError{Field: "bundle that was agreed on", Want: "with " + anchor.Subject.String(), Got: fmt.Sprint(names(b.Authorities()))}
	}
	return a.succeeding(b)
}

// succeeding returns b, or the bundle in force if that is the same. Roots that
// change without a higher sequence, or a sequence that falls, would be refused by
// every consumer; they are refused here first.
func (a *Authority) succeeding(b *identity.Bundle) (*identity.Bundle, error) {
	old, _ := a.Bundle()
	switch {
	case old == nil || b.Sequence() > old.Sequence():
		return b, nil
	case b.Sequence() < old.Sequence():
		return nil, &MismatchError{Field: "sequence of the roots", Want: fmt.Sprintf("at least %d", old.Sequence()), Got: fmt.Sprint(b.Sequence())}
	case !b.Equal(old):
		return nil, &MismatchError{Field: "roots under sequence " + fmt.Sprint(b.Sequence()), Want: fmt.Sprint(names(old.Authorities())), Got: fmt.Sprint(names(b.Authorities()))}
	}
	return old, nil
}

// prove signs a throwaway SVID with an issuer and verifies it as a peer would:
// by our verifier in both roles, and by crypto/x509 alone. An issuer that no
// peer would believe is found before it has signed for anybody.
func (a *Authority) prove(ctx context.Context, is *issuer) error {
	id, err := identity.ParseID(a.td.ID().String() + "/meshca/proof")
	if err != nil {
		return err
	}
	key, err := newP256()
	if err != nil {
		return err
	}
	pub, err := newPublicKey(key.Public())
	if err != nil {
		return err
	}
	chain, err := a.sign(ctx, is, order{kind: KindProof, id: id, pub: pub, lifetime: a.leaf.Floor})
	if err != nil {
		return fmt.Errorf("signing a throwaway SVID: %w", err)
	}
	return verifyProof(chain, id, is.bundle, a.now())
}

func verifyProof(chain []*x509.Certificate, id identity.ID, bundle *identity.Bundle, now time.Time) error {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range bundle.Authorities() {
		roots.AddCert(r)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	for role, usage := range map[identity.Role]x509.ExtKeyUsage{
		identity.Server: x509.ExtKeyUsageServerAuth,
		identity.Client: x509.ExtKeyUsageClientAuth,
	} {
		got, err := identity.Verify(chain, role, bundle, now)
		if err != nil {
			return fmt.Errorf("a throwaway SVID does not verify as %v: %w", role, err)
		}
		if got != id {
			return &MismatchError{Field: "SPIFFE ID of a throwaway SVID", Want: id.String(), Got: got.String()}
		}
		if _, err := chain[0].Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
		}); err != nil {
			return fmt.Errorf("a throwaway SVID does not verify by crypto/x509 as %v: %w", role, err)
		}
	}
	return nil
}
