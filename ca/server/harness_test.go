package server

import (
	"context"
	"crypto"
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
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	cartURI = "spiffe://cluster.local/ns/shop/sa/cart"
	podUID  = "7f9c1e2a-4f0e-4c3e-9d55-0a1b2c3d4e5f"
	nodeUID = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
	dnsName = "meshca.test"
)

// gate is an audit trail that can be held up.
type gate struct {
	mu   sync.Mutex
	hold chan struct{}  // nil: let through
	in   chan struct{}  // gets an item when a record waits
	who  *caller.Caller // of the last record that has one
}

func (g *gate) last() *caller.Caller {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.who
}

// forget lets last return nil until there is another record with a caller.
func (g *gate) forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.who = nil
}

func (g *gate) Record(ctx context.Context, e ca.Event) error {
	g.mu.Lock()
	hold := g.hold
	if e.Caller != nil {
		g.who = e.Caller
	}
	g.mu.Unlock()
	if hold == nil || e.Kind == ca.KindServing {
		return nil
	}
	if e.Kind == ca.KindSVID {
		g.in <- struct{}{}
	}
	select {
	case <-hold:
	case <-ctx.Done():
	}
	return ctx.Err()
}

func (g *gate) close() (open func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	hold := make(chan struct{})
	g.hold = hold
	return sync.OnceFunc(func() {
		g.mu.Lock()
		g.hold = nil
		g.mu.Unlock()
		close(hold)
	})
}

type harness struct {
	td        identity.TrustDomain
	kit       *catest.Kit
	authority *ca.Authority
	server    *Server
	log       *journal
	registry  *prometheus.Registry
	tokenKey  *ecdsa.PrivateKey
	tokens    *tokenissuer.Issuer
	gate      *gate
	address   string
	roots     *x509.CertPool
	dialer    func(context.Context, string) (net.Conn, error) // nil: by address
	stop      func()                                          // ends Serve and waits for it
}

type settings struct {
	server    Config
	authority ca.Config
	keys      token.KeySource
	upstream  func(ca.Upstream) ca.Upstream
	byCert    []string
	cluster   *caller.Cluster     // of the token issuer
	believes  *identitytest.Peers // what certificates are judged by; nil: the authority's bundle
	unready   bool                // do not wait for a certificate
	listener  net.Listener
	bubble    bool // inside a synctest bubble: over a pipe, and time must move
}

// start serves a real authority over loopback, until the test ends.
func start(t testing.TB, change func(*settings)) *harness {
	t.Helper()
	h := &harness{log: newJournal(), registry: prometheus.NewRegistry(), gate: &gate{in: make(chan struct{}, 16)}}
	set := settings{upstream: func(u ca.Upstream) ca.Upstream { return u }}
	if change != nil {
		change(&set)
	}
	h.kit = catest.New(t)
	h.td = h.kit.TrustDomain
	log := slog.New(slog.NewJSONHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug}))

	set.authority.TrustDomain, set.authority.Log = h.td, log
	set.authority.Upstream, set.authority.Audit = set.upstream(h.kit.Upstream), h.gate
	var err error
	h.authority, err = ca.New(set.authority)
	must(t, err)
	h.authenticate(t, &set)

	set.server.Authority, set.server.Log, set.server.Metrics = h.authority, log, h.registry
	set.server.Names = ca.ServingNames{DNS: []string{dnsName}, IPs: []net.IP{net.IPv4(127, 0, 0, 1).To4()}}
	h.server, err = New(set.server)
	must(t, err)

	pemRoots, err := os.ReadFile(h.kit.Anchor)
	must(t, err)
	h.roots = x509.NewCertPool()
	h.roots.AppendCertsFromPEM(pemRoots)
	if set.bubble {
		pipe := bufconn.Listen(1 << 20)
		h.dialer = func(ctx context.Context, _ string) (net.Conn, error) { return pipe.DialContext(ctx) }
		set.listener = pipe
	}
	if set.listener == nil {
		set.listener, err = net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
	}
	h.address = set.listener.Addr().String()
	h.run(t, set.listener)
	for !set.unready && h.server.Ready() != nil {
		if set.bubble {
			<-time.After(time.Second)
		}
		runtime.Gosched()
	}
	return h
}

func (h *harness) authenticate(t testing.TB, set *settings) {
	t.Helper()
	var err error
	h.tokenKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	h.tokens, err = tokenissuer.New(tokenissuer.Config{URL: catest.Issuer, Key: h.tokenKey})
	must(t, err)
	if set.keys == nil {
		set.keys = h.tokens
	}
	verifier, err := token.New(token.Config{Issuers: []token.Issuer{{
		URL: catest.Issuer, Keys: set.keys, Audiences: map[string]time.Duration{catest.Audience: time.Hour}, RequirePod: true,
	}}})
	must(t, err)
	config := caller.Config{Tokens: verifier, TrustDomain: h.td, Bundles: h.authority.Bundles()}
	if set.cluster != nil {
		config.Clusters = map[string]caller.Cluster{catest.Issuer: *set.cluster}
	}
	if set.believes != nil {
		config.Bundles, config.Now = set.believes, func() time.Time { return set.believes.Now }
	}
	for _, s := range set.byCert {
		id, err := identity.ParseID(s)
		must(t, err)
		config.ByCertificate = append(config.ByCertificate, id)
	}
	set.server.Authenticator, err = caller.New(config)
	must(t, err)
}

func (h *harness) run(t testing.TB, l net.Listener) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = h.authority.Run(ctx) })
	serving, stopServing := context.WithCancel(ctx)
	ended := make(chan error, 1)
	running.Go(func() { ended <- h.server.Serve(serving, l) })
	h.stop = sync.OnceFunc(func() {
		stopServing()
		if err := <-ended; err != nil {
			t.Errorf("Serve = %v", err)
		}
	})
	t.Cleanup(func() {
		h.stop()
		cancel()
		running.Wait()
		for _, secret := range []string{"eyJhb", "PRIVATE KEY"} {
			if strings.Contains(h.log.String(), secret) {
				t.Errorf("the log contains %q", secret)
			}
		}
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func claims() tokenissuer.Claims {
	return tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: "cart", PodName: "cart-0", PodUID: podUID,
		NodeName: "node-1", NodeUID: nodeUID, Audience: []string{catest.Audience}, Lifetime: time.Hour,
	}
}

func (h *harness) token(t testing.TB, change func(*tokenissuer.Claims)) string {
	t.Helper()
	c := claims()
	if change != nil {
		change(&c)
	}
	raw, err := h.tokens.Issue(c)
	must(t, err)
	return raw
}

func (h *harness) clientTLS() *tls.Config {
	return &tls.Config{RootCAs: h.roots, ServerName: dnsName, MinVersion: tls.VersionTLS13}
}

// dial connects as a client that verifies the server. change may be nil.
func (h *harness) dial(t testing.TB, change func(*tls.Config)) *grpc.ClientConn {
	t.Helper()
	c := h.clientTLS()
	if change != nil {
		change(c)
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(credentials.NewTLS(c)), grpc.WithDisableServiceConfig()}
	if h.dialer != nil {
		options = append(options, grpc.WithContextDialer(h.dialer))
	}
	conn, err := grpc.NewClient("passthrough:"+h.address, options...)
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// bearer makes a context that carries authorization values.
func bearer(t testing.TB, values ...string) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	for _, v := range values {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", v)
	}
	return ctx
}

func (h *harness) good(t testing.TB) context.Context {
	t.Helper()
	return bearer(t, "Bearer "+h.token(t, nil))
}

func (h *harness) create(t testing.TB, ctx context.Context, req *istio.IstioCertificateRequest) (*istio.IstioCertificateResponse, error) {
	t.Helper()
	return istio.NewIstioCertificateServiceClient(h.dial(t, nil)).CreateCertificate(ctx, req)
}

type deltaClient = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

func (h *harness) delta(t testing.TB, ctx context.Context) deltaClient {
	t.Helper()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(h.dial(t, nil)).DeltaAggregatedResources(ctx)
	must(t, err)
	return stream
}

// newCSR makes an ordinary CSR; change may be nil.
func newCSR(t testing.TB, key crypto.Signer, change func(*x509.CertificateRequest)) string {
	t.Helper()
	template := &x509.CertificateRequest{}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	must(t, err)
	return armor(der)
}

func armor(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// metric reads a series by its only label's value; label is empty if it has none.
func (h *harness) metric(t testing.TB, name, label string) float64 {
	t.Helper()
	families, err := h.registry.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if label == "" || m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	t.Fatalf("no series %s{%s}", name, label)
	return 0
}

func pastClock(seconds int) func() time.Time {
	return func() time.Time { return time.Now().Add(-time.Duration(seconds) * time.Second) }
}

// svid has a certificate issued to the cart, over the wire.
func (h *harness) svid(t testing.TB) *tls.Certificate {
	t.Helper()
	key := catest.NewKey(t)
	resp, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, key, nil)})
	must(t, err)
	s, _ := svidOf(t, resp, key)
	pair := &tls.Certificate{PrivateKey: key}
	for _, c := range s.Certificates() {
		pair.Certificate = append(pair.Certificate, c.Raw)
	}
	return pair
}
