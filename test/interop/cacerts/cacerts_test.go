package cacerts

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"net"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/files"
	"github.com/meshca/meshca/ca/server"
	"github.com/meshca/meshca/ca/server/servertest"
	"github.com/meshca/meshca/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// What an Istio agent is given by a CA that runs on an operator's files, in each layout,
// with a CA that signs leaves only, as Istio's recipe makes it, and with one that can
// sign an intermediate.
func TestClientsOfAGivenCA(t *testing.T) {
	recipe, wider := Make(t, 0), Make(t, 1)
	for _, tt := range []struct {
		name    string
		dir     string
		made    string // where the CA was made
		other   string // where one of the same names was made
		between int    // certificates between the leaf and the root
		note    string
	}{
		{"Istio's recipe", recipe, recipe, wider, 1, "has path length 0"},
		{"Istio's recipe as kubernetes.io-tls", TLSLayout(t, recipe), recipe, wider, 1, "has path length 0"},
		{"path length 1", wider, wider, recipe, 2, ""},
		{"path length 1 as kubernetes.io-tls", TLSLayout(t, wider), wider, recipe, 2, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			kit, upstream := New(t, tt.dir)
			rootPEM, givenPEM := read(t, filepath.Join(tt.made, RootFile)), read(t, filepath.Join(tt.made, CertFile))
			r := upstream.Report()
			if r.State != files.StateOK || (len(r.Notes) == 0) != (tt.note == "") || tt.note != "" && !strings.Contains(r.Notes[0], tt.note) {
				t.Errorf("the report is %+v", r)
			}
			address := serve(t, kit)
			key, elements := ask(t, kit, address, rootPEM)

			// As pilot-agent has it: at least two, the leaf first, the roots last, and in
			// all between one certificate each, which is as ztunnel reads them.
			if len(elements) != tt.between+2 {
				t.Fatalf("%d elements; want the leaf, %d, and the roots", len(elements), tt.between)
			}
			var chain []*x509.Certificate
			for i, e := range elements {
				certs, err := identity.ParsePEM([]byte(e))
				must(t, err)
				if len(certs) != 1 || !strings.HasSuffix(e, "-----END CERTIFICATE-----\n") {
					t.Errorf("element %d holds %d certificates, or does not end its line", i, len(certs))
				}
				chain = append(chain, certs[0])
			}
			if last := elements[len(elements)-1]; last != string(identity.EncodePEM(parse(t, rootPEM)...)) {
				t.Errorf("the last element is not the root:\n%s", last)
			}
			if given := elements[len(elements)-2]; given != string(identity.EncodePEM(parse(t, givenPEM)...)) {
				t.Errorf("the one before is not the CA that was given:\n%s", given)
			}
			for i := range chain[1:] {
				must(t, chain[i].CheckSignatureFrom(chain[i+1]))
			}
			verify(t, chain, key, rootPEM, filepath.Join(tt.other, RootFile))
		})
	}
}

// verify shows a chain, with the root at its end, to those that have to believe it, and
// that must not under a stranger, a root of the same name.
func verify(t *testing.T, chain []*x509.Certificate, key crypto.Signer, rootPEM []byte, stranger string) {
	t.Helper()
	const id = "spiffe://cluster.local/ns/shop/sa/cart"
	leaf, between := chain[0], chain[1:len(chain)-1]

	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	opts.Roots.AppendCertsFromPEM(rootPEM)
	for _, c := range between {
		opts.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(opts); err != nil {
		t.Errorf("crypto/x509: %v", err)
	}

	bundle, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString("cluster.local"), rootPEM)
	must(t, err)
	if got, _, err := x509svid.Verify(chain[:len(chain)-1], bundle); err != nil || got.String() != id {
		t.Errorf("go-spiffe: %v, %v", got, err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	if _, err := x509svid.Parse(identity.EncodePEM(chain[:len(chain)-1]...), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})); err != nil {
		t.Errorf("go-spiffe, reading it with its key: %v", err)
	}

	dir := t.TempDir()
	root, rest, one := filepath.Join(dir, "root"), filepath.Join(dir, "between"), filepath.Join(dir, "leaf")
	write(t, root, rootPEM)
	write(t, rest, identity.EncodePEM(between...))
	write(t, one, identity.EncodePEM(leaf))
	for _, purpose := range []string{"sslserver", "sslclient"} {
		openssl(t, "verify", "-x509_strict", "-purpose", purpose, "-CAfile", root, "-untrusted", rest, one)
	}
	if out, err := exec.Command("openssl", "verify", "-CAfile", stranger, "-untrusted", rest, one).CombinedOutput(); err == nil {
		t.Errorf("openssl believes it under another root of the same name: %s", out)
	}
	if _, err := exec.LookPath("certtool"); err == nil {
		all := filepath.Join(dir, "all")
		write(t, all, identity.EncodePEM(chain[:len(chain)-1]...))
		if out, err := exec.Command("certtool", "--verify", "--load-ca-certificate", root, "--infile", all).CombinedOutput(); err != nil {
			t.Errorf("GnuTLS: %v\n%s", err, out)
		}
	}
}

// serve runs the CA's real port until the test ends.
func serve(t *testing.T, kit *catest.Kit) (address string) {
	t.Helper()
	return servertest.Serve(t, server.Config{
		Authority: kit.Authority, Authenticator: kit.Authenticator, Log: slog.New(slog.DiscardHandler),
		Names: ca.ServingNames{DNS: []string{"istiod.istio-system.svc"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}},
	})
}

// ask has a certificate issued as pilot-agent does: RSA 2048, one empty O, its own ID in
// the CSR, over a connection that the root is enough for.
func ask(t *testing.T, kit *catest.Kit, address string, rootPEM []byte) (crypto.Signer, []string) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(rootPEM)
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "istiod.istio-system.svc"})))
	must(t, err)
	defer conn.Close()

	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	id, err := identity.ParseID("spiffe://cluster.local/ns/shop/sa/cart")
	must(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{""}}, URIs: []*url.URL{id.SPIFFE().URL()},
	}, key)
	must(t, err)

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+kit.Token(t, "shop", "cart"), "clusterid", "Kubernetes")
	// The server makes its own certificate when it has begun to listen.
	resp, err := istio.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istio.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), ValidityDuration: 3600,
	}, grpc.WaitForReady(true))
	must(t, err)
	return key, resp.GetCertChain()
}

func parse(t *testing.T, data []byte) []*x509.Certificate {
	t.Helper()
	certs, err := identity.ParsePEM(data)
	must(t, err)
	return certs
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
