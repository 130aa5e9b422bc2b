package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

const pay = "spiffe://cluster.local/ns/shop/sa/pay"

// handshake runs one over loopback, both ways, and one byte from the server
// after it: that is when a TLS 1.3 client learns that it was refused, and when
// it gets its session tickets. (Over a net.Pipe, two ends that refuse each other
// at once would wait for each other for ever: nothing is buffered there.)
func handshake(tb testing.TB, server, client *tls.Config) (cs, ss tls.ConnectionState, cerr, serr error) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			serr = err
			return
		}
		defer conn.Close()
		s := tls.Server(conn, server)
		if serr = s.Handshake(); serr != nil {
			return
		}
		ss = s.ConnectionState()
		_, serr = s.Write([]byte{1})
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	c := tls.Client(conn, client)
	if cerr = c.Handshake(); cerr == nil {
		_, cerr = c.Read(make([]byte, 1))
	}
	cs = c.ConnectionState()
	conn.Close()
	<-done
	return cs, ss, cerr, serr
}

// bundles is a source whose answer can be changed.
type bundles struct {
	now atomic.Pointer[identity.Bundle]
}

func (b *bundles) Bundle(td identity.TrustDomain) (*identity.Bundle, error) {
	return b.now.Load().Bundle(td)
}

// side is one end of the connections of a test: what it is, and what it believes.
type side struct {
	conf    identity.TLSConfig
	bundles *bundles
}

func newSide(t *testing.T, svid *identity.SVID, believes *identity.Bundle, now func() time.Time) *side {
	t.Helper()
	b := &bundles{}
	b.now.Store(believes)
	return &side{identity.TLSConfig{SVIDs: svid, Bundles: b, Authorize: identity.AuthorizeAny(), Now: now}, b}
}

func (s *side) server(t *testing.T) *tls.Config {
	t.Helper()
	c, err := identity.ServerTLS(s.conf)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (s *side) client(t *testing.T) *tls.Config {
	t.Helper()
	c, err := identity.ClientTLS(s.conf)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// pair is a server that is pay and a client that is cart, of one CA.
func pair(t *testing.T) (server, client *side, ca *identitytest.CA) {
	t.Helper()
	ca = newCA(t)
	server = newSide(t, ca.SVID(t, identitytest.ID(t, pay)), ca.Bundle(), time.Now)
	client = newSide(t, ca.SVID(t, identitytest.ID(t, cart)), ca.Bundle(), time.Now)
	return server, client, ca
}

func TestMutualTLS(t *testing.T) {
	server, client, _ := pair(t)
	server.conf.NextProtos, client.conf.NextProtos = []string{"h2"}, []string{"h2"}
	cs, ss, cerr, serr := handshake(t, server.server(t), client.client(t))
	if cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	if id, err := identity.PeerID(cs); err != nil || id.String() != pay {
		t.Errorf("the client sees %v, %v", id, err)
	}
	if id, err := identity.PeerID(ss); err != nil || id.String() != cart {
		t.Errorf("the server sees %v, %v", id, err)
	}
	if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "h2" {
		t.Errorf("version %x, protocol %q", cs.Version, cs.NegotiatedProtocol)
	}
	if _, err := identity.PeerID(tls.ConnectionState{PeerCertificates: cs.PeerCertificates}); err == nil {
		t.Error("a peer is named before the handshake is over")
	}
	if _, err := identity.PeerID(tls.ConnectionState{HandshakeComplete: true}); err == nil {
		t.Error("a peer is named that showed no certificate")
	}
}

// eager makes a client keep sessions and ask to resume them.
func eager(c *tls.Config) (*tls.Config, *countingCache) {
	cache := &countingCache{ClientSessionCache: tls.NewLRUClientSessionCache(0)}
	c = c.Clone()
	c.SessionTicketsDisabled, c.ClientSessionCache, c.ServerName = false, cache, "pay"
	return c, cache
}

type countingCache struct {
	tls.ClientSessionCache
	stored int
}

func (c *countingCache) Put(key string, s *tls.ClientSessionState) {
	if s != nil {
		c.stored++
	}
	c.ClientSessionCache.Put(key, s)
}

// A server hands out no session, however much a client would like one.
func TestV6_V31_NoSessionTickets(t *testing.T) {
	server, client, _ := pair(t)
	sconf := server.server(t)
	cconf, cache := eager(client.client(t))
	for range 3 {
		cs, _, cerr, serr := handshake(t, sconf, cconf)
		if cerr != nil || serr != nil || cs.DidResume {
			t.Fatalf("resumed %v, %v, %v", cs.DidResume, cerr, serr)
		}
	}
	if cache.stored != 0 {
		t.Errorf("the client was given %d sessions", cache.stored)
	}
	// Nor does our client take any from a server that has them to give.
	giving := sconf.Clone()
	giving.SessionTicketsDisabled = false
	for range 3 {
		cs, _, cerr, serr := handshake(t, giving, client.client(t))
		if cerr != nil || serr != nil || cs.DidResume {
			t.Fatalf("resumed %v, %v, %v", cs.DidResume, cerr, serr)
		}
	}
}

// Were somebody to turn tickets on, a session would still be judged by the
// bundle of the day: the check does not sit where resumption skips it.
func TestV6_V66_ResumptionAfterTheRootIsGone(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(server, client *side, empty *identity.Bundle)
		judge  func(cerr, serr error) error
	}{
		{"server forgets", func(s, _ *side, e *identity.Bundle) { s.bundles.now.Store(e) }, func(_, serr error) error { return serr }},
		{"client forgets", func(_, c *side, e *identity.Bundle) { c.bundles.now.Store(e) }, func(cerr, _ error) error { return cerr }},
	} {
		t.Run(c.name, func(t *testing.T) {
			server, client, ca := pair(t)
			sconf := server.server(t)
			sconf.SessionTicketsDisabled = false
			cconf, _ := eager(client.client(t))
			for i := range 2 {
				cs, _, cerr, serr := handshake(t, sconf, cconf)
				if cerr != nil || serr != nil || cs.DidResume != (i == 1) {
					t.Fatalf("connection %d: resumed %v, %v, %v", i+1, cs.DidResume, cerr, serr)
				}
			}
			empty, err := identity.NewBundle(ca.TrustDomain, identity.BundleConfig{Sequence: 2})
			if err != nil {
				t.Fatal(err)
			}
			c.change(server, client, empty)
			_, _, cerr, serr := handshake(t, sconf, cconf)
			var verr *identity.VerifyError
			if err := c.judge(cerr, serr); !errors.As(err, &verr) {
				t.Errorf("client: %v, server: %v; want a refusal", cerr, serr)
			}
			if cerr == nil {
				t.Error("the client goes on")
			}
		})
	}
}

func TestV6_EachHandshakeAsksForTheBundleAgain(t *testing.T) {
	server, client, ca := pair(t)
	sconf, cconf := server.server(t), client.client(t)
	if _, _, cerr, serr := handshake(t, sconf, cconf); cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	other := newBundle(t, identity.BundleConfig{Sequence: 2, Authorities: newCA(t).Bundle().Authorities()})
	server.bundles.now.Store(other)
	var verr *identity.VerifyError
	if _, _, cerr, serr := handshake(t, sconf, cconf); cerr == nil || !errors.As(serr, &verr) || verr.ID.String() != cart {
		t.Errorf("the server has another root: %v, %v", cerr, serr)
	}
	server.bundles.now.Store(ca.Bundle())
	client.bundles.now.Store(other)
	if _, _, cerr, serr := handshake(t, sconf, cconf); serr == nil || !errors.As(cerr, &verr) || verr.ID.String() != pay {
		t.Errorf("the client has another root: %v, %v", cerr, serr)
	}
}

func TestExpiredBundleEndsHandshakes(t *testing.T) {
	server, client, ca := pair(t)
	later := func() time.Time { return ca.Root.Certificate.NotAfter.Add(time.Second) }
	long := identitytest.WithTemplate(func(c *x509.Certificate) { c.NotAfter = later().Add(time.Hour) })
	ca.Intermediate = ca.NewIntermediate(t, func(c *x509.Certificate) { c.NotAfter = later().Add(time.Hour) }, identitytest.NewKey(t))
	server.conf.SVIDs = ca.SVID(t, identitytest.ID(t, pay), long)
	client.conf.SVIDs = ca.SVID(t, identitytest.ID(t, cart), long)
	if _, _, cerr, serr := handshake(t, server.server(t), client.client(t)); cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	server.conf.Now = later
	if _, _, cerr, serr := handshake(t, server.server(t), client.client(t)); cerr == nil || serr == nil || !strings.Contains(serr.Error(), "expired") {
		t.Errorf("the server goes on: %v, %v", cerr, serr)
	}
	server.conf.Now, client.conf.Now = time.Now, later
	if _, _, cerr, serr := handshake(t, server.server(t), client.client(t)); serr == nil || cerr == nil || !strings.Contains(cerr.Error(), "expired") {
		t.Errorf("the client goes on: %v, %v", cerr, serr)
	}
}

// A valid certificate of the wrong program is the wrong program.
func TestV38_TheExpectedIDAndNoOther(t *testing.T) {
	server, client, _ := pair(t)
	var verr *identity.VerifyError
	client.conf.Authorize = identity.AuthorizeIDs(identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/ledger"))
	if _, _, cerr, serr := handshake(t, server.server(t), client.client(t)); serr == nil || !errors.As(cerr, &verr) || verr.ID.String() != pay {
		t.Errorf("the client takes %s for another: %v, %v", pay, cerr, serr)
	}
	client.conf.Authorize = identity.AuthorizeIDs(identitytest.ID(t, pay))
	server.conf.Authorize = identity.AuthorizeTrustDomain(identitytest.TrustDomain(t, "partner.example"))
	if _, _, cerr, serr := handshake(t, server.server(t), client.client(t)); cerr == nil || !errors.As(serr, &verr) || verr.ID.String() != cart {
		t.Errorf("the server takes %s for a partner: %v, %v", cart, cerr, serr)
	}
	server.conf.Authorize = identity.AuthorizeIDs(identitytest.ID(t, cart))
	if _, _, cerr, serr := handshake(t, server.server(t), client.client(t)); cerr != nil || serr != nil {
		t.Errorf("those expected are refused: %v, %v", cerr, serr)
	}
	// What the peer learns of a refusal is an alert without a reason.
	server.conf.Authorize = identity.AuthorizeIDs()
	if _, _, cerr, _ := handshake(t, server.server(t), client.client(t)); cerr == nil || strings.Contains(cerr.Error(), "spiffe") {
		t.Errorf("the client is told %v", cerr)
	}
}

func TestRefusedHandshakes(t *testing.T) {
	server, client, ca := pair(t)
	stolen := client.client(t).Clone()
	leaf, _ := ca.Leaf(t, identitytest.ID(t, cart))
	stolen.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: [][]byte{leaf[0].Raw, leaf[1].Raw}, PrivateKey: identitytest.NewKey(t)}, nil
	}
	bare := client.client(t).Clone()
	bare.GetClientCertificate = nil
	old := client.client(t).Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	noSVID := client.conf
	noSVID.SVIDs = (*identity.SVID)(nil)
	mute := client.conf
	mute.SVIDs = nobody{}
	for what, c := range map[string]*tls.Config{
		"a certificate without its key": stolen,
		"no certificate":                bare,
		"TLS 1.2":                       old,
		"no SVID yet":                   (&side{conf: noSVID}).client(t),
		"a source that answers nothing": (&side{conf: mute}).client(t),
	} {
		if _, ss, cerr, serr := handshake(t, server.server(t), c); cerr == nil || serr == nil || ss.HandshakeComplete {
			t.Errorf("%s: %v, %v", what, cerr, serr)
		}
	}
	server.conf.SVIDs = nobody{}
	if _, _, cerr, serr := handshake(t, server.server(t), client.client(t)); cerr == nil || serr == nil {
		t.Errorf("a server without an SVID: %v, %v", cerr, serr)
	}
}

type nobody struct{}

func (nobody) SVID() (*identity.SVID, error) { return nil, nil }

func TestTLSConfigIsComplete(t *testing.T) {
	server, _, _ := pair(t)
	for what, f := range map[string]func(*identity.TLSConfig){
		"SVIDs":     func(c *identity.TLSConfig) { c.SVIDs = nil },
		"Bundles":   func(c *identity.TLSConfig) { c.Bundles = nil },
		"Authorize": func(c *identity.TLSConfig) { c.Authorize = nil },
		"Now":       func(c *identity.TLSConfig) { c.Now = nil },
	} {
		c := server.conf
		f(&c)
		if _, err := identity.ServerTLS(c); err == nil {
			t.Errorf("a server without %s", what)
		}
		if _, err := identity.ClientTLS(c); err == nil {
			t.Errorf("a client without %s", what)
		}
	}
}
