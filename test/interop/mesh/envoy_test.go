package mesh

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/envoytest"
	"github.com/meshca/meshca/test/testenv"
)

// TestV30_EnvoyByEveryNameAndProtocol: an Envoy serves with two listeners
// that share a validation context and differ in whom they let in; another one
// dials it.
func TestV30_EnvoyByEveryNameAndProtocol(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 0)
	ca := m.startCA(t)
	e := ends{
		app:      backend(t),
		cart:     m.workload(t, "cart").startReadyAgent(t, ca),
		frontend: m.workload(t, "frontend").startReadyAgent(t, ca),
		admin:    m.workload(t, "admin").startReadyAgent(t, ca),
	}
	istio := func(string) envoytest.TLS { return envoytest.TLS{Certificate: "default", Validation: "ROOTCA"} }
	spire := func(id string) envoytest.TLS {
		return envoytest.TLS{Certificate: id, Validation: "spiffe://" + trustDomain}
	}
	all := func(id string) envoytest.TLS { return envoytest.TLS{Certificate: id, Validation: "ALL"} }
	for _, tt := range []struct {
		name  string
		sds   envoytest.SDSType
		names func(id string) envoytest.TLS
	}{
		{"state of the world, Istio's names", envoytest.StateOfTheWorld, istio},
		{"state of the world, SPIRE's names", envoytest.StateOfTheWorld, spire},
		{"delta, Istio's names", envoytest.Delta, istio},
		{"delta, SPIRE's names", envoytest.Delta, spire},
		{"delta, ALL", envoytest.Delta, all},
	} {
		t.Run(tt.name, func(t *testing.T) { e.run(t, tt.sds, tt.names) })
	}
}

// ends are the programs that a pair of Envoys stands between.
type ends struct {
	app                   string
	cart, frontend, admin *Agent
}

func (e ends) run(t *testing.T, sds envoytest.SDSType, names func(id string) envoytest.TLS) {
	ctx := t.Context()
	tls := func(of *Agent, peers ...*Agent) envoytest.TLS {
		c := names(of.id)
		for _, p := range peers {
			c.PeerIDs = append(c.PeerIDs, p.id)
		}
		return c
	}
	server := startReadyEnvoy(t, envoytest.Bootstrap{NodeID: "cart", Socket: e.cart.socket, SDS: sds, Servers: []envoytest.Server{
		{Name: "for-frontend", Upstream: e.app, TLS: tls(e.cart, e.frontend)},
		{Name: "for-admin", Upstream: e.app, TLS: tls(e.cart, e.admin)},
	}})
	forFrontend, forAdmin := listener(t, server, "for-frontend"), listener(t, server, "for-admin")
	client := startReadyEnvoy(t, envoytest.Bootstrap{NodeID: "frontend", Socket: e.frontend.socket, SDS: sds, Clients: []envoytest.Client{
		{Name: "to-own", Upstream: forFrontend, TLS: tls(e.frontend, e.cart)},
		{Name: "to-admins", Upstream: forAdmin, TLS: tls(e.frontend, e.cart)},
		{Name: "expects-admin", Upstream: forFrontend, TLS: tls(e.frontend, e.admin)},
	}})

	if err := once(ctx, listener(t, client, "to-own"), nil); err != nil {
		t.Fatalf("a request through both Envoys: %v", err) // nothing else could be told from this
	}
	if err := once(ctx, listener(t, client, "to-admins"), nil); !isRefusal(err) {
		t.Errorf("Envoy as a client at the other listener: %v; want a refusal", err)
	}
	wantStat(t, server, "listener.for-admin.ssl.fail_verify_san", 1)
	if err := once(ctx, listener(t, client, "expects-admin"), nil); !isRefusal(err) {
		t.Errorf("Envoy as a client that expects another server: %v; want a refusal", err)
	}
	wantStat(t, client, "cluster.expects-admin.ssl.fail_verify_san", 1)

	for _, as := range []struct {
		client        *Agent
		passes, fails string
	}{
		{e.frontend, forFrontend, forAdmin},
		{e.admin, forAdmin, forFrontend},
	} {
		s := source(t, as.client)
		if err := once(ctx, as.passes, goSpiffeClient(s, e.cart.id)); err != nil {
			t.Errorf("go-spiffe as %s: %v", as.client.id, err)
		}
		if err := once(ctx, as.fails, goSpiffeClient(s, e.cart.id)); !isRefusal(err) {
			t.Errorf("go-spiffe as %s at the other listener: %v; want a refusal", as.client.id, err)
		}
		if err := once(ctx, as.passes, goSpiffeClient(s, as.client.id)); !isRefusal(err) {
			t.Errorf("go-spiffe expecting %s from Envoy: %v; want a refusal", as.client.id, err)
		}
	}
	wantStat(t, server, "listener.for-frontend.ssl.fail_verify_san", 1)

	t.Run("openssl", func(t *testing.T) {
		if err := openssl(t, e.frontend, forFrontend); err != nil {
			t.Error(err)
		}
		if err := openssl(t, e.admin, forFrontend); err == nil {
			t.Errorf("openssl as %s was let in", e.admin.id)
		}
	})
}

// wantStat waits for the reason that Envoy counts, which tells a refusal from
// an accident.
func wantStat(t *testing.T, e *envoytest.Envoy, name string, atLeast uint64) {
	t.Helper()
	if err := e.WaitStat(t.Context(), name, atLeast); err != nil {
		t.Error(err)
	}
}

// TestDocumentedBootstrap runs deploy/envoy/mtls.yaml at both ends, with nothing
// changed but what it tells its reader to change.
func TestDocumentedBootstrap(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 0)
	ca := m.startCA(t)
	app := backend(t)
	pay := m.workload(t, "pay").startReadyAgent(t, ca)
	cart := m.workload(t, "cart").startReadyAgent(t, ca)
	frontend := source(t, m.workload(t, "frontend").startReadyAgent(t, ca))
	for _, sds := range []envoytest.SDSType{envoytest.StateOfTheWorld, envoytest.Delta} {
		t.Run(string(sds), func(t *testing.T) {
			ctx := t.Context()
			server := documentedEnvoy(t, sds, pay, cart.id, app, "127.0.0.1:9")
			client := documentedEnvoy(t, sds, cart, spiffeID("frontend"), app, listener(t, server, "inbound"))
			if err := once(ctx, listener(t, client, "outbound"), nil); err != nil {
				t.Errorf("a request through both Envoys: %v", err)
			}
			if err := once(ctx, listener(t, client, "inbound"), goSpiffeClient(frontend, cart.id)); err != nil {
				t.Errorf("go-spiffe as the one that is let in: %v", err)
			}
			if err := once(ctx, listener(t, server, "inbound"), goSpiffeClient(frontend, pay.id)); !isRefusal(err) {
				t.Errorf("go-spiffe as one that is not let in: %v; want a refusal", err)
			}
			for _, e := range []*envoytest.Envoy{server, client} {
				if log := e.Process().Log(); strings.Contains(string(log), "eprecated") {
					t.Errorf("Envoy finds the bootstrap outdated:\n%s", log)
				}
			}
		})
	}
}

// documentedEnvoy runs the documented bootstrap. The ports to listen on become
// 0, so that tests can run side by side.
func documentedEnvoy(t *testing.T, sds envoytest.SDSType, a *Agent, allowed, app, peer string) *envoytest.Envoy {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(root, "deploy", "envoy", "mtls.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	port := func(address string) string { return "port_value: " + address[strings.LastIndex(address, ":")+1:] + "}" }
	for _, change := range [][2]string{
		{"port_value: 9901}", port(":0")},
		{"port_value: 15006}", port(":0")},
		{"port_value: 15001}", port(":0")},
		{"port_value: 8080}", port(app)},
		{"port_value: 15016}", port(peer)},
		{"{exact: " + spiffeID("frontend") + "}", "{exact: " + allowed + "}"},
		{"api_type: GRPC # or DELTA_GRPC", "api_type: " + string(sds)},
		{"{path: /run/meshca/agent.sock}", "{path: " + a.socket + "}"},
	} {
		if n := strings.Count(text, change[0]); n != 1 {
			t.Fatalf("deploy/envoy/mtls.yaml holds %q %d times, want once", change[0], n)
		}
		text = strings.Replace(text, change[0], change[1], 1)
	}
	dir := shortDir(t)
	file := filepath.Join(dir, "mtls.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	e, err := envoytest.StartFile(t.Context(), envoyBinary(t), dir, file)
	if err != nil {
		t.Fatal(err)
	}
	stopWithTest(t, e)
	if err := e.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	return e
}
