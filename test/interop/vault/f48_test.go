package vault

import (
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/vault"
)

// relay passes connections on to a server until it is told to do worse.
type relay struct {
	net.Listener
	to      string
	stalled atomic.Bool  // nothing of an answer comes through
	cutAt   atomic.Int64 // after so many bytes of answers a connection ends; 0 for never
	ended   chan struct{}
	running sync.WaitGroup
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	r := &relay{Listener: l, to: to, ended: make(chan struct{})}
	r.running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.running.Go(func() { r.pass(c) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); close(r.ended); r.running.Wait() })
	return r
}

func (r *relay) pass(c net.Conn) {
	defer c.Close()
	s, err := net.Dial("tcp", r.to)
	if err != nil {
		return
	}
	defer s.Close()
	over := make(chan struct{})
	r.running.Go(func() {
		defer close(over)
		_, _ = io.Copy(s, c)
		_ = s.Close()
	})
	r.running.Go(func() {
		select {
		case <-r.ended:
			_ = c.Close()
		case <-over:
		}
	})
	b := make([]byte, 512)
	for passed := int64(0); ; {
		n, err := s.Read(b)
		if r.stalled.Load() {
			<-over // the client has given up
			return
		}
		if most := r.cutAt.Load(); most > 0 && passed+int64(n) > most {
			return
		}
		passed += int64(n)
		if _, e := c.Write(b[:n]); err != nil || e != nil {
			return
		}
	}
}

// A network that holds answers back, or cuts them, costs bounded time and certificates
// that nobody gets; nothing of half an answer is believed.
func TestF48_SlowAndCut(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	r := newRelay(t, w.Address())
	config := w.config()
	config.Addresses = []string{"https://" + r.Addr().String()}
	u, _ := start(t, config)
	state(t, u, 10*time.Second, vault.OK)
	w.signs(t, u)

	had := serials(t, w.Server)
	r.cutAt.Store(2500) // the handshake and what health says are shorter
	e := fails(t, w, u, 10*time.Second, vault.Refused, vault.Unreachable)
	t.Logf("cut: %v", e)
	if n := serials(t, w.Server) - had; n != 1 {
		t.Errorf("%d certificates for one call: was the answer cut, and the request not repeated?", n)
	}
	if rep := u.Report(); !rep.Away || rep.State != string(e.State) {
		t.Errorf("report %+v", rep)
	}
	r.cutAt.Store(0)
	w.signs(t, u)
	state(t, u, 10*time.Second, vault.OK)

	r.stalled.Store(true)
	fails(t, w, u, 25*time.Second, vault.Slow)
	state(t, u, 20*time.Second, vault.Slow)
	r.stalled.Store(false)
	within(t, 15*time.Second, "signing again", func() error {
		_, err := u.SignIntermediate(t.Context(), w.request(t))
		return err
	})
	state(t, u, 10*time.Second, vault.OK)
}

// fake is a server that is no Vault in how it answers a request for a signature.
func fake(t *testing.T, token string, sign http.HandlerFunc) (address, caFile string) {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v1/sys/health":
			fmt.Fprint(rw, `{"initialized":true,"sealed":false,"standby":false}`)
		case r.URL.Path == "/v1/auth/token/lookup-self":
			fmt.Fprintf(rw, `{"data":{"id":%q,"ttl":3600,"renewable":true}}`, token)
		case strings.HasSuffix(r.URL.Path, "/sign-intermediate"):
			sign(rw, r)
		default:
			http.Error(rw, `{"errors":[]}`, http.StatusNotFound)
		}
	}))
	t.Cleanup(s.Close)
	file := filepath.Join(t.TempDir(), "ca.pem")
	write(t, file, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	return s.URL, file
}

// Answers that are too large, half or elsewhere are no answers, and the token goes to
// nobody else.
func TestF48_HostileServers(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	const token = "hvs.of-the-configured-server"
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, token)
	var elsewhere atomic.Int32
	other := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(other.Close)
	redirect := func(code int) http.HandlerFunc {
		return func(rw http.ResponseWriter, r *http.Request) {
			http.Redirect(rw, r, other.URL+r.URL.Path, code)
		}
	}
	for name, test := range map[string]struct {
		sign  http.HandlerFunc
		wants []vault.State
		text  string
	}{
		"5 MiB": {func(rw http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(rw, `{"data":{"certificate":%q}}`, strings.Repeat("A", 5<<20))
		}, []vault.State{vault.Refused}, "more than 1048576 bytes"},
		"half": {func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Length", "1000")
			fmt.Fprint(rw, `{"data":{"certificate":"`)
		}, []vault.State{vault.Refused, vault.Unreachable}, "EOF"},
		"no JSON": {func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, "<html>") }, []vault.State{vault.Refused}, "cannot be read"},
		"301":     {redirect(301), []vault.State{vault.Refused}, "redirects are not followed"},
		"302":     {redirect(302), []vault.State{vault.Refused}, "redirects are not followed"},
		"307":     {redirect(307), []vault.State{vault.Standby}, "redirects are not followed"},
		"308":     {redirect(308), []vault.State{vault.Refused}, "redirects are not followed"},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int32
			config := w.config()
			address, ca := fake(t, token, func(rw http.ResponseWriter, r *http.Request) {
				if asked.Add(1); r.Header.Get("X-Vault-Token") != token {
					t.Errorf("token %q", r.Header.Get("X-Vault-Token"))
				}
				test.sign(rw, r)
			})
			config.Addresses, config.CAFile, config.Auth = []string{address}, ca, vault.TokenFile(file)
			u, stop := start(t, config)
			state(t, u, 10*time.Second, vault.OK)
			e := fails(t, w, u, 10*time.Second, test.wants...)
			holds(t, e.Error(), test.text)
			if n := asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
			stop()
		})
	}
	if n := elsewhere.Load(); n != 0 {
		t.Errorf("%d requests to the server that was redirected to", n)
	}

	// The real Vault, with a certificate of another authority than the configured one.
	config := w.config()
	_, config.CAFile = fake(t, token, nil)
	u, _ := start(t, config)
	r := state(t, u, 10*time.Second, vault.Refused)
	holds(t, r.Detail, "CA file must hold the authority")
	fails(t, w, u, 5*time.Second, vault.Refused)
	if n := len(tokens(t, w)); n != 0 {
		t.Errorf("%d logins at a server with a bad certificate", n)
	}
}
