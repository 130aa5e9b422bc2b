package self

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity/identitytest"
)

func csr(t testing.TB, template *x509.CertificateRequest, key crypto.Signer) *x509.CertificateRequest {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	check(t, err)
	r, err := x509.ParseCertificateRequest(der)
	check(t, err)
	return r
}

func TestCSRDoesNotShapeTheIntermediate(t *testing.T) {
	u := reopen(t, newState(t))
	key := identitytest.NewKey(t)
	greedy := csr(t, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "evil", Organization: []string{"Evil"}},
		DNSNames: []string{"evil.test"}, URIs: []*url.URL{identitytest.URL(t, "spiffe://evil.test")},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Value: []byte{0x30, 0x06, 1, 1, 0xff, 2, 1, 9}}},
	}, key)
	signed, err := u.SignIntermediate(t.Context(), ca.IntermediateRequest{CSR: greedy, TrustDomain: td(t), Lifetime: time.Hour})
	check(t, err)
	c := signed.Chain[0]
	if strings.Contains(c.Subject.String(), "vil") || len(c.DNSNames) != 0 || len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://cluster.local" || !c.MaxPathLenZero {
		t.Errorf("subject %q, names %v %v, path length %d", c.Subject, c.DNSNames, c.URIs, c.MaxPathLen)
	}
	if len(signed.Roots) != 1 || !signed.Roots[0].Equal(u.Root()) || signed.Sequence != 1 {
		t.Errorf("roots %v, sequence %d", signed.Roots, signed.Sequence)
	}
}

func TestIntermediateRequestsThatAreRefused(t *testing.T) {
	u := reopen(t, newState(t))
	key := identitytest.NewKey(t)
	good := ca.IntermediateRequest{CSR: csr(t, &x509.CertificateRequest{}, key), TrustDomain: td(t), Lifetime: time.Hour}
	forged := *good.CSR
	forged.PublicKey = identitytest.NewKey(t).Public()
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	check(t, err)
	for name, req := range map[string]ca.IntermediateRequest{
		"another trust domain":      {CSR: good.CSR, TrustDomain: identitytest.TrustDomain(t, "other.test"), Lifetime: time.Hour},
		"not signed with its key":   {CSR: &forged, TrustDomain: td(t), Lifetime: time.Hour},
		"a key of an unwanted kind": {CSR: csr(t, &x509.CertificateRequest{}, p521), TrustDomain: td(t), Lifetime: time.Hour},
		"no CSR":                    {TrustDomain: td(t), Lifetime: time.Hour},
		"no lifetime":               {CSR: good.CSR, TrustDomain: td(t)},
	} {
		if _, err := u.SignIntermediate(t.Context(), req); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
	_, err = u.SignIntermediate(t.Context(), good)
	check(t, err)
}

func TestIntermediateStaysWithinItsRoot(t *testing.T) {
	dir := newState(t)
	root := reopen(t, dir).Root()
	at := func(now time.Time) (*ca.Signed, error) {
		u, err := Open(dir, Config{TrustDomain: td(t), Now: func() time.Time { return now }})
		check(t, err)
		return u.SignIntermediate(t.Context(), ca.IntermediateRequest{
			CSR: csr(t, &x509.CertificateRequest{}, identitytest.NewKey(t)), TrustDomain: td(t), Lifetime: 72 * time.Hour,
		})
	}
	for _, now := range []time.Time{root.NotBefore, root.NotBefore.Add(time.Minute), root.NotAfter.Add(-time.Hour), root.NotAfter.Add(-time.Second)} {
		s, err := at(now)
		check(t, err)
		if c := s.Chain[0]; c.NotBefore.Before(root.NotBefore) || c.NotAfter.After(root.NotAfter) {
			t.Errorf("at %v: from %v to %v", now, c.NotBefore, c.NotAfter)
		}
	}
	for _, now := range []time.Time{root.NotBefore.Add(-time.Second), root.NotAfter, root.NotAfter.Add(time.Hour)} {
		if _, err := at(now); err == nil {
			t.Errorf("at %v, outside of the root's life: signed", now)
		}
	}
}
