package files

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority is a CA that an operator has.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

var serials int64

// template is a CA certificate of ten years, as openssl would make it.
func template(cn string) *x509.Certificate {
	serials++
	now := time.Now().Truncate(time.Second)
	id := make([]byte, 20)
	_, _ = rand.Read(id)
	return &x509.Certificate{
		SerialNumber: big.NewInt(serials), Subject: pkix.Name{Organization: []string{"Operator"}, CommonName: cn},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(10 * 365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: id,
	}
}

// newRoot makes a root, changed by what is special about it.
func newRoot(t testing.TB, cn string, changes ...func(*x509.Certificate)) *authority {
	return newAuthority(t, nil, cn, changes...)
}

// below makes an authority that a signs.
func (a *authority) below(t testing.TB, cn string, changes ...func(*x509.Certificate)) *authority {
	return newAuthority(t, a, cn, changes...)
}

func newAuthority(t testing.TB, parent *authority, cn string, changes ...func(*x509.Certificate)) *authority {
	t.Helper()
	key := newKey(t)
	c := template(cn)
	for _, change := range changes {
		change(c)
	}
	if parent == nil {
		parent = &authority{cert: c, key: key}
	}
	return &authority{cert: signed(t, c, parent, key.Public()), key: key}
}

func signed(t testing.TB, c *x509.Certificate, parent *authority, pub crypto.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent.cert, pub, parent.key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	return cert
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return key
}

// pathLen0 is how Istio's recipe makes its intermediate.
func pathLen0(c *x509.Certificate) { c.MaxPathLenZero = true }

// lasting limits a certificate's life.
func lasting(d time.Duration) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.NotAfter = time.Now().Truncate(time.Second).Add(d) }
}

// fileSet are files by their names.
type fileSet map[string][]byte

func (a *authority) keyPEM(t testing.TB) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	check(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// cacerts are a's files as Istio has them: the chain begins with a and ends with the
// root.
func (a *authority) cacerts(t testing.TB, chain []*x509.Certificate, roots ...*x509.Certificate) fileSet {
	t.Helper()
	whole := append([]*x509.Certificate{a.cert}, chain...)
	if !slices.ContainsFunc(whole, roots[0].Equal) {
		whole = append(whole, roots[0])
	}
	return fileSet{
		"ca-cert.pem": identity.EncodePEM(a.cert), "ca-key.pem": a.keyPEM(t),
		"cert-chain.pem": identity.EncodePEM(whole...), "root-cert.pem": identity.EncodePEM(roots...),
	}
}

// tls are a's files as cert-manager has them.
func (a *authority) tls(t testing.TB, chain []*x509.Certificate, roots ...*x509.Certificate) fileSet {
	t.Helper()
	return fileSet{
		"tls.crt": identity.EncodePEM(append([]*x509.Certificate{a.cert}, chain...)...), "tls.key": a.keyPEM(t),
		"ca.crt": identity.EncodePEM(roots...),
	}
}

// put writes files into a directory, one after the other.
func (f fileSet) put(t testing.TB, dir string) {
	t.Helper()
	for name, data := range f {
		check(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
}

// project puts files into a directory as a kubelet does: a new folder, then the link.
func (f fileSet) project(t testing.TB, dir, version string) {
	t.Helper()
	folder := filepath.Join(dir, "..", "unlinked")
	check(t, os.Mkdir(folder, 0o755))
	for name, data := range f {
		check(t, os.WriteFile(filepath.Join(folder, name), data, 0o644))
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			check(t, os.Symlink(filepath.Join(dataLink, name), filepath.Join(dir, name)))
		}
	}
	check(t, os.Rename(folder, filepath.Join(dir, version)))
	old, _ := os.Readlink(filepath.Join(dir, dataLink))
	link := filepath.Join(dir, "..data_tmp")
	check(t, os.Symlink(version, link))
	check(t, os.Rename(link, filepath.Join(dir, dataLink)))
	if old != "" {
		check(t, os.RemoveAll(filepath.Join(dir, old)))
	}
}

func domain(t testing.TB) identity.TrustDomain { return identitytest.TrustDomain(t, "cluster.local") }

// open reads the files in dir.
func open(t testing.TB, dir string, changes ...func(*Config)) *Upstream {
	t.Helper()
	u, err := New(conf(t, dir, changes...))
	check(t, err)
	return u
}

func conf(t testing.TB, dir string, changes ...func(*Config)) Config {
	c := Config{Dir: dir, TrustDomain: domain(t), noWatch: true}
	for _, change := range changes {
		change(&c)
	}
	return c
}

// ask has an intermediate signed over a new key.
func ask(t testing.TB, u *Upstream, lifetime time.Duration) (*ca.Signed, crypto.Signer, error) {
	t.Helper()
	key := newKey(t)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	check(t, err)
	csr, err := x509.ParseCertificateRequest(der)
	check(t, err)
	s, err := u.SignIntermediate(context.Background(), ca.IntermediateRequest{CSR: csr, TrustDomain: domain(t), Lifetime: lifetime})
	return s, key, err
}

// believe signs a leaf below the answer and verifies it by the roots that came along.
func believe(t testing.TB, s *ca.Signed, key crypto.Signer) {
	t.Helper()
	if s.Key != nil {
		key = s.Key
	}
	now := time.Now()
	leafKey := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{identitytest.URL(t, "spiffe://cluster.local/ns/shop/sa/cart")}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, s.Chain[0], leafKey.Public(), key)
	check(t, err)
	leaf, err := x509.ParseCertificate(der)
	check(t, err)
	bundle, err := identity.NewBundle(domain(t), identity.BundleConfig{Sequence: 1, Authorities: s.Roots})
	check(t, err)
	for _, role := range []identity.Role{identity.Server, identity.Client} {
		if _, err := identity.Verify(append([]*x509.Certificate{leaf}, s.Chain...), role, bundle, now); err != nil {
			t.Errorf("as %v: %v", role, err)
		}
	}
}

func equal(a, b []*x509.Certificate) bool {
	return bytes.Equal(identity.EncodePEM(a...), identity.EncodePEM(b...))
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
