package caclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/inputfile"
)

// DefaultAttemptTimeout is how long one address gets for one attempt: name
// look-up, connecting, TLS and the answer together.
const DefaultAttemptTimeout = 5 * time.Second

// Config is what a [Client] is made from.
type Config struct {
	// Addresses are the CA's host:port pairs, in the order in which they are
	// tried at first; required, without duplicates.
	Addresses []string
	// ServerName is the name that the CA's certificate must carry. Empty means
	// the host of the address that was dialled.
	ServerName string
	// TrustDomain is the only domain whose bundle is taken; required.
	TrustDomain identity.TrustDomain
	// AnchorFile holds the certificates that the CA's own one must chain to, as
	// PEM; required. Somebody else keeps it fresh (a projected ConfigMap or a
	// managed file), and it is read at each dial. What the CA itself has sent
	// is never used in its place: an agent that was off for a year would then
	// have nothing to believe.
	AnchorFile string
	// AttemptTimeout bounds one attempt; zero means [DefaultAttemptTimeout].
	AttemptTimeout time.Duration
	// Shared says that callers of several workloads use the client. One that is
	// not answered in time then ends no other's calls: they find out by themselves,
	// a stream by its pings.
	Shared bool
	// Now is the clock by which the CA's certificate is judged; required.
	Now func() time.Time
	// Dial opens a connection; nil means TCP by [net.Dialer].
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Client asks the CA. It is safe for concurrent use; calls share a connection.
// Use [New], and Close at the end.
type Client struct {
	conf Config

	// dialing holds a token while somebody dials, so that concurrent calls end
	// up on one connection and not on one each.
	dialing chan struct{}

	mu        sync.Mutex // guards all below
	closed    bool
	preferred int   // index of the address to begin with
	current   *link // for new calls; nil if none
}

// New makes a client. It opens no connection and reads no file.
func New(conf Config) (*Client, error) {
	if len(conf.Addresses) == 0 {
		return nil, errors.New("CA client: no address of a CA is given")
	}
	for i, a := range conf.Addresses {
		host, port, err := net.SplitHostPort(a)
		if err != nil || host == "" || port == "" {
			return nil, fmt.Errorf("CA client: address %q is not host:port", a)
		}
		if slices.Contains(conf.Addresses[:i], a) {
			return nil, fmt.Errorf("CA client: address %q is given twice", a)
		}
	}
	switch {
	case conf.TrustDomain.IsZero():
		return nil, errors.New("CA client: no trust domain is given")
	case conf.AnchorFile == "":
		return nil, errors.New("CA client: no trust anchor file is given; without one the CA cannot be told from an impostor")
	case conf.Now == nil:
		return nil, errors.New("CA client: no clock is given")
	case conf.AttemptTimeout < 0:
		return nil, fmt.Errorf("CA client: attempt timeout %v is negative", conf.AttemptTimeout)
	}
	if conf.AttemptTimeout == 0 {
		conf.AttemptTimeout = DefaultAttemptTimeout
	}
	if conf.Dial == nil {
		conf.Dial = (&net.Dialer{}).DialContext
	}
	conf.Addresses = slices.Clone(conf.Addresses)
	return &Client{conf: conf, dialing: make(chan struct{}, 1)}, nil
}

// TrustDomain returns the domain that the client was made for.
func (c *Client) TrustDomain() identity.TrustDomain { return c.conf.TrustDomain }

// AnchorPEM returns what the trust anchor file holds now, unparsed.
func (c *Client) AnchorPEM() ([]byte, error) {
	pem, err := inputfile.Read(c.conf.AnchorFile, identity.MaxCertificatePEM)
	if err != nil {
		return nil, &AnchorError{File: c.conf.AnchorFile, Err: reason(err)}
	}
	return pem, nil
}

// Close ends the connection and all calls on it. Later calls fail.
func (c *Client) Close() {
	c.mu.Lock()
	l := c.current
	c.current, c.closed = nil, true
	c.mu.Unlock()
	if l != nil {
		l.close()
	}
}

// errStop marks an error after which the round does not go on to the next
// address: every CA would say the same, or the fault is on our side.
type errStop struct{ error }

func (e errStop) Unwrap() error { return e.error }

// round calls f on a connection to one address after the other until it
// returns nil or an errStop. doing describes the call, with %s for the address.
// The context that f gets ends with the attempt's deadline.
func (c *Client) round(ctx context.Context, doing string, f func(attempt context.Context, l *link) error) error {
	first := c.preference()
	tried := make([]Attempt, 0, len(c.conf.Addresses))
	for i := range c.conf.Addresses {
		n := (first + i) % len(c.conf.Addresses)
		err := c.attempt(ctx, n, f)
		if err == nil {
			c.prefer(n)
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var stop errStop
		if errors.As(err, &stop) {
			// The next round asks another CA first: one replica may be wrong
			// where the others are not.
			c.prefer(n + 1)
			return stop.error
		}
		tried = append(tried, Attempt{Address: c.conf.Addresses[n], Err: err})
	}
	return &UnreachableError{Doing: doing, Attempts: tried}
}

// attempt calls f for one address. That a connection opened earlier broke proves
// nothing about the CA behind it (it restarted, a load balancer forgot us), so
// the same address then gets one new connection. One that ran into the
// deadline does not: the next address should have its turn.
func (c *Client) attempt(ctx context.Context, n int, f func(context.Context, *link) error) error {
	reused, err := c.attemptOnce(ctx, n, f)
	if reused && errors.Is(err, errBroken) && ctx.Err() == nil {
		_, err = c.attemptOnce(ctx, n, f)
	}
	return err
}

func (c *Client) attemptOnce(ctx context.Context, n int, f func(context.Context, *link) error) (reused bool, err error) {
	attempt, cancel := context.WithTimeout(ctx, c.conf.AttemptTimeout)
	defer cancel()
	l, reused, err := c.acquire(attempt, n)
	if err != nil {
		return false, c.explain(err)
	}
	err = f(attempt, l)
	switch {
	case err == nil:
		c.release(l)
	case isTimeout(err):
		if c.conf.Shared {
			c.retire(l)
		} else {
			c.discard(l)
		}
		err = c.explain(err)
	case errors.Is(err, errUnavailable) || !l.alive():
		// Whether the CA said so or the connection broke cannot be told from the
		// error, and gRPC may learn of the break a moment later than we.
		c.retire(l)
		err = brokenError{err}
	default:
		c.release(l)
	}
	return reused, err
}

// explain puts the end of an attempt's time into words.
func (c *Client) explain(err error) error {
	if isTimeout(err) {
		return &NoAnswerError{After: c.conf.AttemptTimeout, Stage: stageOf(err)}
	}
	return err
}

func (c *Client) preference() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.preferred
}

func (c *Client) prefer(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.preferred = n % len(c.conf.Addresses)
}
