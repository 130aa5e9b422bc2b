package sds

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	cartID = "spiffe://example.org/ns/shop/sa/cart"
	payID  = "spiffe://example.org/ns/shop/sa/pay"
)

func mustID(t testing.TB, s string) identity.ID {
	t.Helper()
	id, err := identity.ParseID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// newBundle makes a bundle of the CA's root, and of others, with a sequence.
func newBundle(t testing.TB, ca *identitytest.CA, sequence uint64, more ...*x509.Certificate) *identity.Bundle {
	t.Helper()
	b, err := identity.NewBundle(ca.TrustDomain, identity.BundleConfig{
		Sequence:    sequence,
		Authorities: append([]*x509.Certificate{ca.Root.Certificate}, more...),
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func emptyBundle(t testing.TB, ca *identitytest.CA) *identity.Bundle {
	t.Helper()
	b, err := identity.NewBundle(ca.TrustDomain, identity.BundleConfig{Sequence: 9})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// safeBuffer takes log lines from several goroutines.
type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// kit is a running server with a workload's worth of material.
type kit struct {
	t      testing.TB
	ca     *identitytest.CA
	feed   *Feed
	server *Server
	reg    *prometheus.Registry
	log    *safeBuffer
	conn   *grpc.ClientConn // over an in-memory pipe
	dialer func(context.Context, string) (net.Conn, error)
}

// start serves an in-memory pipe until the test ends.
func start(t testing.TB, change ...func(*Config)) *kit {
	t.Helper()
	k := &kit{
		t: t, feed: NewFeed(), reg: prometheus.NewRegistry(), log: &safeBuffer{},
		ca: identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org")),
	}
	conf := Config{Feed: k.feed, Log: slog.New(slog.NewJSONHandler(k.log, nil)), Metrics: k.reg, Now: time.Now}
	for _, f := range change {
		f(&conf)
	}
	k.server = newServer(t, conf)
	pipe := bufconn.Listen(64 << 10)
	serve(t, k.server, pipe)
	k.dialer = func(ctx context.Context, _ string) (net.Conn, error) { return pipe.DialContext(ctx) }
	k.conn = k.dial()
	return k
}

func newServer(t testing.TB, c Config) *Server {
	t.Helper()
	s, err := NewServer(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// serve runs s on l until the test ends, or until stop is called.
func serve(t testing.TB, s *Server, l net.Listener) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (k *kit) dial() *grpc.ClientConn {
	k.t.Helper()
	conn, err := grpc.NewClient("passthrough:///pipe",
		grpc.WithContextDialer(k.dialer), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (k *kit) svid(opts ...identitytest.Option) *identity.SVID {
	return k.ca.SVID(k.t, mustID(k.t, cartID), opts...)
}

// ready publishes an SVID and a bundle, and returns that state.
func (k *kit) ready() State {
	s := State{SVID: k.svid(), Bundle: newBundle(k.t, k.ca, 1)}
	k.feed.Publish(s)
	return s
}

func (k *kit) sotw(ctx context.Context) secretservice.SecretDiscoveryService_StreamSecretsClient {
	k.t.Helper()
	stream, err := secretservice.NewSecretDiscoveryServiceClient(k.conn).StreamSecrets(ctx)
	if err != nil {
		k.t.Fatal(err)
	}
	return stream
}

func (k *kit) delta(ctx context.Context) secretservice.SecretDiscoveryService_DeltaSecretsClient {
	k.t.Helper()
	stream, err := secretservice.NewSecretDiscoveryServiceClient(k.conn).DeltaSecrets(ctx)
	if err != nil {
		k.t.Fatal(err)
	}
	return stream
}

// withHeader adds the Workload API's security header.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func (k *kit) workload() workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(k.conn)
}

func (k *kit) fetchSVID(ctx context.Context) grpc.ServerStreamingClient[workload.X509SVIDResponse] {
	k.t.Helper()
	stream, err := k.workload().FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
	if err != nil {
		k.t.Fatal(err)
	}
	return stream
}

// metric returns the value of one series; zero when it is not there.
func (k *kit) metric(name string, labels ...string) float64 {
	k.t.Helper()
	families, err := k.reg.Gather()
	if err != nil {
		k.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if hasLabels(m, labels) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

func hasLabels(m *dto.Metric, values []string) bool {
	if len(m.GetLabel()) != len(values) {
		return false
	}
	for i, l := range m.GetLabel() { // sorted by name
		if l.GetValue() != values[i] {
			return false
		}
	}
	return true
}

func sendSotW(t testing.TB, s secretservice.SecretDiscoveryService_StreamSecretsClient, r *discovery.DiscoveryRequest) {
	t.Helper()
	if err := s.Send(r); err != nil {
		t.Fatal(err)
	}
}

func recv[T any](t testing.TB, s interface{ Recv() (*T, error) }) *T {
	t.Helper()
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// inTime ends what a test in a bubble waits for in vain: the server's own
// timers would keep the bubble's clock going for ever.
func inTime(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
	t.Cleanup(cancel)
	return ctx
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func identitytestKey(t testing.TB) crypto.Signer { return identitytest.NewKey(t) }
