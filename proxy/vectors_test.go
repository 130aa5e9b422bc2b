package proxy

import (
	"crypto/tls"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
)

// federated is a world that believes what the set of peers says.
type federated struct {
	*world
	*identitytest.Peers
}

func (f federated) Bundle(td identity.TrustDomain) (*identity.Bundle, error) {
	return f.Peers.Bundle(td)
}

func (f federated) SVID() (*identity.SVID, error) { return f.world.SVID() }

// withPeers lets the proxy judge by the bundles and at the instant of the set.
func withPeers(peers *identitytest.Peers) option {
	return func(k *kit, c *Config) {
		k.world.svid = peers.SVID(k.t, identitytest.ID(k.t, cartID))
		c.Identity = federated{k.world, peers}
		c.Now = func() time.Time { return peers.Now }
	}
}

// configFor shows a peer's certificates.
func configFor(p identitytest.Peer, alpn ...string) *tls.Config {
	certificate := tls.Certificate{PrivateKey: p.Key}
	for _, c := range p.Chain {
		certificate.Certificate = append(certificate.Certificate, c.Raw)
	}
	return &tls.Config{
		InsecureSkipVerify: true, //nolint:gosec // it is the proxy that judges
		Certificates:       []tls.Certificate{certificate}, NextProtos: alpn,
	}
}

// Whatever way a peer comes in, through whichever of the listener's
// configurations, it gets the verdict of the set.
func TestV24_V64_InboundPeers(t *testing.T) {
	peers := identitytest.NewPeers(t, identitytest.ID(t, frontendID))
	for _, way := range []struct {
		name string
		mode policy.Mode
		alpn []string
	}{
		{"PERMISSIVE", policy.Permissive, []string{"istio"}},
		{"PERMISSIVE, HTTP", policy.Permissive, []string{"istio-h2", "istio", "h2"}},
		{"STRICT", policy.Strict, []string{"istio"}},
		{"STRICT, no ALPN", policy.Strict, nil},
		{"STRICT, HTTP", policy.Strict, []string{"http/1.1"}},
	} {
		t.Run(way.name, func(t *testing.T) {
			k := start(t, withMode(way.mode), withPeers(peers))
			for _, p := range peers.All {
				conn := tls.Client(k.dial(), configFor(p, way.alpn...))
				err := conn.Handshake()
				if err == nil {
					err = tryEcho(conn, "hello")
				}
				_ = conn.Close()
				line := k.next(nil)
				switch {
				case p.AsClient && (err != nil || line["spiffe_id"] != p.Claims.String() || line["security"] != "mutual TLS"):
					t.Errorf("%s: %v; the log: %v", p.Name, err, line)
				case !p.AsClient && (err == nil || line["end"] != "handshake failed" || line["security"] != "none"):
					t.Errorf("%s: served; the log: %v", p.Name, line)
				}
				if p.AsClient {
					k.app.accepted(t)
				}
			}
			k.app.untouched(t)
		})
	}
}

// The same set as targets of the outbound side, which wants the one ID besides.
func TestV24_V64_OutboundPeers(t *testing.T) {
	peers := identitytest.NewPeers(t, identitytest.ID(t, frontendID))
	show := make(chan *tls.Config, 1)
	target := newApp(t, tlsEcho(show))
	k := start(t, withPeers(peers), withOutbound(target.address, frontendID))
	for _, p := range peers.All {
		conf := configFor(p, "istio")
		conf.ClientAuth = tls.RequireAnyClientCert
		show <- conf
		conn, err := net.Dial("tcp", k.out) // even this may see the reset
		if err == nil {
			err = tryEcho(conn, "hello")
			_ = conn.Close()
		}
		line := k.next(map[string]any{"direction": "outbound"})
		switch good := p.AsServer && p.Claims.String() == frontendID; {
		case good && (err != nil || line["security"] != "mutual TLS"):
			t.Errorf("%s: %v; the log: %v", p.Name, err, line)
		case !good && (err == nil || line["end"] != "handshake failed"):
			t.Errorf("%s: it is believed; the log: %v", p.Name, line)
		}
	}
	if !slices.ContainsFunc(peers.All, func(p identitytest.Peer) bool { return p.AsServer && p.Claims.String() != frontendID }) {
		t.Error("the set has no good peer of another ID")
	}
}
