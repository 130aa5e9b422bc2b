package envoy

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/test/envoytest"
	"github.com/meshca/meshca/test/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The tests here prove the harness itself: Envoy gets its secrets from Envoy's
// own control plane library, so what fails is not meshca.

func TestHarnessEnvoyServesAndDialsMutualTLS(t *testing.T) {
	for name, sds := range map[string]envoytest.SDSType{
		"state of the world": envoytest.StateOfTheWorld,
		"delta":              envoytest.Delta,
	} {
		t.Run(name, func(t *testing.T) { harnessMutualTLS(t, sds) })
	}
}

func harnessMutualTLS(t *testing.T, sds envoytest.SDSType) {
	ctx := t.Context()
	ca := identitytest.NewCA(t, trustDomain(t))
	cart, frontend := workloadID(t, "shop", "cart"), workloadID(t, "shop", "frontend")
	svid := ca.SVID(t, cart)

	socket := filepath.Join(shortDir(t), "sds.sock")
	serveSecrets(t, socket, "cart", svid, ca.Bundle())
	conf := tlsConfig(t, ca, frontend, cart)
	secure := serve(t, conf.server)
	plain := serve(t, nil)
	names := envoytest.TLS{Certificate: "default", Validation: "ROOTCA", PeerIDs: []string{frontend.String()}}
	envoy := startEnvoy(t, envoytest.Bootstrap{
		NodeID: "cart", Socket: socket, SDS: sds,
		Servers: []envoytest.Server{{Name: "inbound", Upstream: plain, TLS: names}},
		Clients: []envoytest.Client{{Name: "outbound", Upstream: secure, TLS: names}},
	})
	if err := envoy.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}

	// Envoy as server: it demands our certificate and shows its own.
	conn, err := tls.Dial("tcp", address(t, envoy, "inbound"), conf.client)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, conn)

	// Envoy as client: plaintext in, mutual TLS out.
	outbound, err := net.Dial("tcp", address(t, envoy, "outbound"))
	if err != nil {
		t.Fatal(err)
	}
	echo(t, outbound)

	// Envoy's rule in the listener and its trust in the secret both count.
	stranger := tlsConfig(t, ca, workloadID(t, "shop", "stranger"), cart)
	if conn, err := tls.Dial("tcp", address(t, envoy, "inbound"), stranger.client); err == nil {
		defer conn.Close()
		if _, err := io.ReadFull(conn, make([]byte, 1)); err == nil {
			t.Error("Envoy let a peer in that its listener does not name")
		}
	}
	if err := envoy.WaitStat(ctx, "listener.inbound.ssl.fail_verify_san", 1); err != nil {
		t.Error(err)
	}
}

func trustDomain(t *testing.T) identity.TrustDomain {
	t.Helper()
	td, err := identity.ParseTrustDomain("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	return td
}

func workloadID(t *testing.T, namespace, serviceAccount string) identity.ID {
	t.Helper()
	id, err := identity.WorkloadID(trustDomain(t), namespace, serviceAccount)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// shortDir is a directory whose sockets' paths fit into the 108 bytes that
// the kernel allows, which t.TempDir's do not always.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "envoy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func startEnvoy(t *testing.T, b envoytest.Bootstrap) *envoytest.Envoy {
	t.Helper()
	c, err := testenv.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	binary, err := testenv.Envoy(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	e, err := envoytest.Start(t.Context(), binary, t.TempDir(), b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("Envoy's log:\n%s", e.Process().LogTail(40))
		}
	})
	return e
}

func address(t *testing.T, e *envoytest.Envoy, listener string) string {
	t.Helper()
	a, err := e.Address(t.Context(), listener)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// serveSecrets serves "default" and "ROOTCA" to the node on the socket.
func serveSecrets(t *testing.T, socket, node string, svid *identity.SVID, bundle *identity.Bundle) {
	t.Helper()
	key, err := svid.MarshalKey()
	if err != nil {
		t.Fatal(err)
	}
	inline := func(b []byte) *core.DataSource {
		return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: b}}
	}
	snapshot, err := cache.NewSnapshot("1", map[resource.Type][]types.Resource{resource.SecretType: {
		&tlsv3.Secret{Name: "default", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(identity.EncodePEM(svid.Certificates()...)), PrivateKey: inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		}}},
		&tlsv3.Secret{Name: "ROOTCA", Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			TrustedCa: inline(bundle.MarshalPEM()),
		}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	secrets := cache.NewSnapshotCache(false, cache.IDHash{}, nil)
	if err := secrets.SetSnapshot(t.Context(), node, snapshot); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	// Not the test's context: it ends before the cleanup that stops Envoy.
	ctx, cancel := context.WithCancel(context.Background())
	g := grpc.NewServer()
	secretservice.RegisterSecretDiscoveryServiceServer(g, server.NewServer(ctx, secrets, nil))
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(func() {
		cancel()
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// bothSides are the TLS configurations of one of our own programs.
type bothSides struct{ client, server *tls.Config }

func tlsConfig(t *testing.T, ca *identitytest.CA, self, peer identity.ID) bothSides {
	t.Helper()
	c := identity.TLSConfig{
		SVIDs: ca.SVID(t, self), Bundles: ca.Bundle(), Authorize: identity.AuthorizeIDs(peer), Now: time.Now,
	}
	client, err := identity.ClientTLS(c)
	if err != nil {
		t.Fatal(err)
	}
	server, err := identity.ServerTLS(c)
	if err != nil {
		t.Fatal(err)
	}
	return bothSides{client, server}
}

// serve echoes what it gets, over TLS if there is a configuration.
func serve(t *testing.T, conf *tls.Config) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if conf != nil {
		l = tls.NewListener(l, conf)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return l.Addr().String()
}

// echo says something and wants to hear it again.
func echo(t *testing.T, conn net.Conn) {
	t.Helper()
	defer conn.Close()
	const word = "hello, other side"
	if _, err := fmt.Fprint(conn, word); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(word))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != word {
		t.Fatalf("heard %q, %v; want %q", got, err, word)
	}
}
