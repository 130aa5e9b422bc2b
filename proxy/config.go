package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
)

// Identity is who the proxy is and whom it believes. Its methods are safe for
// concurrent use and answer at once.
type Identity interface {
	identity.SVIDSource
	identity.BundleSource
	// Changed returns a channel that is closed when any of it has become another
	// since the call.
	Changed() <-chan struct{}
}

// Policy says how strict a port is. Its methods are safe for concurrent use and
// answer at once. A source that loses touch with where its policies come from
// goes on with the last ones.
type Policy interface {
	// Decide returns the decision about a port of the workload. Without one it
	// returns an error that says why, and the proxy does not listen yet.
	Decide(port uint16) (Decision, error)
	// Changed returns a channel that is closed when any decision may have become
	// another since the call.
	Changed() <-chan struct{}
}

// Decision is the mode of a port and what decided it.
type Decision struct {
	// Mode is obeyed as policy defines it; whatever is neither Permissive nor
	// Disable is Strict.
	Mode policy.Mode
	// Source names the deciding policy, for the access log.
	Source string
}

// Inbound is a listener for the workload's peers.
type Inbound struct {
	Listen string // host:port to listen on
	// App is the host:port that the workload listens on. Its port is the one
	// that policies name.
	App string
}

// Outbound is a listener for the workload itself.
type Outbound struct {
	// Listen is the host:port to listen on, on loopback: whoever connects to it
	// speaks to the target with the workload's identity.
	Listen string
	Target string      // host:port of the peer
	Peer   identity.ID // who the peer must be
}

// Config is what [New] takes. Durations and numbers that are zero have the
// default that stands beside them; everything without one is required.
type Config struct {
	Inbound  []Inbound
	Outbound []Outbound

	Identity Identity
	Policy   Policy // needed where there are inbound listeners

	// DetectionTime is how long a PERMISSIVE port waits for a client's first
	// byte before the app is dialled. Detection goes on after that, until one of
	// the two speaks. 100 ms
	DetectionTime time.Duration
	// HandshakeTime bounds a handshake from the first byte of TLS on, and on a
	// STRICT port from the beginning of the connection. 5 s
	HandshakeTime time.Duration
	DialTime      time.Duration // to reach an app or a target. 5 s
	DrainTime     time.Duration // for open connections when [Proxy.Run] is told to end. 30 s

	// MaxConnections bounds the connections that are open at once. 10,000
	MaxConnections int
	// MaxHandshakes bounds the inbound connections of one source address that
	// have not yet said what they are or proved who. 256
	MaxHandshakes int

	Listen  func(network, address string) (net.Listener, error)                  // net.Listen
	Dial    func(ctx context.Context, network, address string) (net.Conn, error) // net.Dialer's
	Now     func() time.Time
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Defaults of [Config].
const (
	DefaultDetectionTime  = 100 * time.Millisecond
	DefaultHandshakeTime  = 5 * time.Second
	DefaultDialTime       = 5 * time.Second
	DefaultDrainTime      = 30 * time.Second
	DefaultMaxConnections = 10_000
	DefaultMaxHandshakes  = 256
)

// complete fills in the defaults and refuses what cannot work.
func (c *Config) complete() error {
	switch {
	case len(c.Inbound)+len(c.Outbound) == 0:
		return errors.New("proxy: neither an inbound nor an outbound listener is configured")
	case c.Identity == nil || c.Now == nil || c.Log == nil || c.Metrics == nil:
		return errors.New("proxy: Identity, Now, Log and Metrics must all be given")
	case c.Policy == nil && len(c.Inbound) > 0:
		return errors.New("proxy: inbound listeners need a Policy")
	}
	taken := make(map[string]bool)
	for _, in := range c.Inbound {
		if err := in.check(); err != nil {
			return err
		}
		if _, port, _ := splitAddress(in.Listen); port != 0 && taken[in.Listen] {
			return fmt.Errorf("inbound listener %q is given twice", in.Listen)
		}
		taken[in.Listen] = true
	}
	for _, out := range c.Outbound {
		if err := out.check(); err != nil {
			return err
		}
		if _, port, _ := splitAddress(out.Listen); port != 0 && taken[out.Listen] {
			return fmt.Errorf("outbound listener %q is given twice, or is an inbound listener too", out.Listen)
		}
		taken[out.Listen] = true
	}
	for _, d := range []struct {
		name  string
		value *time.Duration
		def   time.Duration
	}{
		{"DetectionTime", &c.DetectionTime, DefaultDetectionTime},
		{"HandshakeTime", &c.HandshakeTime, DefaultHandshakeTime},
		{"DialTime", &c.DialTime, DefaultDialTime},
		{"DrainTime", &c.DrainTime, DefaultDrainTime},
	} {
		if *d.value < 0 {
			return fmt.Errorf("proxy: %s is negative (%v)", d.name, *d.value)
		}
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if c.MaxConnections < 0 || c.MaxHandshakes < 0 {
		return fmt.Errorf("proxy: MaxConnections (%d) and MaxHandshakes (%d) must not be negative", c.MaxConnections, c.MaxHandshakes)
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = DefaultMaxConnections
	}
	if c.MaxHandshakes == 0 {
		c.MaxHandshakes = DefaultMaxHandshakes
	}
	if c.Listen == nil {
		c.Listen = net.Listen
	}
	if c.Dial == nil {
		c.Dial = new(net.Dialer).DialContext
	}
	return nil
}

func (in Inbound) check() error {
	host, port, err := splitAddress(in.Listen)
	if err != nil {
		return fmt.Errorf("inbound listener %q: %w", in.Listen, err)
	}
	appHost, appPort, err := splitAddress(in.App)
	if err != nil {
		return fmt.Errorf("app %q of inbound listener %q: %w", in.App, in.Listen, err)
	}
	if appPort == 0 {
		return fmt.Errorf("app %q of inbound listener %q: the port is 0", in.App, in.Listen)
	}
	if port == appPort && (host == appHost || isUnspecified(host) && (isLoopback(appHost) || isUnspecified(appHost))) {
		return fmt.Errorf("inbound listener %q would send to itself (app %q); let the app listen on another port, or the proxy on another address", in.Listen, in.App)
	}
	return nil
}

// AppPort returns the port that policies name; 0 where App is not host:port.
func (in Inbound) AppPort() uint16 {
	_, port, _ := splitAddress(in.App)
	return port
}

func (out Outbound) check() error {
	host, _, err := splitAddress(out.Listen)
	if err != nil {
		return fmt.Errorf("outbound listener %q: %w", out.Listen, err)
	}
	if !isLoopback(host) {
		return fmt.Errorf("outbound listener %q is not on loopback: everybody who reaches it would speak with this workload's identity", out.Listen)
	}
	if _, port, err := splitAddress(out.Target); err != nil || port == 0 {
		return fmt.Errorf("target %q of outbound listener %q is not host:port", out.Target, out.Listen)
	}
	if out.Peer.Path() == "" {
		return fmt.Errorf("outbound listener %q: the SPIFFE ID %q of its target names no workload", out.Listen, out.Peer)
	}
	return nil
}

func splitAddress(address string) (host string, port uint16, err error) {
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, errors.New("it is not host:port")
	}
	number, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q is no port", text)
	}
	return host, uint16(number), nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func isUnspecified(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}
