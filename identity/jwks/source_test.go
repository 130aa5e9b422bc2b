package jwks

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshca/meshca/identity/identitytest"
)

// serve starts an HTTPS server and returns a source that trusts it.
func serve(t *testing.T, h http.HandlerFunc) (*httptest.Server, HTTPS) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes are the point
	s.StartTLS()
	t.Cleanup(s.Close)
	return s, HTTPS{URL: s.URL + "/keys", CAFile: caFile(t, s)}
}

// caFile writes the certificate of a server, which is its own CA.
func caFile(t *testing.T, s *httptest.Server) string {
	t.Helper()
	return file(t, "ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

func file(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func answer(status int, body []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		w.Write(body)
	}
}

// fails checks that nothing was loaded, and why.
func fails(t *testing.T, ctx context.Context, s Source, want string) {
	t.Helper()
	b, err := s.Load(ctx)
	if err == nil || b != nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%d bytes, error %v; expected %q", len(b), err, want)
	}
}

func TestHTTPSLoads(t *testing.T) {
	want := keyDocument(t, "a")
	_, source := serve(t, answer(http.StatusOK, want))
	got, err := source.Load(t.Context())
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got %q, error %v", got, err)
	}
	has(t, newCache(t, source, nil), "a", 1)
}

// The token is read for each request and goes to the configured URL alone.
func TestAPIServerTokenIsReadAgain(t *testing.T) {
	var seen []string
	_, source := serve(t, func(w http.ResponseWriter, r *http.Request) {
		seen = append(seen, r.URL.Path+" "+r.Header.Get("Authorization"))
	})
	path := file(t, "token", []byte("first\n"))
	api := APIServer(strings.TrimSuffix(source.URL, "keys"), source.CAFile, path)
	for _, content := range []string{"first\n", "second"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := api.Load(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(seen, ","); got != "/openid/v1/jwks Bearer first,/openid/v1/jwks Bearer second" {
		t.Errorf("the server saw %q", got)
	}
	for content, want := range map[string]string{
		"": "is empty", " \n": "is empty", "a\nb": "more than one token", "a\x00": "more than one token",
		strings.Repeat("a", 16<<10+1): "more than 16384 bytes",
	} {
		api.TokenFile = file(t, "bad", []byte(content))
		fails(t, t.Context(), api, want)
	}
	api.TokenFile = filepath.Join(t.TempDir(), "none")
	fails(t, t.Context(), api, "no such file")
	if len(seen) != 2 {
		t.Errorf("%d requests without a token were sent", len(seen)-2)
	}
}

// A redirect is an error, wherever it leads; neither the request nor the token
// follows it.
func TestV18_V55_RedirectsAreNotFollowed(t *testing.T) {
	asked := false
	other, trusted := serve(t, func(http.ResponseWriter, *http.Request) { asked = true })
	for _, status := range []int{301, 302, 303, 307, 308} {
		_, source := serve(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, status) })
		source.TokenFile = file(t, "token", []byte("canary"))
		own, err := os.ReadFile(source.CAFile)
		if err != nil {
			t.Fatal(err)
		}
		others, err := os.ReadFile(trusted.CAFile)
		if err != nil {
			t.Fatal(err)
		}
		source.CAFile = file(t, "both.pem", append(own, others...))
		fails(t, t.Context(), source, `it redirects to "`+other.URL)
	}
	if asked {
		t.Error("a redirect was followed")
	}
}

// Only the pinned CA vouches for the server, by the name in the URL.
func TestV18_PinnedCAOnly(t *testing.T) {
	asked := false
	server, source := serve(t, func(http.ResponseWriter, *http.Request) { asked = true })
	cert := server.Certificate()
	foreignCA := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org")).Bundle().MarshalPEM()

	plain := httptest.NewServer(answer(http.StatusOK, nil))
	t.Cleanup(plain.Close)

	t.Setenv("SSL_CERT_FILE", source.CAFile) // the system's CAs do not count
	wrongName := source
	wrongName.URL = strings.Replace(source.URL, "127.0.0.1", "localhost", 1)
	fails(t, t.Context(), wrongName, "not localhost")

	foreign := source
	foreign.CAFile = file(t, "foreign.pem", foreignCA)
	fails(t, t.Context(), foreign, "signed by unknown authority")

	for content, want := range map[string]string{
		"":                                  "none found",
		"no PEM":                            "text outside",
		"-----BEGIN PRIVATE KEY-----\nAA==": "another kind",
	} {
		bad := source
		bad.CAFile = file(t, "bad.pem", []byte(content))
		fails(t, t.Context(), bad, want)
	}
	if asked {
		t.Error("a request was sent to a server that was not verified")
	}

	http1 := source
	http1.URL = plain.URL
	fails(t, t.Context(), http1, "only https is used")

	// The file is read again each time.
	moving := source
	moving.CAFile = file(t, "moving.pem", foreignCA)
	fails(t, t.Context(), moving, "unknown authority")
	if err := os.WriteFile(moving.CAFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := moving.Load(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestV53_CAFileIsCapped(t *testing.T) {
	_, source := serve(t, answer(http.StatusOK, nil))
	source.CAFile = file(t, "huge.pem", bytes.Repeat([]byte("\n"), 256<<10+1))
	fails(t, t.Context(), source, "more than 262144 bytes")
}

func TestV18_EnvironmentProxyIsNotAsked(t *testing.T) {
	asked := false
	proxy := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	t.Cleanup(proxy.Close)
	t.Setenv("HTTPS_PROXY", proxy.URL)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, source := serve(t, answer(http.StatusOK, nil))
	source.URL = "https://keys.invalid/" // loopback would not be proxied anyway
	if _, err := source.Load(ctx); err == nil || asked {
		t.Errorf("error %v, proxy asked: %t", err, asked)
	}
}

func TestHTTPSAnswersThatAreNoKeys(t *testing.T) {
	for _, test := range []struct {
		name string
		h    http.HandlerFunc
		want string
	}{
		{"401", answer(401, nil), `"401 Unauthorized"; the token file's token is expired`},
		{"403", answer(403, nil), "system:service-account-issuer-discovery"},
		{"404", answer(404, keyDocument(t, "a")), `"404 Not Found"`},
		{"429", answer(429, keyDocument(t, "a")), `"429 Too Many Requests"`},
		{"500", answer(500, keyDocument(t, "a")), `"500 Internal Server Error"`},
		{"204", answer(204, nil), `"204 No Content"`},
		{"1 MiB and a byte", answer(200, bytes.Repeat([]byte(" "), 1<<20+1)), "more than 1048576 bytes"},
		{"endless", func(w http.ResponseWriter, _ *http.Request) {
			for block := bytes.Repeat([]byte(" "), 1<<16); ; {
				if _, err := w.Write(block); err != nil {
					return
				}
			}
		}, "more than 1048576 bytes"},
		{"huge header", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 64<<10)) }, "header"},
		{"gzip", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Accept-Encoding") != "" {
				w.WriteHeader(http.StatusNotAcceptable)
				return
			}
			w.WriteHeader(http.StatusTeapot)
		}, "418"},
		{"cut off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("{"))
		}, "unexpected EOF"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, source := serve(t, test.h)
			fails(t, t.Context(), source, test.want)
		})
	}
}

// Whatever stage a server stalls at, the deadline ends it.
func TestHTTPSDeadline(t *testing.T) {
	for name, begin := range map[string]func(http.ResponseWriter){
		"before the answer": func(http.ResponseWriter) {},
		"in the body": func(w http.ResponseWriter) {
			w.Write([]byte("{"))
			w.(http.Flusher).Flush()
		},
	} {
		t.Run(name, func(t *testing.T) {
			reached := make(chan struct{})
			_, source := serve(t, func(w http.ResponseWriter, r *http.Request) {
				begin(w)
				close(reached)
				<-r.Context().Done() // until the client has gone
			})
			deadline := errors.New("the deadline")
			ctx, cancel := context.WithCancelCause(t.Context())
			var load sync.WaitGroup
			load.Go(func() {
				if b, err := source.Load(ctx); !errors.Is(err, deadline) {
					t.Errorf("%d bytes, error %v", len(b), err)
				}
			})
			<-reached
			cancel(deadline)
			load.Wait()
		})
	}
}

func TestFileSource(t *testing.T) {
	fails(t, t.Context(), File(filepath.Join(t.TempDir(), "none")), "no such file")
	fails(t, t.Context(), File(t.TempDir()), "not a regular file")
	fails(t, t.Context(), File(file(t, "huge", make([]byte, 1<<20+1))), "more than 1048576 bytes")
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	fails(t, t.Context(), File(fifo), "not a regular file")
}

func TestNewRefusesUnsafeSources(t *testing.T) {
	for _, test := range []struct {
		source Source
		want   string
	}{
		{nil, "it has no source"},
		{HTTPS{URL: "http://x/", CAFile: "ca"}, "only https is used"},
		{HTTPS{URL: "file:///etc/passwd", CAFile: "ca"}, "only https is used"},
		{HTTPS{URL: "https:///keys", CAFile: "ca"}, "only https is used"},
		{HTTPS{URL: "https://user:secret@x/", CAFile: "ca"}, "holds a user or a fragment"},
		{HTTPS{URL: "https://x/#a", CAFile: "ca"}, "holds a user or a fragment"},
		{HTTPS{URL: "https://x/"}, "a CA file is needed"},
		{HTTPS{URL: "://", CAFile: "ca"}, "missing protocol scheme"},
	} {
		k, err := New(Config{Source: test.source})
		if k != nil || err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("New says %v, expected %q", err, test.want)
		}
	}
}
