package vault

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

// fake gives answers that a real Vault cannot be brought to give, and gives them
// inside a synctest bubble, where six hours take no time. What a real one does is
// tested with a real one, in test/interop/vault. It is a transport: nothing listens.
type fake struct {
	t    *testing.T
	root *signer

	mu       sync.Mutex
	health   string // JSON
	tokens   map[string]time.Time
	renewals int // how many each token may have
	life     time.Duration
	denied   bool // the policy does not allow signing
	hang     bool
	count    map[string]int                          // requests by path
	hosts    map[string]int                          // and by host
	template func(*x509.Certificate)                 // changes what is signed
	pub      func(crypto.PublicKey) crypto.PublicKey // changes over what
	by       *signer                                 // signs in the root's place
	answer   func(map[string]any)                    // changes the answer to a request for a signature
	respond  func(string) *fakeAnswer                // takes a path's answer over, unless it returns nil
	issuers  map[string]map[string]any
	serial   int64
}

type fakeAnswer struct {
	status int
	header http.Header
	body   string
	err    error
}

const healthy = `{"initialized":true,"sealed":false,"standby":false}`

type signer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newFake(t *testing.T) *fake {
	f := &fake{
		t: t, root: newSigner(t, "root", nil, 10*365*24*time.Hour), health: healthy,
		tokens: make(map[string]time.Time), renewals: 1000, life: time.Hour,
		count: make(map[string]int), hosts: make(map[string]int), issuers: make(map[string]map[string]any),
	}
	f.issuers["meshca"] = map[string]any{"issuer_id": "one", "issuer_name": "meshca", "certificate": encode(f.root.cert)}
	f.issuers["default"] = f.issuers["meshca"]
	return f
}

// newSigner makes a CA, self-signed without an issuer.
func newSigner(t *testing.T, name string, by *signer, life time.Duration) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	s := &signer{key: key}
	if by == nil {
		by = &signer{cert: template, key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, key.Public(), by.key)
	check(t, err)
	s.cert, err = x509.ParseCertificate(der)
	check(t, err)
	return s
}

func encode(c *x509.Certificate) string {
	return strings.TrimSpace(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})))
}

// set changes the fake under its lock.
func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fake) asked(path string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count[path]
}

const (
	loginPath  = "auth/approle/login"
	signPath   = "pki/issuer/meshca/sign-intermediate"
	lookupPath = "auth/token/lookup-self"
	renewPath  = "auth/token/renew-self"
)

func (f *fake) RoundTrip(r *http.Request) (*http.Response, error) {
	var body map[string]any
	if r.Body != nil {
		_ = json.NewDecoder(r.Body).Decode(&body)
	}
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	token := r.Header.Get("X-Vault-Token")
	f.mu.Lock()
	f.count[path]++
	f.hosts[r.URL.Host]++
	hang := f.hang
	f.mu.Unlock()
	if hang {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.respond != nil {
		if a := f.respond(path); a != nil {
			if a.err != nil {
				return nil, a.err
			}
			return response(r, a.status, a.header, strings.NewReader(a.body)), nil
		}
	}
	status, answer := f.handle(path, token, body)
	content, err := json.Marshal(answer)
	if err != nil {
		return nil, err
	}
	return response(r, status, nil, bytes.NewReader(content)), nil
}

func response(r *http.Request, status int, header http.Header, body io.Reader) *http.Response {
	if header == nil {
		header = http.Header{}
	}
	return &http.Response{StatusCode: status, Status: http.StatusText(status), Header: header, Body: io.NopCloser(body), Request: r, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
}

// handle answers as a Vault does whose only issuer is the root.
func (f *fake) handle(path, token string, body map[string]any) (int, any) {
	deny := func(status int) (int, any) { return status, map[string]any{"errors": []string{"denied"}} }
	if path == "sys/health" {
		return 200, json.RawMessage(f.health)
	}
	if f.health != healthy {
		return deny(503)
	}
	if ref, ok := strings.CutPrefix(path, "pki/issuer/"); ok && strings.HasSuffix(ref, "/json") {
		if i := f.issuers[strings.TrimSuffix(ref, "/json")]; i != nil {
			return 200, map[string]any{"data": i}
		}
		return deny(404)
	}
	if path == loginPath {
		if body["secret_id"] != "secret-canary" {
			return deny(400)
		}
		token = fmt.Sprintf("token-canary-%d", len(f.tokens)+1)
		f.tokens[token] = time.Now().Add(f.life)
		return 200, auth(token, f.life)
	}
	if end, ok := f.tokens[token]; !ok || !time.Now().Before(end) {
		return deny(403)
	}
	switch path {
	case lookupPath:
		return 200, map[string]any{"data": map[string]any{"id": token, "ttl": int(time.Until(f.tokens[token]).Seconds()), "renewable": true}}
	case renewPath:
		life := f.life
		if f.renewals--; f.renewals < 0 {
			life = max(time.Until(f.tokens[token])-f.life/10, 0)
		}
		f.tokens[token] = time.Now().Add(life)
		return 200, auth(token, life)
	case "auth/token/revoke-self":
		delete(f.tokens, token)
		return 204, nil
	case signPath:
		if f.denied {
			return deny(403)
		}
		answer := f.signed(body)
		if f.answer != nil {
			f.answer(answer)
		}
		return 200, map[string]any{"data": answer}
	}
	return deny(404)
}

func auth(token string, life time.Duration) any {
	return map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": int(life.Seconds()), "renewable": true}}
}

// signed is the answer to a request for a signature, in the form of a real one.
func (f *fake) signed(body map[string]any) map[string]any {
	csr, err := csrOf(body)
	if err != nil {
		f.t.Error(err)
		return nil
	}
	life, err := time.ParseDuration(fmt.Sprint(body["ttl"]))
	if err != nil {
		f.t.Error(err)
	}
	uri, _ := url.Parse(fmt.Sprint(body["uri_sans"]))
	f.serial++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1000 + f.serial), Subject: csr.Subject, URIs: []*url.URL{uri},
		NotBefore: time.Now().Add(-2 * time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	pub, by := csr.PublicKey, f.root
	if f.template != nil {
		f.template(template)
	}
	if f.pub != nil {
		pub = f.pub(pub)
	}
	if f.by != nil {
		by = f.by
	}
	cert := f.make(template, pub, by)
	return map[string]any{"certificate": encode(cert), "issuing_ca": encode(f.root.cert), "ca_chain": []string{encode(cert), encode(f.root.cert)}}
}

func (f *fake) make(template *x509.Certificate, pub crypto.PublicKey, by *signer) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, pub, by.key)
	if err != nil {
		f.t.Error(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		f.t.Error(err)
	}
	return c
}

func csrOf(body map[string]any) (*x509.CertificateRequest, error) {
	block, _ := pem.Decode([]byte(fmt.Sprint(body["csr"])))
	if block == nil {
		return nil, fmt.Errorf("no CSR in %v", body)
	}
	return x509.ParseCertificateRequest(block.Bytes)
}

// kit is an upstream of a fake.
type kit struct {
	*fake
	up       *Upstream
	td       identity.TrustDomain
	log      *bytes.Buffer // to be read after Run has ended, or under synctest.Wait
	roots    string
	secretID string
	metrics  *prometheus.Registry
}

func newKit(t *testing.T, changes ...func(*Config)) *kit {
	t.Helper()
	dir := t.TempDir()
	k := &kit{fake: newFake(t), log: &bytes.Buffer{}, roots: filepath.Join(dir, "roots.pem"), secretID: filepath.Join(dir, "secret-id"), metrics: prometheus.NewRegistry()}
	check(t, os.WriteFile(k.roots, []byte(encode(k.root.cert)+"\n"), 0o600))
	check(t, os.WriteFile(k.secretID, []byte("secret-canary\n"), 0o600))
	c := Config{
		Addresses: []string{"https://vault.example:8200"}, CAFile: "none", Mount: "pki", Issuer: "meshca", RootsFile: k.roots,
		Auth: AppRole{Mount: "approle", RoleID: "role", SecretIDFile: k.secretID},
		Log:  slog.New(slog.NewTextHandler(k.log, nil)), Metrics: k.metrics,
	}
	for _, change := range changes {
		change(&c)
	}
	var err error
	k.up, err = New(c)
	check(t, err)
	k.up.transport = k.fake
	k.td, err = identity.ParseTrustDomain("cluster.local")
	check(t, err)
	return k
}

// run runs the upstream until the test ends or until stop.
func (k *kit) run(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = k.up.Run(ctx) })
	stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(stop)
	return stop
}

func (k *kit) request(t *testing.T) ca.IntermediateRequest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	name, _, err := ca.AuthorityName(k.td, ca.RoleIntermediate, key.Public())
	check(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: name}, key)
	check(t, err)
	csr, err := x509.ParseCertificateRequest(der)
	check(t, err)
	return ca.IntermediateRequest{CSR: csr, TrustDomain: k.td, Lifetime: 72 * time.Hour}
}

func (k *kit) state(t *testing.T, want State) {
	t.Helper()
	if r := k.up.Report(); r.State != string(want) {
		t.Errorf("state %q, want %q: %s", r.State, want, r.Detail)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sessionOver reports whether the token has ended.
func (k *kit) sessionOver(t *testing.T) bool {
	t.Helper()
	if err := k.up.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer k.up.release()
	return k.up.session == nil || k.up.session.over(time.Now())
}
