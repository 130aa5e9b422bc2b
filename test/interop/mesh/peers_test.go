package mesh

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/meshca/meshca/test/envoytest"
	"github.com/meshca/meshca/test/testenv"
)

// The other ends of our sockets: an HTTP program, Envoy, go-spiffe and openssl.

// backend is a program that knows nothing of TLS: it answers with what it was
// sent. It returns host:port.
func backend(t testing.TB) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "echo: ")
		io.Copy(w, r.Body)
	}))
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

// request sends one request and wants the backend's answer.
func request(ctx context.Context, client *http.Client, url string) error {
	const word = "hello, other side"
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(word))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || string(body) != "echo: "+word {
		return fmt.Errorf("the answer is %d %.100q", resp.StatusCode, body)
	}
	return nil
}

// once sends one request on a connection of its own, over TLS if there is a
// configuration.
func once(ctx context.Context, address string, conf *tls.Config) error {
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: conf}
	scheme := "http"
	if conf != nil {
		scheme = "https"
	}
	return request(ctx, &http.Client{Transport: transport}, scheme+"://"+address)
}

func envoyBinary(t testing.TB) string {
	t.Helper()
	c, err := testenv.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	binary, err := testenv.Envoy(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

// startEnvoy runs an Envoy that is not ready yet.
func startEnvoy(t testing.TB, b envoytest.Bootstrap) *envoytest.Envoy {
	t.Helper()
	e, err := envoytest.Start(t.Context(), envoyBinary(t), shortDir(t), b)
	if err != nil {
		t.Fatal(err)
	}
	stopWithTest(t, e)
	return e
}

// startReadyEnvoy returns once the Envoy has all its secrets.
func startReadyEnvoy(t testing.TB, b envoytest.Bootstrap) *envoytest.Envoy {
	t.Helper()
	e := startEnvoy(t, b)
	if err := e.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	return e
}

func stopWithTest(t testing.TB, e *envoytest.Envoy) {
	t.Cleanup(func() {
		if err := e.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("Envoy's log:\n%s", e.Process().LogTail(40))
		}
	})
}

func listener(t testing.TB, e *envoytest.Envoy, name string) string {
	t.Helper()
	a, err := e.Address(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// source is go-spiffe's, on the agent's socket. It returns once it has an SVID.
func source(t testing.TB, a *Agent) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := newSource(ctx, a)
	if err != nil {
		t.Fatalf("go-spiffe on the socket of %s: %v", a.id, err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newSource(ctx context.Context, a *Agent) (*workloadapi.X509Source, error) {
	return workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+a.socket)))
}

// goSpiffeClient is a TLS configuration made by go-spiffe, for a server with
// the given ID.
func goSpiffeClient(s *workloadapi.X509Source, server string) *tls.Config {
	return tlsconfig.MTLSClientConfig(s, s, tlsconfig.AuthorizeID(spiffeid.RequireFromString(server)))
}

// openssl sends one request with `openssl s_client`, certificate, key and roots
// being those that the agent gives to go-spiffe.
func openssl(t *testing.T, a *Agent, address string) error {
	t.Helper()
	program, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	s := source(t, a)
	svid, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	chain, key, err := svid.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := s.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		t.Fatal(err)
	}
	roots, err := bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	chainFile := a.mesh.write(t, a.Workload.name+".crt", chain)
	cmd := exec.CommandContext(ctx, program, "s_client", "-quiet", "-verify_return_error", "-x509_strict", "-tls1_3",
		"-connect", address, "-cert", chainFile, "-cert_chain", chainFile,
		"-key", a.mesh.write(t, a.Workload.name+".key", key),
		"-CAfile", a.mesh.write(t, a.Workload.name+".roots", roots))
	cmd.Stdin = strings.NewReader("GET / HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n")
	var diagnosis bytes.Buffer
	cmd.Stderr = &diagnosis
	out, err := cmd.Output()
	if !bytes.Contains(out, []byte("echo: ")) {
		return fmt.Errorf("openssl: %v; heard %.100q; %s", err, out, bytes.TrimSpace(diagnosis.Bytes()))
	}
	return nil
}

// certificatesAt returns what a TLS server shows to somebody whom it will not
// let in, leaf first.
func certificatesAt(ctx context.Context, address string) ([]*x509.Certificate, error) {
	conn, err := (&tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Nothing is sent. Whether the certificates are right is judged by others.
		InsecureSkipVerify: true,
	}}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates, nil
}

// isRefusal reports whether an error is the other side's, or our own
// verification's, rather than a deadline's.
func isRefusal(err error) bool {
	var timeout net.Error
	return err != nil && !(errors.As(err, &timeout) && timeout.Timeout())
}

// freePort is a TCP port of loopback that nobody listened on a moment ago.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}
