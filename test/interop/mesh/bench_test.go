package mesh

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/sds"
	"github.com/meshca/meshca/test/testenv"
)

// report adds the median and the 99th percentile to a benchmark's line.
func report(b *testing.B, samples []time.Duration) {
	slices.Sort(samples)
	at := func(share float64) float64 {
		i := int(math.Ceil(share*float64(len(samples)))) - 1
		return float64(samples[i]) / float64(time.Millisecond)
	}
	b.ReportMetric(0, "ns/op") // would count what is not measured
	b.ReportMetric(at(0.50), "p50-ms")
	b.ReportMetric(at(0.99), "p99-ms")
	b.ReportMetric(at(1), "max-ms")
}

// BenchmarkFirstSVID is the time from a token in a file to an SVID at an xDS
// client: a new agent in this process, the CA in its own, the client on the
// agent's socket. It covers reading the token, making the key, TLS to the CA,
// the signature with its audit records, the verification and the delivery.
// Run it with -benchtime=500x.
func BenchmarkFirstSVID(b *testing.B) {
	m := newMesh(b, 0)
	ca := m.startCA(b)
	w := m.workload(b, "cart")
	var samples []time.Duration
	for b.Loop() {
		samples = append(samples, firstSVIDInProcess(b, w, ca))
	}
	report(b, samples)
}

func firstSVIDInProcess(b *testing.B, w *Workload, ca *CA) time.Duration {
	td, err := identity.ParseTrustDomain(trustDomain)
	if err != nil {
		b.Fatal(err)
	}
	socket := filepath.Join(w.mesh.dir, "bench.sock")
	log, metrics := slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()

	began := time.Now()
	client, err := caclient.New(caclient.Config{
		Addresses: []string{ca.address}, TrustDomain: td, AnchorFile: w.mesh.anchor(), Now: time.Now,
	})
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	feed := sds.NewFeed()
	a, err := agent.New(agent.Config{
		CA: client, Token: caclient.TokenFile(w.tokenFile), Feed: feed, Now: time.Now, Log: log, Metrics: metrics,
	})
	if err != nil {
		b.Fatal(err)
	}
	server, err := sds.NewServer(sds.Config{Feed: feed, Log: log, Metrics: metrics, Now: time.Now})
	if err != nil {
		b.Fatal(err)
	}
	l, err := sds.Listen(socket, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error { return server.Serve(ctx, l) })
	if err := awaitSVID(ctx, socket); err != nil {
		b.Fatal(err)
	}
	took := time.Since(began)
	cancel()
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	return took
}

// BenchmarkFirstSVIDOfAProcess is the same from the start of an agent's process.
func BenchmarkFirstSVIDOfAProcess(b *testing.B) {
	m := newMesh(b, 0)
	ca := m.startCA(b)
	w := m.workload(b, "cart")
	a := w.startReadyAgent(b, ca)
	a.Kill9(b)
	var samples []time.Duration
	for b.Loop() {
		began := time.Now()
		if err := a.launch(); err != nil {
			b.Fatal(err)
		}
		if err := awaitSVID(b.Context(), a.socket); err != nil {
			b.Fatal(err)
		}
		samples = append(samples, time.Since(began))
		a.Kill9(b)
	}
	report(b, samples)
}

// awaitSVID connects to the socket, as often as it takes, and returns when the
// secret "default" has come, state of the world.
func awaitSVID(ctx context.Context, socket string) error {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: time.Millisecond, Multiplier: 1, MaxDelay: time.Millisecond},
			MinConnectTimeout: patience,
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	stream, err := secretservice.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	err = stream.Send(&discovery.DiscoveryRequest{
		Node: &core.Node{Id: "bench"}, ResourceNames: []string{"default"},
		TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
	})
	if err != nil && err != io.EOF { // Recv says why
		return err
	}
	resp, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(resp.GetResources()) != 1 {
		return fmt.Errorf("%d secrets came, want one", len(resp.GetResources()))
	}
	var secret tlsv3.Secret
	if err := resp.GetResources()[0].UnmarshalTo(&secret); err != nil {
		return err
	}
	if len(secret.GetTlsCertificate().GetCertificateChain().GetInlineBytes()) == 0 {
		return fmt.Errorf("secret %q holds no certificate", secret.GetName())
	}
	return nil
}

// BenchmarkFirstSVIDEnvoy is the time from the start of an Envoy to its first
// TLS handshake with the agent's certificate, and for comparison the same with
// a certificate from a file. The agent has the certificate already.
// Run it with -benchtime=20x.
func BenchmarkFirstSVIDEnvoy(b *testing.B) {
	m := newMesh(b, 0)
	a := m.workload(b, "cart").startReadyAgent(b, m.startCA(b))
	svid, err := source(b, a).GetX509SVID()
	if err != nil {
		b.Fatal(err)
	}
	chain, key, err := svid.Marshal()
	if err != nil {
		b.Fatal(err)
	}
	static := fmt.Sprintf(`tls_certificates: [{certificate_chain: {filename: %s}, private_key: {filename: %s}}]`,
		m.write(b, "static.crt", chain), m.write(b, "static.key", key))
	const bySDS = `tls_certificate_sds_secret_configs: [{name: default, sds_config: {resource_api_version: V3, initial_fetch_timeout: 0s,
          api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: agent}}]}}}]`
	for _, kind := range []struct{ name, certificate string }{{"SDS", bySDS}, {"static", static}} {
		b.Run(kind.name, func(b *testing.B) {
			var samples []time.Duration
			for b.Loop() {
				samples = append(samples, envoyStart(b, a, kind.certificate))
			}
			report(b, samples)
		})
	}
}

const benchBootstrap = `
node: {id: bench, cluster: bench}
static_resources:
  listeners:
  - name: inbound
    address: {socket_address: {address: 127.0.0.1, port_value: %s}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
            %s
      filters:
      - name: envoy.filters.network.echo
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo}
  clusters:
  - name: agent
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: agent
      endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %s}}}}]}]
`

func envoyStart(b *testing.B, a *Agent, certificate string) time.Duration {
	port := freePort(b)
	file := filepath.Join(shortDir(b), "envoy.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, benchBootstrap, port, certificate, a.socket), 0o600); err != nil {
		b.Fatal(err)
	}
	binary := envoyBinary(b)
	began := time.Now()
	p, err := testenv.Start(file+".log", binary, "--config-path", file,
		"--disable-hot-restart", "--concurrency", "2", "--log-level", "warning")
	if err != nil {
		b.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		chain, err := certificatesAt(b.Context(), "127.0.0.1:"+port)
		if err == nil {
			took := time.Since(began)
			if chain[0].URIs[0].String() != a.id {
				b.Fatalf("Envoy shows %s", chain[0].URIs[0])
			}
			if err := p.Kill(); err != nil {
				b.Fatal(err)
			}
			return took
		}
		if err := p.Exited(); err != nil || time.Since(began) > patience {
			b.Fatalf("no handshake with Envoy: %v", err)
		}
		<-tick.C
	}
}
