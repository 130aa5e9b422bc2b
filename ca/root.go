package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/meshca/meshca/identity"
)

// DefaultRootLifetime is how long a root lives unless said otherwise, and
// LeastRootLifetime the shortest that makes sense.
const (
	DefaultRootLifetime = 10 * 365 * 24 * time.Hour
	LeastRootLifetime   = 24 * time.Hour
)

// RootConfig is what [NewRoot] makes a root from.
type RootConfig struct {
	TrustDomain identity.TrustDomain // required
	Lifetime    time.Duration        // zero means [DefaultRootLifetime]
	Now         func() time.Time     // nil means time.Now
}

// Check returns what is wrong with the configuration.
func (c RootConfig) Check() error {
	switch {
	case c.TrustDomain.IsZero():
		return errors.New("making a root: no trust domain is given")
	case c.Lifetime != 0 && c.Lifetime < LeastRootLifetime:
		return fmt.Errorf("making a root: lifetime %v is below %dh", c.Lifetime, LeastRootLifetime/time.Hour)
	}
	return nil
}

// NewRoot makes a key and its certificate. Nobody has either until they are kept
// somewhere.
func NewRoot(c RootConfig) (*x509.Certificate, crypto.Signer, error) {
	if err := c.Check(); err != nil {
		return nil, nil, err
	}
	if c.Lifetime == 0 {
		c.Lifetime = DefaultRootLifetime
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making the root's key: %w", err)
	}
	name, id, err := AuthorityName(c.TrustDomain, RoleRoot, key.Public())
	if err != nil {
		return nil, nil, err
	}
	serial, err := NewSerial()
	if err != nil {
		return nil, nil, err
	}
	now := c.Now().UTC().Truncate(time.Second)
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               name,
		URIs:                  []*url.URL{c.TrustDomain.ID().SPIFFE().URL()},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              now.Add(c.Lifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          id,
		AuthorityKeyId:        id,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, fmt.Errorf("signing the root: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, err
}

// ParseRootCertificate reads a root's certificate from PEM and holds it against what
// [NewRoot] makes: one certificate, of the trust domain itself, self-signed.
func ParseRootCertificate(data []byte, td identity.TrustDomain) (*x509.Certificate, error) {
	certs, err := identity.ParsePEM(data)
	if err != nil {
		return nil, err
	}
	c, id := certs[0], td.ID().String()
	switch {
	case len(certs) != 1:
		return nil, fmt.Errorf("it holds %d certificates", len(certs))
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, errors.New("it is no CA certificate")
	case len(c.URIs) != 1 || c.URIs[0].String() != id:
		return nil, fmt.Errorf("it is not a certificate of %s", id)
	}
	return c, c.CheckSignatureFrom(c)
}

// EncodeRootKey returns the key as PEM, PKCS#8.
func EncodeRootKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// ParseRootKey reads what [EncodeRootKey] wrote, and demands that it is the key of cert.
func ParseRootKey(data []byte, cert *x509.Certificate) (crypto.Signer, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("it is not one PEM block PRIVATE KEY")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		// The parser's text is about structure, but nothing of a key is printed.
		return nil, errors.New("it is no PKCS#8 key")
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("it is a %T, which cannot sign", parsed)
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(cert.PublicKey) {
		return nil, errors.New("it is not the key of the root certificate beside it")
	}
	return key, nil
}
