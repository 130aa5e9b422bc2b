package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/meshca/meshca/identity"
)

// Root is a root that can sign. It is immutable and safe for concurrent use.
type Root struct {
	TrustDomain identity.TrustDomain
	Certificate *x509.Certificate
	// Key returns the key that belongs to Certificate. It is called once for each
	// signature, after all else has been judged, so that it can come from a place
	// where it is read only then.
	Key func() (crypto.Signer, error)
	Now func() time.Time
}

// Sign signs an intermediate over the CSR's key. Subject, names and limits are
// ours, whatever the CSR says. Its life ends with the root's.
func (r *Root) Sign(ctx context.Context, req IntermediateRequest) (*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if req.TrustDomain != r.TrustDomain {
		return nil, fmt.Errorf("signing an intermediate for trust domain %q: this root is of %q", req.TrustDomain, r.TrustDomain)
	}
	if req.CSR == nil || req.Lifetime <= 0 {
		return nil, errors.New("signing an intermediate: CSR and Lifetime must both be given")
	}
	if err := CheckKey(req.CSR.PublicKey); err != nil {
		return nil, err
	}
	if err := req.CSR.CheckSignature(); err != nil {
		return nil, fmt.Errorf("signing an intermediate: the CSR is not signed with its own key: %w", err)
	}
	now, from, to := r.Now().Round(0).UTC().Truncate(time.Second), r.Certificate.NotBefore, r.Certificate.NotAfter
	if now.Before(from) || !now.Before(to) {
		return nil, fmt.Errorf("signing an intermediate: this clock shows %s, and the root holds from %s to %s; correct the clock, or make a new root",
			now.Format(time.RFC3339), from.Format(time.RFC3339), to.Format(time.RFC3339))
	}
	template, err := r.template(req, now)
	if err != nil {
		return nil, err
	}
	key, err := r.Key()
	if err != nil {
		return nil, fmt.Errorf("signing an intermediate: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, r.Certificate, req.CSR.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("signing an intermediate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading back an intermediate: %w", err)
	}
	return cert, nil
}

func (r *Root) template(req IntermediateRequest, now time.Time) (*x509.Certificate, error) {
	name, id, err := AuthorityName(r.TrustDomain, RoleIntermediate, req.CSR.PublicKey)
	if err != nil {
		return nil, err
	}
	serial, err := NewSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               name,
		URIs:                  []*url.URL{r.TrustDomain.ID().SPIFFE().URL()},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              now.Add(req.Lifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		SubjectKeyId:          id,
	}
	if t.NotBefore.Before(r.Certificate.NotBefore) {
		t.NotBefore = r.Certificate.NotBefore
	}
	if t.NotAfter.After(r.Certificate.NotAfter) {
		t.NotAfter = r.Certificate.NotAfter
	}
	return t, nil
}
