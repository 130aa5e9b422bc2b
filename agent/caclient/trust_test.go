package caclient

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	istioca "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func tlsServer(c net.Conn, ca *caclienttest.CA) *tls.Conn { return tls.Server(c, ca.TLS(serverName)) }

func readAll(c net.Conn) { _, _ = io.Copy(io.Discard, c) }

// recorder keeps what was read from a connection.
type recorder struct {
	net.Conn
	mu   sync.Mutex
	read bytes.Buffer
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.read.Write(p[:n])
	return n, err
}

// Somebody in the middle sees every byte that the client sends, decrypted where
// the client agreed to a handshake. The token must not be among them.
func TestV20_TokenIsNeverSentToAnUnverifiedServer(t *testing.T) {
	for name, test := range map[string]struct {
		conf func(*testing.T, *caclienttest.CA) *tls.Config // nil: plaintext
		says string
	}{
		"another CA with the same names": {func(t *testing.T, _ *caclienttest.CA) *tls.Config {
			return newCA(t).TLS(serverName)
		}, "chains to no certificate in"},
		"another name": {func(_ *testing.T, ca *caclienttest.CA) *tls.Config {
			return ca.TLS("evil.example")
		}, `is not for "` + serverName + `"`},
		"TLS 1.2": {func(_ *testing.T, ca *caclienttest.CA) *tls.Config {
			conf := ca.TLS(serverName)
			conf.MinVersion, conf.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			return conf
		}, "protocol version"},
		"plaintext": {nil, "TLS handshake"},
		"no HTTP/2": {func(_ *testing.T, ca *caclienttest.CA) *tls.Config {
			conf := ca.TLS(serverName)
			conf.NextProtos = nil
			return conf
		}, "no gRPC server"},
		"a workload's SVID": {func(t *testing.T, ca *caclienttest.CA) *tls.Config {
			chain, key := ca.Leaf(t, ca.ID)
			conf := ca.TLS()
			conf.Certificates = []tls.Certificate{{Certificate: [][]byte{chain[0].Raw, chain[1].Raw}, PrivateKey: key}}
			return conf
		}, "is not for"},
		"the anchor itself": {func(_ *testing.T, ca *caclienttest.CA) *tls.Config {
			conf := ca.TLS()
			conf.Certificates = []tls.Certificate{{Certificate: [][]byte{ca.Root.Certificate.Raw}, PrivateKey: ca.Root.Key}}
			return conf
		}, "is not for"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, n := newCA(t), caclienttest.NewNetwork(t)
				var conf *tls.Config
				if test.conf != nil {
					conf = test.conf(t, ca)
				}
				var raw, clear bytes.Buffer
				var mu sync.Mutex
				n.Handle("a:1", func(c net.Conn) {
					r := &recorder{Conn: c}
					var plain bytes.Buffer
					if conf != nil {
						_, _ = io.Copy(&plain, tls.Server(r, conf))
					} else {
						_, _ = r.Write([]byte("HTTP/1.1 200 OK\r\n\r\n"))
						readAll(r)
					}
					mu.Lock()
					defer mu.Unlock()
					r.mu.Lock()
					defer r.mu.Unlock()
					raw.Write(r.read.Bytes())
					clear.Write(plain.Bytes())
				})
				c := newClient(t, ca, n, "a:1")
				asked := false
				req := request(t)
				req.Token = func() (string, error) { asked = true; return canary, nil }
				err := c.Sign(t.Context(), req)
				if err == nil || !strings.Contains(err.Error(), test.says) {
					t.Errorf("got %v", err)
				}
				c.Close()
				synctest.Wait()
				mu.Lock()
				defer mu.Unlock()
				if asked || bytes.Contains(raw.Bytes(), []byte(canary)) || bytes.Contains(clear.Bytes(), []byte(canary)) {
					t.Errorf("the token was asked for (%v) or sent", asked)
				}
				if raw.Len() == 0 {
					t.Error("the client never spoke; this test shows nothing")
				}
			})
		})
	}
}

// A gRPC connection cannot be had without a finished handshake, whatever the
// rest of the package does.
func TestV20_V40_GRPCRefusesAConnectionWithoutTLS(t *testing.T) {
	plain, other := net.Pipe()
	defer func() { _, _ = plain.Close(), other.Close() }()
	if _, _, err := (established{}).ClientHandshake(t.Context(), "", plain); err == nil {
		t.Error("a plain connection was taken")
	}
	if _, _, err := (established{}).ClientHandshake(t.Context(), "", tls.Client(plain, &tls.Config{ServerName: "x"})); err == nil {
		t.Error("a connection before its handshake was taken")
	}
	if !bearer("x").RequireTransportSecurity() {
		t.Error("tokens may travel without TLS")
	}
}

// The anchor is read at each dial: a rotated root, or an agent that was off for
// a year, needs no hands once the file is right.
func TestF19_AnchorFileIsReadAtEachDial(t *testing.T) {
	ca := newCA(t)
	old := newCA(t)
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	c := newClient(t, ca, n, "a:1")
	write := func(content []byte) {
		if err := os.WriteFile(c.conf.AnchorFile, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(identity.EncodePEM(old.Root.Certificate))
	if err := c.Sign(t.Context(), request(t)); err == nil || !strings.Contains(err.Error(), "or the file is out of date") {
		t.Fatalf("with an old anchor: %v", err)
	}
	leaf := ca.SVID(t, ca.ID).Leaf()
	for name, content := range map[string][]byte{
		"empty":     nil,
		"no PEM":    []byte("<html>"),
		"truncated": identity.EncodePEM(ca.Root.Certificate)[:200],
		"a leaf":    identity.EncodePEM(leaf),
		"too large": bytes.Repeat([]byte("x"), identity.MaxCertificatePEM+1),
	} {
		write(content)
		var anchor *AnchorError
		if err := c.Sign(t.Context(), request(t)); !errors.As(err, &anchor) || anchor.File != c.conf.AnchorFile {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if err := os.Remove(c.conf.AnchorFile); err != nil {
		t.Fatal(err)
	}
	var anchor *AnchorError
	if err := c.Sign(t.Context(), request(t)); !errors.As(err, &anchor) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("gone: got %v", err)
	}
	write(append(identity.EncodePEM(old.Root.Certificate), identity.EncodePEM(ca.Root.Certificate)...))
	if err := c.Sign(t.Context(), request(t)); err != nil {
		t.Errorf("with the right file again: %v", err)
	}
}

func TestF35_TokenIsReadForEachTry(t *testing.T) {
	ca := newCA(t)
	ca.OnSign = func(token string, req *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
		if token != "good.token.x" {
			return nil, status.Error(codes.Unauthenticated, "ref 1")
		}
		return ca.Sign(req)
	}
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	c := newClient(t, ca, n, "a:1")
	dir := t.TempDir()
	path := filepath.Join(dir, "token")
	req := request(t)
	req.Token = TokenFile(path)

	put := func(content string) func() {
		return func() {
			_ = os.RemoveAll(path)
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	expired := "e30." + "eyJhdWQiOlsidmF1bHQiXSwiZXhwIjoxNzAwMDAwMDAwfQ" + ".c2ln" // aud vault, 2023
	for _, step := range []struct {
		name  string
		do    func()
		says  string // empty: succeeds
		local bool
	}{
		{"not there", func() {}, "no such file", true},
		{"empty", put("\n"), "is empty", true},
		{"binary", put("a\x00b"), "not printable ASCII", true},
		{"two lines", put("a\nb"), "not printable ASCII", true},
		{"too long", put(strings.Repeat("x", 8193)), "more than 8192 bytes", true},
		{"expired", put(expired), `the token is for audience "[\"vault\"]" and ended`, false},
		{"good", put("good.token.x\n"), "", false},
		{"a directory", func() { _ = os.RemoveAll(path); _ = os.Mkdir(path, 0o700) }, "not a regular file", true},
		{"a FIFO", func() { _ = os.RemoveAll(path); _ = syscall.Mkfifo(path, 0o600) }, "not a regular file", true},
		{"a symlink, as the kubelet makes it", func() {
			_ = os.RemoveAll(path)
			_ = os.Mkdir(filepath.Join(dir, "..1"), 0o700)
			_ = os.WriteFile(filepath.Join(dir, "..1", "token"), []byte("stale.token.x"), 0o600)
			_ = os.Symlink("..1", filepath.Join(dir, "..data"))
			_ = os.Symlink(filepath.Join("..data", "token"), path)
		}, "Unauthenticated", false},
		{"the symlink swapped", func() {
			_ = os.Mkdir(filepath.Join(dir, "..2"), 0o700)
			_ = os.WriteFile(filepath.Join(dir, "..2", "token"), []byte("good.token.x"), 0o600)
			_ = os.Symlink("..2", filepath.Join(dir, "..new"))
			_ = os.Rename(filepath.Join(dir, "..new"), filepath.Join(dir, "..data"))
		}, "", false},
	} {
		step.do()
		err := c.Sign(t.Context(), req)
		if step.says == "" {
			if err != nil {
				t.Errorf("%s: %v", step.name, err)
			}
			continue
		}
		var local *TokenError
		if err == nil || !strings.Contains(err.Error(), step.says) || errors.As(err, &local) != step.local {
			t.Errorf("%s: got %v", step.name, err)
		}
	}
}

// Whatever fails, the token stands in no error.
func TestV11_NoErrorHoldsTheToken(t *testing.T) {
	ca := newCA(t)
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("ok:1"), ca.TLS(serverName))
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		address := code.String() + ":1"
		bad := caclienttest.New(t, ca.ID)
		bad.CA = ca.CA
		bad.OnSign = func(string, *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
			return nil, status.Error(code, "no")
		}
		bad.OnStream = func(*caclienttest.Stream) error { return status.Error(code, "no") }
		bad.Serve(n.Listen(address), ca.TLS(serverName))
		c := newClient(t, ca, n, address)
		for what, err := range map[string]error{
			"sign":  c.Sign(t.Context(), request(t)),
			"watch": c.Watch(t.Context(), &Watch{Token: token(canary)}),
		} {
			if err == nil || containsToken(err.Error()) {
				t.Errorf("%v, %s: %v", code, what, err)
			}
		}
	}
	broken := writeFile(t, []byte(canary+"\n"+canary))
	if _, err := TokenFile(broken)(); err == nil || containsToken(err.Error()) {
		t.Errorf("a file with two tokens: %v", err)
	}
	if containsToken(bearer(canary).String() + bearer(canary).GoString()) {
		t.Error("the credentials print the token")
	}
}

// containsToken looks for any of the token's three parts.
func containsToken(s string) bool {
	for part := range strings.SplitSeq(canary, ".") {
		if strings.Contains(s, part) {
			return true
		}
	}
	return false
}

// A clock that is behind: the CA's certificate has not begun yet, and the error
// says both times.
func TestF52_ServerCertificateNotYetValidNamesBothTimes(t *testing.T) {
	ca := newCA(t, identitytest.WithClock(func() time.Time { return time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC) }))
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	c := newClient(t, ca, n, "a:1")
	c.conf.Now = func() time.Time { return time.Date(2026, 3, 1, 11, 0, 0, 0, time.UTC) }
	err := c.Sign(t.Context(), request(t))
	if err == nil || !strings.Contains(err.Error(), "2026-03-01T11:00:00Z is before 2026-03-01T11:58:00Z") {
		t.Errorf("got %v", err)
	}
}

// Whoever sits on the path chooses the names in the certificate that it shows.
// They reach the log and /readyz, and must neither fill nor forge them.
func TestT14_ForeignNamesAreCutAndQuoted(t *testing.T) {
	long := strings.Repeat("n", 40_000)
	const forged = "x\r\n{\"level\":\"INFO\",\"msg\":\"all is well\"}\x1b[2J"
	for name, test := range map[string]struct {
		issuer string // of a CA that is not ours
		names  []string
		says   string
	}{
		"a long issuer":   {long, []string{serverName}, "chains to no certificate"},
		"a forged issuer": {forged, []string{serverName}, "chains to no certificate"},
		"long names":      {"", []string{long, long}, "is not for"},
		"a forged name":   {"", []string{forged}, "is not for"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, n := newCA(t), caclienttest.NewNetwork(t)
				by := ca
				if test.issuer != "" {
					rename := func(c *x509.Certificate) { c.Subject.CommonName = test.issuer }
					by = newCA(t, identitytest.WithRootTemplate(rename), identitytest.WithIntermediateTemplate(rename))
				}
				chain, key := by.Leaf(t, by.ID, identitytest.WithTemplate(func(c *x509.Certificate) { c.DNSNames, c.URIs = test.names, nil }))
				conf := ca.TLS()
				conf.Certificates = []tls.Certificate{{Certificate: [][]byte{chain[0].Raw, chain[1].Raw}, PrivateKey: key}}
				n.Handle("a:1", func(c net.Conn) { readAll(tls.Server(c, conf)) })
				err := newClient(t, ca, n, "a:1").Sign(t.Context(), request(t))
				if err == nil || !strings.Contains(err.Error(), test.says) {
					t.Fatalf("got %v", err)
				}
				if text := err.Error(); len(text) > 1000 || strings.ContainsAny(text, "\r\n\x1b") {
					t.Errorf("%d bytes: %.2000q", len(text), text)
				}
			})
		})
	}
}

func TestT14_ForeignErrorsKeepTheirCause(t *testing.T) {
	cause := x509.UnknownAuthorityError{}
	for always, text := range map[bool]string{true: `"` + cause.Error() + `"`, false: cause.Error()} {
		err := &foreignError{cause, always}
		if !errors.As(error(err), &cause) || err.Error() != text {
			t.Errorf("got %v", err)
		}
	}
	for _, evil := range []string{"a\nb", "ü", "\x7f", strings.Repeat("x", 300)} {
		if text := (&foreignError{errors.New(evil), false}).Error(); text[0] != '"' || len(text) > 270 {
			t.Errorf("%.40q became %s", evil, text)
		}
	}
}
