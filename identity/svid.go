package identity

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// SVID is an X509-SVID with its private key: the leaf, the intermediates up to
// but without a root, and the key. It is immutable; one value may be shared by
// any number of goroutines.
type SVID struct {
	id    ID
	chain []*x509.Certificate // leaf first
	key   crypto.Signer
	tls   tls.Certificate
}

// NewSVID checks that chain[0] is a proper leaf (X509-SVID §2–§4, both
// extended key usages where there are any), that each further certificate is a
// CA that issued the one before it, that [Verify] would look at a chain of this
// size, and that key is the leaf's. It does not check who is to be believed:
// that is [Verify]'s.
//
// The chain is kept, not copied; the caller must not change it afterwards.
func NewSVID(chain []*x509.Certificate, key crypto.Signer) (*SVID, error) {
	if err := checkChainCost(chain); err != nil {
		return nil, fmt.Errorf("SVID: %w", err)
	}
	if key == nil {
		return nil, errors.New("SVID without a private key")
	}
	leaf := chain[0]
	id, err := leafID(leaf)
	if err != nil {
		return nil, fmt.Errorf("SVID: %w", err)
	}
	for _, role := range []Role{Server, Client} {
		if _, err := role.usage(leaf); err != nil {
			return nil, fmt.Errorf("SVID for %s: %w", id, err)
		}
	}
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("SVID for %s: the private key does not belong to the certificate", id)
	}
	raw := make([][]byte, len(chain))
	for i, c := range chain {
		raw[i] = c.Raw
		if i == 0 {
			continue
		}
		if err := checkIssued(c, chain[i-1]); err != nil {
			return nil, fmt.Errorf("SVID for %s: certificate %d of the chain: %w", id, i+1, err)
		}
	}
	return &SVID{
		id: id, chain: chain, key: key,
		tls: tls.Certificate{Certificate: raw, PrivateKey: key, Leaf: leaf},
	}, nil
}

// checkIssued holds that peers will find issuer by name and by signature.
func checkIssued(issuer, child *x509.Certificate) error {
	if err := checkAuthority(issuer); err != nil {
		return err
	}
	if !bytes.Equal(issuer.RawSubject, child.RawIssuer) {
		return fmt.Errorf("its subject is %s, but the one before it was issued by %s",
			quote(issuer.Subject.String()), quote(child.Issuer.String()))
	}
	if err := child.CheckSignatureFrom(issuer); err != nil {
		return fmt.Errorf("it did not sign the one before it: %w", err)
	}
	return nil
}

// Format prints the ID and the serial number, whatever the verb: what fmt makes
// of a private key by itself would put an Ed25519 key's bytes into a log. It is
// a method of the value, so that fmt finds it behind *s as well.
func (s SVID) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "X509-SVID of %s, serial %s", s.id, s.Serial())
}

// ID returns the SPIFFE ID that the leaf carries.
func (s *SVID) ID() ID { return s.id }

// Certificates returns the chain, leaf first. The caller must not change it.
func (s *SVID) Certificates() []*x509.Certificate { return s.chain }

// Leaf returns the leaf certificate. The caller must not change it.
func (s *SVID) Leaf() *x509.Certificate { return s.chain[0] }

// PrivateKey returns the leaf's key.
func (s *SVID) PrivateKey() crypto.Signer { return s.key }

// NotAfter returns the instant at which the first certificate of the chain
// ends; from then on no peer accepts the SVID.
func (s *SVID) NotAfter() time.Time {
	end := s.chain[0].NotAfter
	for _, c := range s.chain[1:] {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// Serial returns the leaf's serial number in lower-case hex, as it stands in
// logs and audit records.
func (s *SVID) Serial() string { return SerialString(s.chain[0]) }

// SerialString returns a certificate's serial number in lower-case hex.
func SerialString(c *x509.Certificate) string { return fmt.Sprintf("%x", c.SerialNumber) }

// MarshalChain returns the chain as concatenated DER, leaf first: the form of
// the Workload API (SPIFFE_Workload_API §5.2.1).
func (s *SVID) MarshalChain() []byte {
	var der []byte
	for _, c := range s.chain {
		der = append(der, c.Raw...)
	}
	return der
}

// MarshalKey returns the private key as unencrypted PKCS#8 DER. It fails for a
// key that lives in hardware.
func (s *SVID) MarshalKey() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(s.key)
	if err != nil {
		return nil, fmt.Errorf("encoding the private key of %s: %w", s.id, err)
	}
	return der, nil
}
