package issuing

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"time"
)

// library is what Go's crypto/x509 needs at least to issue a certificate.
type library struct {
	csr    []byte
	issuer *x509.Certificate
	key    *ecdsa.PrivateKey
	id     *url.URL
}

func newLibrary(csr string) (*library, error) {
	block, _ := pem.Decode([]byte(csr))
	if block == nil {
		return nil, errors.New("the CSR is not PEM")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	issuer, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &library{csr: block.Bytes, issuer: issuer, key: key, id: &url.URL{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/bench/sa/app"}}, nil
}

// one parses the CSR, checks its signature, and makes the certificate.
func (l *library) one() error {
	request, err := x509.ParseCertificateRequest(l.csr)
	if err != nil {
		return err
	}
	if err := request.CheckSignature(); err != nil {
		return err
	}
	var serial [16]byte
	_, _ = rand.Read(serial[:])
	serial[0] &= 0x7f
	now := time.Now()
	_, err = x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:]), NotBefore: now.Add(-2 * time.Minute), NotAfter: now.Add(time.Hour),
		URIs: []*url.URL{l.id}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, l.issuer, request.PublicKey, l.key)
	return err
}
