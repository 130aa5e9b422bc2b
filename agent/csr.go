package agent

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
)

// keyRequest is a private key with the CSR for it.
type keyRequest struct {
	key crypto.Signer
	csr []byte // DER
	err error
}

// newKeyRequest makes a key and a CSR that asks for nothing: who we are is for
// the CA to read from the token.
func newKeyRequest(k KeyType) keyRequest {
	key, err := k.generate()
	if err != nil {
		return keyRequest{err: err}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return keyRequest{key: key, csr: csr, err: err}
}

// pendingKey is a keyRequest in the making, so that the connection to the CA
// can be opened meanwhile: an RSA key takes longer than the handshake.
type pendingKey struct {
	done   chan struct{}
	result keyRequest // valid once done is closed
}

func startKey(k KeyType) *pendingKey {
	p := &pendingKey{done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.result = newKeyRequest(k)
	}()
	return p
}

// csr returns the request when it is ready.
func (p *pendingKey) csr(ctx context.Context) ([]byte, error) {
	select {
	case <-p.done:
		return p.result.csr, p.result.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
