package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
)

func TestT10_F43_ListensOnlyWithCertificateAndPolicy(t *testing.T) {
	listening := make(chan string, 2)
	k := newKit(t, with(func(c *Config) {
		listen := c.Listen
		c.Listen = func(network, address string) (net.Listener, error) {
			listening <- address
			return listen(network, address)
		}
	}))
	svid, bundle := k.world.svid, k.world.bundle
	empty, err := identity.NewBundle(k.ca.TrustDomain, identity.BundleConfig{})
	if err != nil {
		t.Fatal(err)
	}
	old := k.ca.SVID(t, identitytest.ID(t, cartID), identitytest.WithLifetime(-time.Second))
	noPolicy := errors.New("not synced yet")

	k.world.svid, k.world.bundle, k.rules.err = nil, nil, noPolicy
	k.run()
	for _, step := range []struct {
		change func()
		waits  string
	}{
		{func() {}, "no certificate: no SVID yet"},
		{func() { k.world.set(svid, nil) }, `no trust bundle for trust domain "example.org"; held: []`},
		{func() { k.world.set(svid, empty) }, `the trust bundle of "example.org" holds no authority: nobody could be believed`},
		{func() { k.world.set(old, bundle) }, "the certificate ended at " + old.NotAfter().UTC().Format(time.RFC3339)},
		{func() { k.world.set(svid, bundle) }, "no policy for port " + portOf(k.app.address) + ": not synced yet"},
	} {
		step.change()
		if line := k.hears("not listening yet"); line["reason"] != step.waits {
			t.Errorf("waits for %q, want %q", line["reason"], step.waits)
		}
		if err := k.proxy.Ready(); err == nil || err.Error() != step.waits {
			t.Errorf("Ready: %v, want %q", err, step.waits)
		}
		if len(listening) > 0 {
			t.Fatal("it listens")
		}
	}
	k.rules.set(policy.Strict, nil)
	k.hears("listening")
	conn := k.dialTLS(k.meshConfig(frontendID, "istio"))
	echoes(t, conn, "hello")
	if err := k.proxy.Ready(); err != nil {
		t.Error(err)
	}
	// A source that is lost later takes nothing away; the last decision stands.
	k.rules.set(policy.Strict, noPolicy)
	echoes(t, conn, "hello")
}

func portOf(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

func TestRunEndsWhileItWaits(t *testing.T) {
	k := newKit(t)
	k.world.svid = nil
	k.run()
	k.hears("not listening yet")
	k.stop()
}

func TestListenerThatCannotBe(t *testing.T) {
	nowhere := errors.New("no such place")
	k := newKit(t, with(func(c *Config) {
		c.Listen = func(string, string) (net.Listener, error) { return nil, nowhere }
	}))
	if err := k.proxy.Run(t.Context()); !errors.Is(err, nowhere) {
		t.Error(err)
	}
}

// A policy that outlaws what is open closes it, and nothing else.
func TestT10_PolicyClosesWhatItOutlaws(t *testing.T) {
	k := start(t, withMode(policy.Permissive), with(impatient), withApp(tlsApp(t)))
	foreign, err := k.call([]string{"h2"}, false)
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, foreign, "hello")
	k.app.accepted(t)
	silent := k.dial() // undecided
	k.app.accepted(t)

	began := time.Now()
	k.rules.set(policy.Strict, nil)
	for _, conn := range []net.Conn{foreign, silent} {
		if _, err := io.Copy(io.Discard, conn); !isReset(err) {
			t.Errorf("the client sees %v", err)
		}
	}
	t.Logf("closed after %v", time.Since(began))
	for range 2 {
		k.next(map[string]any{"end": "policy", "mode": "STRICT", "policy": "shop/STRICT"})
	}
}

func TestT10_PolicyFlip(t *testing.T) {
	k := start(t, withMode(policy.Permissive))
	plain := k.dial()
	echoes(t, plain, "hello")
	mesh := k.dialTLS(k.meshConfig(frontendID, "istio"))
	echoes(t, mesh, "hello")

	k.rules.set(policy.Disable, nil) // takes nothing away
	echoes(t, plain, "hello")
	echoes(t, mesh, "hello")

	k.rules.set(policy.Strict, nil)
	if _, err := io.Copy(io.Discard, plain); !isReset(err) {
		t.Errorf("the plaintext client sees %v", err)
	}
	k.next(map[string]any{"end": "policy", "security": "plaintext", "bytes_to_app": 10.0, "bytes_to_peer": 10.0})
	echoes(t, mesh, "hello")
	again := k.dial()
	_, _ = io.WriteString(again, "hello")
	if n, _ := io.Copy(io.Discard, again); n != 0 {
		t.Errorf("%d bytes of plaintext", n)
	}
	k.next(map[string]any{"end": "refused", "mode": "STRICT"})

	k.rules.set(policy.Unknown, nil) // as STRICT
	echoes(t, mesh, "hello")
}

// Detection takes its time, and a policy may change meanwhile.
func TestT10_PolicyChangesDuringDetection(t *testing.T) {
	k := start(t, withMode(policy.Permissive))
	c := &connection{p: k.proxy, way: inbound, port: 1, decision: Decision{Mode: policy.Permissive}}
	c.ctx, c.cancel = context.WithCancel(t.Context())
	c.accepted = k.dial()
	k.rules.set(policy.Strict, nil)
	if err := c.settle(plaintext, identity.ID{}); err == nil {
		t.Error("plaintext was settled under STRICT")
	}
	if c.cutBy != endPolicy {
		t.Errorf("cut by %q", c.cutBy)
	}
}

func TestF59_DrainLetsOpenConnectionsEnd(t *testing.T) {
	k := start(t)
	conn := k.dialTLS(k.meshConfig(frontendID, "istio"))
	echoes(t, conn, "hello")
	stopped := make(chan struct{})
	go func() { k.stop(); close(stopped) }()
	for k.proxy.notReady.Load() == nil {
		// the listener closes first
		c, err := net.Dial("tcp", k.in)
		if err != nil {
			continue
		}
		_ = c.Close()
	}
	if c, err := net.Dial("tcp", k.in); err == nil {
		t.Error("a connection was accepted during the drain")
		_ = c.Close()
	}
	echoes(t, conn, "hello")
	select {
	case <-stopped:
		t.Error("Run ended before its connection")
	default:
	}
	_ = conn.Close()
	<-stopped
}

func TestF59_DrainIsBounded(t *testing.T) {
	k := start(t, with(func(c *Config) { c.DrainTime = time.Millisecond }))
	conn := k.dialTLS(k.meshConfig(frontendID, "istio"))
	echoes(t, conn, "hello")
	k.stop()
	if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("the client sees %v", err)
	}
	k.next(map[string]any{"end": "drain"})
}

func TestConfigIsJudged(t *testing.T) {
	good := func() Config {
		k := newKit(t)
		c := k.proxy.conf
		c.Metrics = refusing{}
		return c
	}
	for _, tt := range []struct {
		name, want string
		change     func(*Config)
	}{
		{"nothing to do", "neither an inbound nor an outbound", func(c *Config) { c.Inbound = nil }},
		{"no identity", "Identity, Now, Log and Metrics", func(c *Config) { c.Identity = nil }},
		{"no policy", "need a Policy", func(c *Config) { c.Policy = nil }},
		{"no port", `inbound listener "localhost": it is not host:port`, func(c *Config) { c.Inbound[0].Listen = "localhost" }},
		{"named port", `"http" is no port`, func(c *Config) { c.Inbound[0].App = "127.0.0.1:http" }},
		{"port 0", "the port is 0", func(c *Config) { c.Inbound[0].App = "127.0.0.1:0" }},
		{"loop", "would send to itself", func(c *Config) { c.Inbound[0] = Inbound{Listen: ":8443", App: "127.0.0.1:8443"} }},
		{"same loop", "would send to itself", func(c *Config) { c.Inbound[0] = Inbound{Listen: "10.0.0.1:8443", App: "10.0.0.1:8443"} }},
		{"open to all", "is not on loopback", func(c *Config) { c.Outbound[0].Listen = ":15001" }},
		{"no target", `target "" of outbound`, func(c *Config) { c.Outbound[0].Target = "" }},
		{"a domain as peer", "names no workload", func(c *Config) { c.Outbound[0].Peer = identitytest.TrustDomain(t, "example.org").ID() }},
		{"negative", "DrainTime is negative", func(c *Config) { c.DrainTime = -1 }},
		{"negative limit", "must not be negative", func(c *Config) { c.MaxConnections = -1 }},
		{"metrics", "registering metrics", func(*Config) {}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := good()
			c.Inbound = []Inbound{c.Inbound[0]}
			c.Outbound = []Outbound{{Listen: "localhost:15001", Target: "10.0.3.7:8443", Peer: identitytest.ID(t, cartID)}}
			if tt.name == "nothing to do" {
				c.Outbound = nil
			}
			tt.change(&c)
			if _, err := New(c); err == nil || !contains(err, tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// The end of a certificate that nobody has renewed is said, with whose it was.
func TestEndedCertificateIsSaid(t *testing.T) {
	k := newKit(t)
	k.world.svid = k.ca.SVID(t, identitytest.ID(t, cartID), identitytest.WithLifetime(2*time.Second))
	k.run()
	if line := k.hears("the certificate has ended and the agent has no newer one; peers refuse it: see the agent's log and /readyz"); line["spiffe_id"] != cartID {
		t.Errorf("%v", line)
	}
	if k.proxy.Ready() == nil {
		t.Error("it is ready")
	}
}
