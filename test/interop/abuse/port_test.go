package abuse

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	hostName = "meshca.test"
	patience = 20 * time.Second
)

// port is the CA's port, as a stranger and as a good client see it.
type port struct {
	kit   *catest.Kit
	roots *x509.CertPool
	dial  func(context.Context) (net.Conn, error)
	csr   string
}

// serve runs the CA's server on a listener until the test ends.
func serve(t *testing.T, l net.Listener, dial func(context.Context) (net.Conn, error)) *port {
	t.Helper()
	p := &port{kit: catest.New(t), roots: x509.NewCertPool(), dial: dial, csr: newCSR(t)}
	anchor, err := os.ReadFile(p.kit.Anchor)
	must(t, err)
	p.roots.AppendCertsFromPEM(anchor)
	s, err := server.New(server.Config{
		Authority: p.kit.Authority, Authenticator: p.kit.Authenticator,
		// One address stands for many here.
		MaxStrangersPerSource: server.DefaultMaxConnections,
		Names:                 ca.ServingNames{DNS: []string{hostName}}, Log: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the CA to serve", func() bool { return s.Ready() == nil })
	return p
}

// listen serves on loopback.
func listen(t *testing.T) *port {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	return serve(t, l, func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	})
}

func newCSR(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// connect opens a connection with nothing said on it.
func (p *port) connect(t *testing.T) net.Conn {
	t.Helper()
	conn, err := p.dial(t.Context())
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	return conn
}

// handshake does the TLS handshake on a connection.
func (p *port) handshake(t *testing.T, conn net.Conn) *tls.Conn {
	t.Helper()
	secured := tls.Client(conn, p.clientTLS())
	must(t, secured.HandshakeContext(t.Context()))
	return secured
}

func (p *port) clientTLS() *tls.Config {
	return &tls.Config{RootCAs: p.roots, ServerName: hostName, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}
}

// good gets a certificate over a connection of its own, as an agent does.
func (p *port) good(t *testing.T) error {
	conn, err := grpc.NewClient("passthrough:ca", grpc.WithTransportCredentials(credentials.NewTLS(p.clientTLS())), grpc.WithDisableServiceConfig(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.dial(ctx) }))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+p.kit.Token(t, "shop", "cart"))
	_, err = istio.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istio.IstioCertificateRequest{Csr: p.csr})
	return err
}

// while does something to the port, and wants a good client to be served all
// the time and afterwards, and what was started for the strangers to be gone
// once they are.
func (p *port) while(t *testing.T, abuse func()) {
	t.Helper()
	must(t, p.good(t))
	base := runtime.NumGoroutine()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	served := 0
	wg.Go(func() {
		for {
			if err := p.good(t); err != nil {
				t.Errorf("a good client, meanwhile: %v", err)
				return
			}
			served++
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	abuse()
	close(stop)
	wg.Wait()
	if err := p.good(t); err != nil {
		t.Errorf("a good client, afterwards: %v", err)
	}
	eventually(t, "the strangers' goroutines to end", func() bool { return runtime.NumGoroutine() <= base+2 })
	t.Logf("%d good calls were served meanwhile", served)
}

// eventually waits until something is so.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-ctx.Done():
			t.Fatalf("waited in vain for %s", what)
		case <-tick.C:
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
