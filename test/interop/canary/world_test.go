package canary

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

const issuerURL = "https://tokens.test"

// world is a CA, an agent, and the secrets that go between them.
type world struct {
	vault
	dir       string
	state     string
	issuer    *tokenissuer.Issuer
	processes []*process

	ca, agent      *process
	caPort, caOps  string // host:port
	agentOps       string
	socket         string
	auditLog       string
	anchor, tokens string // file, folder
}

// newWorld starts both programs and returns when the agent has its SVID.
func newWorld(t testing.TB) *world {
	t.Helper()
	// The paths of sockets are short.
	dir, err := os.MkdirTemp("", "w")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{dir: dir, state: filepath.Join(dir, "state"), auditLog: filepath.Join(dir, "audit.jsonl"), tokens: filepath.Join(dir, "tokens")}
	must(t, os.Mkdir(w.tokens, 0o700))
	w.anchor = filepath.Join(w.state, "root.pem")
	w.issuer, err = tokenissuer.New(tokenissuer.Config{URL: issuerURL})
	must(t, err)
	config := w.write(t, "meshca.yaml", fmt.Sprintf(
		"token_issuers:\n- issuer: %s\n  jwks_file: %s\nleaf: {lifetime: 12s, floor: 10s}\n", issuerURL, w.write(t, "jwks.json", string(w.issuer.JWKS()))))
	out, err := exec.Command(programs.path(t, "meshca"), "init", "--state-dir", w.state).CombinedOutput()
	if err != nil {
		t.Fatalf("meshca init: %v\n%s", err, out)
	}
	w.ca = w.launch(t, "ca", "meshca", "serve", "--log-level", "debug", "--state-dir", w.state, "--config", config, "--test-lifetimes",
		"--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--audit-log", w.auditLog, "--pprof")
	line := w.ca.serving(t)
	w.caPort, w.caOps = line["listen"].(string), line["ops"].(string)
	ready(t, "the CA", w.caOps)

	w.socket = filepath.Join(dir, "agent.sock")
	w.agent = w.launchAgent(t, "agent", w.tokenFile(t, "good", w.good(t)), w.anchor, w.caPort, "--socket", w.socket, "--pprof")
	w.agentOps = w.agent.serving(t)["ops"].(string)
	ready(t, "the agent", w.agentOps)
	return w
}

func (w *world) launchAgent(t testing.TB, name, tokenFile, anchor, ca string, more ...string) *process {
	t.Helper()
	return w.launch(t, name, "agent", append([]string{
		"--log-level", "debug", "--token-file", tokenFile, "--trust-anchor", anchor, "--ca", ca, "--ops-listen", "127.0.0.1:0",
	}, more...)...)
}

func (w *world) write(t testing.TB, name, content string) (path string) {
	t.Helper()
	path = filepath.Join(w.dir, name)
	must(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

func (w *world) tokenFile(t testing.TB, name, content string) string {
	t.Helper()
	return w.write(t, filepath.Join("tokens", name), content)
}

func claims() tokenissuer.Claims {
	return tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: "cart", PodName: "cart-0", PodUID: "7f9c1e2a-4f0e-4c3e-9d55-0a1b2c3d4e5f",
		NodeName: "node-1", NodeUID: "1b4e28ba-2fa1-11d2-883f-0016d3cca427", Audience: []string{"meshca"}, Lifetime: time.Hour,
	}
}

// issue makes a token and remembers it.
func (w *world) issue(t testing.TB, what string, change func(*tokenissuer.Claims)) string {
	t.Helper()
	c := claims()
	if change != nil {
		change(&c)
	}
	raw, err := w.issuer.Issue(c)
	must(t, err)
	return w.token(what, raw)
}

func (w *world) good(t testing.TB) string {
	t.Helper()
	return w.issue(t, "a good token", nil)
}

func newKeyDER(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return der
}

// newKeyPEM makes a key and remembers it.
func (w *world) newKeyPEM(t testing.TB, what string) string {
	t.Helper()
	der := newKeyDER(t)
	w.key(t, what, der)
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func newCSR(t testing.TB, change func(*x509.CertificateRequest)) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.CertificateRequest{}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	must(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// dialCA opens a connection to the CA's port, verifying it.
func (w *world) dialCA(t testing.TB, certificates ...tls.Certificate) *grpc.ClientConn {
	t.Helper()
	anchor, err := os.ReadFile(w.anchor)
	must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(anchor)
	c := &tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: tls.VersionTLS13, Certificates: certificates}
	return dial(t, "passthrough:"+w.caPort, credentials.NewTLS(c))
}

func dial(t testing.TB, target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithDisableServiceConfig(), grpc.WithNoProxy())
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (w *world) dialSocket(t testing.TB) *grpc.ClientConn {
	t.Helper()
	return dial(t, "unix:"+w.socket, insecure.NewCredentials())
}

// create asks the CA for a certificate with the given authorization values.
func create(t testing.TB, conn *grpc.ClientConn, csr string, authorization ...string) (*istio.IstioCertificateResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, a := range authorization {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", a)
	}
	return istio.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istio.IstioCertificateRequest{Csr: csr})
}

// keysFromSocket reads SVIDs until it has had as many different ones as asked
// for, and remembers their keys. The last one is returned.
func (w *world) keysFromSocket(t testing.TB, svids int) *workload.X509SVID {
	t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), patience)
	defer cancel()
	stream, err := workload.NewSpiffeWorkloadAPIClient(w.dialSocket(t)).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	must(t, err)
	before := w.keys
	for {
		message, err := stream.Recv()
		must(t, err)
		svid := message.GetSvids()[0]
		w.key(t, "the key of "+svid.GetSpiffeId(), svid.GetX509SvidKey())
		if w.keys-before >= svids {
			return svid
		}
	}
}

// otherRoot is the certificate of a root that signed nothing here.
func otherRoot(t testing.TB) []byte {
	t.Helper()
	td, err := identity.ParseTrustDomain("cluster.local")
	must(t, err)
	return identity.EncodePEM(identitytest.NewCA(t, td).Root.Certificate)
}
