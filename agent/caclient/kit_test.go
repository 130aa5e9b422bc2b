package caclient

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity/identitytest"
)

const (
	serverName = "meshca.meshca-system.svc"
	cart       = "spiffe://cluster.local/ns/shop/sa/cart"
	canary     = "eyJhbGciOiJub25lIn0.Y2FuYXJ5.c2VjcmV0"
)

func newCA(t *testing.T, opts ...identitytest.CAOption) *caclienttest.CA {
	return caclienttest.New(t, identitytest.ID(t, cart), opts...)
}

// newClient makes a client for addresses in memory (n) or, with n nil, on
// loopback.
func newClient(t *testing.T, ca *caclienttest.CA, n *caclienttest.Network, addresses ...string) *Client {
	t.Helper()
	conf := Config{
		Addresses:   addresses,
		ServerName:  serverName,
		TrustDomain: ca.TrustDomain,
		AnchorFile:  ca.AnchorFile(),
		Now:         time.Now,
	}
	if n != nil {
		conf.Dial = n.Dial
	}
	c, err := New(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func token(s string) TokenSource { return func() (string, error) { return s, nil } }

func csr(t *testing.T) func(context.Context) ([]byte, error) {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, identitytest.NewKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return func(context.Context) ([]byte, error) { return der, nil }
}

// request asks with the canary token and takes whatever comes.
func request(t *testing.T) SignRequest {
	return SignRequest{Token: token(canary), CSR: csr(t), Accept: func(*Signed) error { return nil }}
}

func loopback(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func writeFile(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
