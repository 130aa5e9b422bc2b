package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
)

// refuses wants a handshake to come to nothing: in TLS 1.3 the client may learn
// of it only when it reads.
func refuses(t testing.TB, k *kit, conf *tls.Config) {
	t.Helper()
	conn := tls.Client(k.dial(), conf)
	err := conn.Handshake()
	if err == nil {
		err = tryEcho(conn, "hello")
	}
	if err == nil {
		t.Error("the peer was served")
	}
	_ = conn.Close()
}

// A session that was opened under a root does not outlive it: the cache of the
// client has nothing to resume, and the new handshake is judged by the bundle of
// now.
func TestV6_RemovedRootRefusesAResumingClient(t *testing.T) {
	k := start(t)
	conf := k.meshConfig(frontendID, "istio")
	conf.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	conf.ServerName = "cart"
	for range 2 {
		conn := k.dialTLS(conf)
		echoes(t, conn, "hello") // a ticket would come with this
		if conn.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		_ = conn.Close()
		k.next(map[string]any{"security": "mutual TLS"})
	}
	if _, ok := conf.ClientSessionCache.Get("cart"); ok {
		t.Error("the client was given a ticket")
	}
	other := identitytest.NewCA(t, k.ca.TrustDomain)
	k.world.set(other.SVID(t, identitytest.ID(t, cartID)), other.Bundle())
	refuses(t, k, conf)
	k.next(map[string]any{"end": "handshake failed", "failure": "peer not verified"})
}

func TestF54_ExpiredPeerIsRefusedNotDowngraded(t *testing.T) {
	for _, mode := range []policy.Mode{policy.Permissive, policy.Strict} {
		k := start(t, withMode(mode))
		svid := k.ca.SVID(t, identitytest.ID(t, frontendID))
		// An hour and a half later here.
		k = start(t, withMode(mode), with(func(c *Config) { c.Now = func() time.Time { return time.Now().Add(90 * time.Minute) } }),
			func(n *kit, _ *Config) {
				n.world.svid = k.ca.SVID(t, identitytest.ID(t, cartID), identitytest.WithLifetime(3*time.Hour))
				n.world.bundle = k.ca.Bundle()
			})
		refuses(t, k, configOf(svid, "istio"))
		line := k.next(map[string]any{"end": "handshake failed", "failure": "peer not verified"})
		if text, _ := line["error"].(string); !strings.Contains(text, "it ended at") {
			t.Errorf("%s: %v", mode, line)
		}
		k.app.untouched(t)
	}
}

func TestV21_F43_NoBundleIsNoPeer(t *testing.T) {
	empty, err := identity.NewBundle(identitytest.TrustDomain(t, "example.org"), identity.BundleConfig{})
	if err != nil {
		t.Fatal(err)
	}
	for name, bundle := range map[string]*identity.Bundle{"missing": nil, "empty": empty} {
		for _, mode := range []policy.Mode{policy.Permissive, policy.Strict} {
			t.Run(name+" "+mode.String(), func(t *testing.T) {
				target := newApp(t, echo)
				k := start(t, withMode(mode), withOutbound(target.address, adminID))
				k.hears("listening")
				k.world.set(k.world.svid, bundle)
				refuses(t, k, k.meshConfig(frontendID, "istio"))
				k.next(map[string]any{"end": "handshake failed", "failure": "peer not verified"})
				k.app.untouched(t)
				if k.proxy.Ready() == nil {
					t.Error("ready without a bundle")
				}
			})
		}
	}
}

func TestF60_HundredCertificatesAreNotLookedAt(t *testing.T) {
	k := start(t)
	conf := k.meshConfig(frontendID, "istio")
	chain := conf.Certificates[0].Certificate
	for len(conf.Certificates[0].Certificate) < 100 {
		conf.Certificates[0].Certificate = append(conf.Certificates[0].Certificate, chain[1])
	}
	refuses(t, k, conf)
	k.next(map[string]any{"end": "handshake failed", "failure": "peer not verified"})
}

func TestFederatedPeerIsKnownByItsOwnBundle(t *testing.T) {
	k := start(t)
	partner := identitytest.NewCA(t, identitytest.TrustDomain(t, "partner.test"))
	refuses(t, k, configOf(partner.SVID(t, identitytest.ID(t, "spiffe://partner.test/ns/a/sa/b")), "istio"))
	k.next(map[string]any{"failure": "peer not verified"})
}

func TestNoCertificateIsSaid(t *testing.T) {
	k := start(t)
	conn := k.dialTLS(&tls.Config{InsecureSkipVerify: true}) //nolint:gosec // judged by the alert
	_, err := conn.Read(make([]byte, 1))
	if err == nil || !strings.Contains(err.Error(), "certificate required") {
		t.Errorf("the client sees %v", err)
	}
	k.next(map[string]any{"end": "handshake failed", "failure": "no certificate"})
}

// mtlsServer is a target that takes mutual TLS as the given workload, and tells
// what it was offered.
func mtlsServer(t testing.TB, ca *identitytest.CA, id string, offers chan<- []string) *app {
	conf, err := identity.ServerTLS(identity.TLSConfig{
		SVIDs: ca.SVID(t, identitytest.ID(t, id)), Bundles: ca.Bundle(), Authorize: identity.AuthorizeAny(), Now: time.Now,
	})
	if err != nil {
		t.Fatal(err)
	}
	conf.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		offers <- hello.SupportedProtos
		return nil, nil
	}
	return newApp(t, func(c *net.TCPConn) {
		conn := tls.Server(c, conf)
		_, _ = io.Copy(conn, conn)
		_ = conn.Close()
	})
}

// startTo runs a proxy with an outbound listener to a target that is made with
// the proxy's own CA.
func startTo(t testing.TB, id string, target func(*identitytest.CA) *app, opts ...option) *kit {
	t.Helper()
	return start(t, append(opts, func(k *kit, c *Config) { withOutbound(target(k.ca).address, id)(k, c) })...)
}

// isLost wants a connection to be reset without a byte for the workload. When it
// is, even dialling may see it.
func isLost(t testing.TB, address, text string) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err == nil {
		defer conn.Close()
		if _, err = io.WriteString(conn, text); err == nil {
			var n int64
			if n, err = io.Copy(io.Discard, conn); n != 0 {
				t.Errorf("the workload got %d bytes", n)
			}
		}
	}
	if !isReset(err) {
		t.Errorf("the workload sees %v; want a reset", err)
	}
}

func TestV38_OutboundWantsExactlyOneID(t *testing.T) {
	for _, tt := range []struct {
		name, is string
		ok       bool
	}{
		{"the one", frontendID, true},
		{"another, of the same CA", adminID, false},
		{"a longer one", frontendID + "-2", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			offers := make(chan []string, 1)
			k := startTo(t, frontendID, func(ca *identitytest.CA) *app { return mtlsServer(t, ca, tt.is, offers) })
			conn, err := net.Dial("tcp", k.out)
			if err == nil {
				defer conn.Close()
				err = tryEcho(conn, "hello")
			}
			if (err == nil) != tt.ok {
				t.Errorf("the workload sees %v", err)
			}
			if offer := <-offers; !slices.Equal(offer, []string{"istio"}) {
				t.Errorf("offered %q", offer)
			}
			if !tt.ok {
				if !isReset(err) {
					t.Errorf("the workload sees %v; want a reset", err)
				}
				k.next(map[string]any{"direction": "outbound", "end": "handshake failed", "failure": "peer not verified", "security": "none"})
				return
			}
			_ = conn.Close()
			k.next(map[string]any{"direction": "outbound", "end": "closed", "security": "mutual TLS", "spiffe_id": frontendID, "bytes_to_peer": 5.0, "bytes_to_app": 5.0})
		})
	}
}

// Whatever the target is, no byte of the workload reaches it in the clear.
func TestV21_OutboundIsNeverPlaintext(t *testing.T) {
	const secret = "the workload's secret"
	for name, speaks := range map[string]string{"silent": "", "plaintext": greeting, "an alert": "\x15\x03\x03\x00\x02\x02\x46"} {
		t.Run(name, func(t *testing.T) {
			got := make(chan []byte, 1)
			target := newApp(t, func(c *net.TCPConn) {
				_, _ = io.WriteString(c, speaks)
				all, _ := io.ReadAll(c)
				got <- all
			})
			k := start(t, with(hasty), withOutbound(target.address, adminID))
			isLost(t, k.out, secret)
			if all := <-got; strings.Contains(string(all), secret) || len(all) > 0 && all[0] != recordHandshake && all[0] != 0x15 {
				t.Errorf("the target got %q", all)
			}
			k.next(map[string]any{"direction": "outbound", "end": "handshake failed", "security": "none", "bytes_to_peer": 0.0})
		})
	}
}

func TestUnreachableIsReset(t *testing.T) {
	l := listenLocal(t)
	_ = l.Close() // nobody is there
	gone := &app{address: l.Addr().String()}
	k := start(t, withMode(policy.Disable), withApp(gone), withOutbound(gone.address, adminID))
	isLost(t, k.out, "")
	k.next(map[string]any{"direction": "outbound", "end": "unreachable", "security": "none"})
	ended(t, k.dial())
	k.next(map[string]any{"direction": "inbound", "end": "unreachable"})
}

// A peer that refuses our certificate says so after the handshake, as TLS 1.3
// has it.
func TestPeerThatRefusesUsIsSeen(t *testing.T) {
	k := startTo(t, frontendID, func(ca *identitytest.CA) *app {
		conf, err := identity.ServerTLS(identity.TLSConfig{
			SVIDs: ca.SVID(t, identitytest.ID(t, frontendID)), Bundles: ca.Bundle(), Now: time.Now,
			Authorize: func(identity.ID) error { return errors.New("not this one") },
		})
		if err != nil {
			t.Fatal(err)
		}
		return newApp(t, func(c *net.TCPConn) {
			_ = tls.Server(c, conf).HandshakeContext(context.Background())
			_ = c.CloseWrite()
			_, _ = io.Copy(io.Discard, c)
		})
	})
	isLost(t, k.out, "")
	line := k.next(map[string]any{"direction": "outbound", "end": "reset"})
	if text, _ := line["error"].(string); !strings.Contains(text, "bad certificate") {
		t.Errorf("%v", line)
	}
}
