package bundle

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// source is a bundle that tests change.
type source struct {
	mu     sync.Mutex
	bundle *identity.Bundle
}

func (s *source) get() (*identity.Bundle, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundle, nil
}

func (s *source) set(b *identity.Bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bundle = b
}

func newBundle(t testing.TB, sequence uint64, roots int) *identity.Bundle {
	t.Helper()
	td := identitytest.TrustDomain(t, "example.org")
	var all []*x509.Certificate
	for range roots {
		root, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: td})
		check(t, err)
		all = append(all, root)
	}
	b, err := identity.NewBundle(td, identity.BundleConfig{Sequence: sequence, Authorities: all})
	check(t, err)
	return b
}

// web is a certificate for localhost as a public CA would give it, in two files.
type web struct{ cert, key string }

// write makes a new pair and returns what clients verify it by.
func (w web) write(t testing.TB) *x509.CertPool {
	t.Helper()
	certPEM, keyPEM, pool := newWeb(t)
	check(t, os.WriteFile(w.cert, certPEM, 0o600))
	check(t, os.WriteFile(w.key, keyPEM, 0o600))
	return pool
}

func newWeb(t testing.TB) (certPEM, keyPEM []byte, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}, &x509.Certificate{SerialNumber: big.NewInt(1), KeyUsage: x509.KeyUsageCertSign}, key.Public(), key)
	check(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	pool = x509.NewCertPool()
	pool.AddCert(cert)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), pool
}

func newWebFiles(t testing.TB) web {
	dir := t.TempDir()
	return web{filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")}
}

// serve runs a server and returns its URL.
func serve(t testing.TB, c Config) string {
	t.Helper()
	s, err := New(c)
	check(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	_, port, err := net.SplitHostPort(l.Addr().String())
	check(t, err)
	return "https://localhost:" + port
}

func client(t testing.TB, pool *x509.CertPool, change func(*tls.Config)) *http.Client {
	conf := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	if change != nil {
		change(conf)
	}
	transport := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// watcher notes what go-spiffe's client is told.
type watcher struct {
	bundles chan *spiffebundle.Bundle
	hints   chan time.Duration
}

func (w *watcher) NextRefresh(hint time.Duration) time.Duration {
	w.hints <- hint
	return 10 * time.Millisecond // instead of the hint, which is minutes
}
func (w *watcher) OnUpdate(b *spiffebundle.Bundle) { w.bundles <- b }
func (w *watcher) OnError(error)                   {}

// The reference client with public roots fetches and follows the bundle.
func TestSPIFFE75_SPIFFE76_SPIFFE29_FederationClientFetchesAndFollows(t *testing.T) {
	files := newWebFiles(t)
	pool := files.write(t)
	first := newBundle(t, 7, 2)
	src := &source{bundle: first}
	url := serve(t, Config{Source: src.get, CertFile: files.cert, KeyFile: files.key, Refresh: 90 * time.Second})
	td := spiffeid.RequireTrustDomainFromString("example.org")

	got, err := federation.FetchBundle(t.Context(), td, url, federation.WithWebPKIRoots(pool))
	check(t, err)
	sequence, _ := got.SequenceNumber()
	hint, _ := got.RefreshHint()
	if len(got.X509Authorities()) != 2 || sequence != 7 || hint != 90*time.Second {
		t.Errorf("%d authorities, sequence %d, hint %v", len(got.X509Authorities()), sequence, hint)
	}
	for i, a := range got.X509Authorities() {
		if !a.Equal(first.Authorities()[i]) {
			t.Errorf("authority %d is another", i)
		}
	}
	// By a name that the certificate has not, and by roots that did not sign it.
	if _, err := federation.FetchBundle(t.Context(), td, strings.Replace(url, "localhost", "127.0.0.1", 1), federation.WithWebPKIRoots(pool)); err == nil {
		t.Error("fetched by another name")
	}
	_, _, other := newWeb(t)
	if _, err := federation.FetchBundle(t.Context(), td, url, federation.WithWebPKIRoots(other)); err == nil {
		t.Error("fetched from whom nobody vouches for")
	}

	ctx, cancel := context.WithCancel(t.Context())
	w := &watcher{make(chan *spiffebundle.Bundle, 100), make(chan time.Duration, 10000)}
	ended := make(chan error, 1)
	go func() { ended <- federation.WatchBundle(ctx, td, url, w, federation.WithWebPKIRoots(pool)) }()
	if b := <-w.bundles; len(b.X509Authorities()) != 2 {
		t.Errorf("%d authorities", len(b.X509Authorities()))
	}
	src.set(newBundle(t, 8, 3))
	for b := range w.bundles {
		if n, _ := b.SequenceNumber(); n == 8 {
			break
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("WatchBundle = %v", err)
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

func TestSPIFFE74_SPIFFE75_SPIFFE32_SPIFFE35_Answers(t *testing.T) {
	files := newWebFiles(t)
	pool := files.write(t)
	src := new(source)
	url := serve(t, Config{Source: src.get, CertFile: files.cert, KeyFile: files.key})
	c := client(t, pool, nil)
	ask := func(method, path string, header ...string) (*http.Response, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, url+path, nil)
		check(t, err)
		for i := 0; i < len(header); i += 2 {
			r.Header.Add(header[i], header[i+1])
		}
		resp, err := c.Do(r)
		check(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		check(t, err)
		return resp, string(body)
	}
	if resp, _ := ask("GET", "/"); resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("without a bundle: %d", resp.StatusCode)
	}
	empty, err := identity.NewBundle(identitytest.TrustDomain(t, "example.org"), identity.BundleConfig{Sequence: 1})
	check(t, err)
	src.set(empty)
	if resp, _ := ask("GET", "/"); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("with an empty bundle: %d", resp.StatusCode)
	}
	src.set(newBundle(t, 3, 1))
	resp, body := ask("GET", "/")
	etag := resp.Header.Get("ETag")
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/json" || etag == "" {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}
	for _, part := range []string{`"spiffe_sequence":3`, `"spiffe_refresh_hint":300`, `"use":"x509-svid"`, `"x5c":["`, `"kty":"EC"`} {
		if strings.Count(body, part) != 1 {
			t.Errorf("%s has not %s once", body, part)
		}
	}
	for _, none := range []string{`"kid"`, `"d"`, `"trust_domain"`} {
		if strings.Contains(body, none) {
			t.Errorf("%s has %s", body, none)
		}
	}
	for _, tt := range []struct {
		method, path, match string
		code                int
	}{
		{"HEAD", "/", "", 200}, {"POST", "/", "", 405}, {"PUT", "/", "", 405}, {"DELETE", "/", "", 405}, {"OPTIONS", "/", "", 405},
		{"GET", "/other", "", 404}, {"GET", "/.well-known/spiffe-bundle", "", 404},
		{"GET", "/", etag, 304}, {"GET", "/", `"x", W/` + etag, 304}, {"GET", "/", `"x"`, 200},
	} {
		header := []string{}
		if tt.match != "" {
			header = []string{"If-None-Match", tt.match}
		}
		if resp, body := ask(tt.method, tt.path, header...); resp.StatusCode != tt.code || tt.code == 304 && body != "" {
			t.Errorf("%s %s (%s): %d %s", tt.method, tt.path, tt.match, resp.StatusCode, body)
		}
	}
	src.set(newBundle(t, 4, 1))
	if resp, body := ask("GET", "/", "If-None-Match", etag); resp.StatusCode != 200 || !strings.Contains(body, `"spiffe_sequence":4`) {
		t.Errorf("after a change: %d %s", resp.StatusCode, body)
	}
}

func TestSPIFFE73_SPIFFE74_TLSIsMozillasIntermediate(t *testing.T) {
	files := newWebFiles(t)
	pool := files.write(t)
	src := &source{bundle: newBundle(t, 1, 1)}
	url := serve(t, Config{Source: src.get, CertFile: files.cert, KeyFile: files.key})
	for name, tt := range map[string]struct {
		change func(*tls.Config)
		ok     bool
	}{
		"TLS 1.3": {func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 }, true},
		"TLS 1.2": {func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, true},
		"TLS 1.1": {func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, false},
		"CBC": {func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}
		}, false},
		"no certificates": {func(c *tls.Config) { c.GetClientCertificate = refuseToShow(t) }, true},
	} {
		// A handshake alone: HTTP/2 would refuse some suites by itself.
		conf := &tls.Config{RootCAs: pool, ServerName: "localhost"}
		tt.change(conf)
		conn, err := (&tls.Dialer{Config: conf}).DialContext(t.Context(), "tcp", strings.TrimPrefix(url, "https://"))
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			conn.Close()
		}
	}
	if resp, err := http.Get("http" + strings.TrimPrefix(url, "https")); err == nil {
		if resp.StatusCode == 200 {
			t.Error("plaintext is answered")
		}
		resp.Body.Close()
	}
	http.DefaultClient.CloseIdleConnections()
}

// refuseToShow fails the test when a certificate is asked for.
func refuseToShow(t testing.TB) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		t.Error("a client certificate is asked for")
		return new(tls.Certificate), nil
	}
}

// The operator's files are replaced while it runs: by content, whatever their
// times say, and never half.
func TestCertificateIsReadAgain(t *testing.T) {
	files := newWebFiles(t)
	oldPool := files.write(t)
	now := time.Now()
	var mu sync.Mutex
	src := &source{bundle: newBundle(t, 1, 1)}
	url := serve(t, Config{Source: src.get, CertFile: files.cert, KeyFile: files.key, Now: func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		now = now.Add(rereadAfter)
		return now
	}})
	reaches := func(pool *x509.CertPool) bool {
		resp, err := client(t, pool, nil).Get(url)
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	}
	if !reaches(oldPool) {
		t.Fatal("the first certificate is not served")
	}
	info, err := os.Stat(files.cert)
	check(t, err)
	certPEM, keyPEM, newPool := newWeb(t)
	check(t, os.WriteFile(files.cert, certPEM, 0o600)) // half of a replacement
	if !reaches(oldPool) {
		t.Error("a pair that does not fit has taken the good one away")
	}
	check(t, os.WriteFile(files.key, keyPEM, 0o600))
	check(t, os.Chtimes(files.cert, info.ModTime(), info.ModTime()))
	if !reaches(newPool) || reaches(oldPool) {
		t.Error("the new pair is not served")
	}
	check(t, os.Remove(files.key))
	if !reaches(newPool) {
		t.Error("a file that is gone has taken the good pair away")
	}
}

func TestConfig(t *testing.T) {
	files := newWebFiles(t)
	files.write(t)
	src := new(source)
	for name, c := range map[string]Config{
		"no source":           {CertFile: files.cert, KeyFile: files.key},
		"no files":            {Source: src.get},
		"no such file":        {Source: src.get, CertFile: files.cert + "x", KeyFile: files.key},
		"files the wrong way": {Source: src.get, CertFile: files.key, KeyFile: files.cert},
		"hint too short":      {Source: src.get, CertFile: files.cert, KeyFile: files.key, Refresh: time.Millisecond},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
