package proxy

import (
	"bytes"
	"context"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
)

// program skips where a program of others is not installed.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	return path
}

// files writes what other programs want to read: the client's chain and key.
func (k *kit) files(id string) (cert, key string) {
	k.t.Helper()
	svid := k.ca.SVID(k.t, identitytest.ID(k.t, id))
	der, err := svid.MarshalKey()
	if err != nil {
		k.t.Fatal(err)
	}
	dir := k.t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, content := range map[string][]byte{
		cert: identity.EncodePEM(svid.Certificates()...),
		key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			k.t.Fatal(err)
		}
	}
	return cert, key
}

// webApp answers every request with "cart".
func webApp(t testing.TB) *app {
	l := listenLocal(t)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "cart") })}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return &app{address: l.Addr().String()}
}

func TestV25_OpenSSL(t *testing.T) {
	openssl := program(t, "openssl")
	for _, tt := range []struct {
		name     string
		mode     policy.Mode
		args     []string
		want     string // on its output; "" for a refusal
		security string
	}{
		{"mesh under STRICT", policy.Strict, []string{"-alpn", "istio"}, "echoed\n", "mutual TLS"},
		{"mesh under PERMISSIVE", policy.Permissive, []string{"-alpn", "istio-http/1.1,istio,http/1.1"}, "echoed\n", "mutual TLS"},
		{"no ALPN under STRICT", policy.Strict, nil, "echoed\n", "mutual TLS"},
		{"TLS 1.2 under STRICT", policy.Strict, []string{"-tls1_2"}, "", "none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := start(t, withMode(tt.mode))
			cert, key := k.files(frontendID)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, openssl, append([]string{"s_client", "-quiet", "-connect", k.in, "-cert", cert, "-cert_chain", cert, "-key", key}, tt.args...)...)
			var said bytes.Buffer
			cmd.Stderr = &said
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(in, tt.want)
			got := make([]byte, len(tt.want))
			if _, err := io.ReadFull(out, got); err != nil || string(got) != tt.want {
				t.Errorf("%q, %v", got, err)
			}
			if tt.want != "" {
				cancel() // it would wait for ever
			}
			_ = cmd.Wait()
			if tt.want == "" && !strings.Contains(said.String(), "protocol version") {
				t.Errorf("openssl says %q", said.String())
			}
			k.next(map[string]any{"security": tt.security})
		})
	}
}

func TestV25_Curl(t *testing.T) {
	curl := program(t, "curl")
	run := func(k *kit, args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), curl, append([]string{"-sS", "-k", "--max-time", "20"}, args...)...).Output()
		return string(out), err
	}
	for _, mode := range []policy.Mode{policy.Disable, policy.Permissive, policy.Strict} {
		t.Run(mode.String(), func(t *testing.T) {
			k := start(t, withMode(mode), withApp(webApp(t)))
			out, err := run(k, "http://"+k.in)
			if (out == "cart") != (mode != policy.Strict) {
				t.Errorf("plaintext: %q, %v", out, err)
			}
			k.next(nil)
			if mode != policy.Strict {
				return
			}
			if out, err := run(k, "https://"+k.in); err == nil {
				t.Errorf("without a certificate: %q", out)
			}
			k.next(map[string]any{"failure": "no certificate"})
			cert, key := k.files(frontendID)
			// Offering h2 and http/1.1, curl must get what this app speaks.
			if out, err := run(k, "--http1.1", "--cert", cert, "--key", key, "https://"+k.in); out != "cart" {
				t.Errorf("with a certificate: %q, %v", out, err)
			}
			k.next(map[string]any{"security": "mutual TLS", "end": "closed"})
		})
	}
}

// go-spiffe on both sides of the proxy: as client of the inbound listener, and
// as the target of the outbound one.
func TestV25_V38_GoSPIFFE(t *testing.T) {
	ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))
	bundle := x509bundle.FromX509Authorities(ca.TrustDomain.SPIFFE(), ca.Bundle().Authorities())
	as := func(id string) *x509svid.SVID {
		s := ca.SVID(t, identitytest.ID(t, id))
		return &x509svid.SVID{ID: s.ID().SPIFFE(), Certificates: s.Certificates(), PrivateKey: s.PrivateKey()}
	}
	cart := identitytest.ID(t, cartID).SPIFFE()

	server, err := spiffetls.ListenWithMode(t.Context(), "tcp", "127.0.0.1:0",
		spiffetls.MTLSServerWithRawConfig(tlsconfig.AuthorizeID(cart), as(frontendID), bundle))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	go func() {
		for {
			conn, err := server.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()

	k := start(t, withMode(policy.Strict), func(k *kit, c *Config) {
		k.world.svid, k.world.bundle = ca.SVID(t, identitytest.ID(t, cartID)), ca.Bundle()
		withOutbound(server.Addr().String(), frontendID)(k, c)
	})
	conn, err := spiffetls.DialWithMode(context.Background(), "tcp", k.in,
		spiffetls.MTLSClientWithRawConfig(tlsconfig.AuthorizeID(cart), as(frontendID), bundle))
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, conn, "hello")
	_ = conn.Close()
	k.next(map[string]any{"direction": "inbound", "security": "mutual TLS", "spiffe_id": frontendID})

	var out net.Conn = dialTCP(t, k.out)
	echoes(t, out, "hello")
	_ = out.Close()
	k.next(map[string]any{"direction": "outbound", "security": "mutual TLS", "spiffe_id": frontendID})
}
