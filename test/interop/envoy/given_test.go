package envoy

import (
	"crypto/tls"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/test/envoytest"
	"github.com/meshca/meshca/test/interop/cacerts"
)

// Envoy with certificates of a CA that Istio's recipe made, and that signs leaves
// itself: as server and as client.
func TestEnvoyBelievesAGivenCA(t *testing.T) {
	kit, _ := cacerts.New(t, cacerts.Make(t, 0))
	bundle, _ := kit.Authority.Bundle()
	cart, frontend := kit.SVID(t, "shop", "cart", time.Hour), kit.SVID(t, "shop", "frontend", time.Hour)

	socket := filepath.Join(shortDir(t), "sds.sock")
	serveSecrets(t, socket, "cart", cart, bundle)
	conf := identity.TLSConfig{SVIDs: frontend, Bundles: bundle, Authorize: identity.AuthorizeIDs(cart.ID()), Now: time.Now}
	serverConf, err := identity.ServerTLS(conf)
	if err != nil {
		t.Fatal(err)
	}
	clientConf, err := identity.ClientTLS(conf)
	if err != nil {
		t.Fatal(err)
	}
	names := envoytest.TLS{Certificate: "default", Validation: "ROOTCA", PeerIDs: []string{frontend.ID().String()}}
	envoy := startEnvoy(t, envoytest.Bootstrap{
		NodeID: "cart", Socket: socket, SDS: envoytest.StateOfTheWorld,
		Servers: []envoytest.Server{{Name: "inbound", Upstream: serve(t, nil), TLS: names}},
		Clients: []envoytest.Client{{Name: "outbound", Upstream: serve(t, serverConf), TLS: names}},
	})
	if err := envoy.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	inbound, err := tls.Dial("tcp", address(t, envoy, "inbound"), clientConf)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, inbound)
	outbound, err := net.Dial("tcp", address(t, envoy, "outbound"))
	if err != nil {
		t.Fatal(err)
	}
	echo(t, outbound)
}
