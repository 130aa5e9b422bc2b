package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
)

// direction is which way a connection was opened; a label value.
type direction string

const (
	inbound  direction = "inbound"  // a peer to the app
	outbound direction = "outbound" // the workload to a peer
)

// security is what protects a connection between us and the peer; a label value.
type security string

const (
	undecided  security = "none"        // nothing was carried
	mutualTLS  security = "mutual TLS"  // ours: both ends are known
	foreignTLS security = "foreign TLS" // the app's own; passed through
	plaintext  security = "plaintext"
	untouched  security = "untouched" // under DISABLE: nobody looked
)

// ending is why a connection ended; a label value.
type ending string

const (
	endClosed      ending = "closed"           // one end after the other said that it was done
	endReset       ending = "reset"            // one end broke off
	endRefused     ending = "refused"          // plaintext where only mutual TLS may be
	endHandshake   ending = "handshake failed" // see the failure
	endUnreachable ending = "unreachable"      // the app or the target
	endPolicy      ending = "policy"           // a newer policy outlaws it
	endDrain       ending = "drain"            // it was still open when the drain's time was over
	endLimit       ending = "limit"            // one of the two limits
)

// errCut is returned on what was ended from outside.
var errCut = errors.New("the connection was ended by the proxy")

// connection is one accepted connection with what became of it. Its methods are
// called by its own goroutines, except cut and rejudge, which any may call.
type connection struct {
	p        *Proxy
	way      direction
	listener string // as configured
	far      string // the app or the target, as configured
	port     uint16 // of the app; inbound only
	source   netip.Addr
	began    time.Time
	accepted *net.TCPConn
	ctx      context.Context // ends when the connection is cut, or has ended
	cancel   context.CancelFunc

	holdsSlot bool // of MaxHandshakes; guarded by the proxy's mutex

	mu       sync.Mutex
	dialled  *net.TCPConn
	decision Decision // that admitted it, or that cut it
	security security
	waiting  bool // for one of the two ends to speak, without a deadline
	peer     identity.ID
	cutBy    ending // empty while nobody has cut it
	cause    error

	fromAccepted, fromDialled int64 // bytes carried; written before the end
}

// outcome is how serving a connection ended.
type outcome struct {
	end     ending
	failure failure // of a handshake
	err     error
}

// dial opens the other half.
func (c *connection) dial() (*net.TCPConn, error) {
	conn, err := c.dialPatiently()
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok { // the network "tcp" has no others
		_ = conn.Close()
		return nil, fmt.Errorf("the connection to %q is not TCP", c.far)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cutBy != "" {
		reset(tcp)
		return nil, errCut
	}
	c.dialled = tcp
	return tcp, nil
}

const (
	// dialPause is the longest pause between two attempts to dial in a shortage.
	dialPause = 50 * time.Millisecond
	// maxDialsWaiting bounds the connections that wait in a shortage. Each holds
	// a descriptor while it wants a second one: if all waited, none would get it.
	// Those that give up at once make room for those that wait.
	maxDialsWaiting = 4
)

// dialPatiently dials, and within DialTime tries again while it is only
// descriptors or memory that are wanting: what holds them ends.
func (c *connection) dialPatiently() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(c.ctx, c.p.conf.DialTime)
	defer cancel()
	conn, err := c.p.conf.Dial(ctx, "tcp", c.far)
	if !isShortage(err) {
		return conn, err
	}
	select {
	case c.p.dialsWaiting <- struct{}{}:
		defer func() { <-c.p.dialsWaiting }()
	default:
		return nil, err
	}
	for pause := firstBackOff; isShortage(err); pause = min(2*pause, dialPause) {
		c.p.reclaim()
		select {
		case <-ctx.Done():
			return nil, err // which says more than that the time is over
		case <-time.After(pause):
		}
		conn, err = c.p.conf.Dial(ctx, "tcp", c.far)
	}
	return conn, err
}

// cut ends the connection at once, for both ends visibly so. The first reason
// stays.
func (c *connection) cut(why ending, cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cutLocked(why, cause)
}

func (c *connection) cutLocked(why ending, cause error) {
	if c.cutBy != "" {
		return
	}
	c.cutBy, c.cause = why, cause
	c.cancel()
	reset(c.accepted)
	if c.dialled != nil {
		reset(c.dialled)
	}
}

// settle notes what the connection is. It fails if that is not allowed any more:
// the policy may have changed while the client was making up its mind. What is
// settled is judged again by the proxy at each change, so no change falls
// between the two.
func (c *connection) settle(s security, peer identity.ID) error {
	c.mu.Lock()
	c.security, c.peer = s, peer
	c.mu.Unlock()
	c.p.endHandshake(c)
	c.rejudge()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cutBy != "" {
		return errCut
	}
	return nil
}

// admittedUnder returns the mode that the connection is served under. A change
// of policy may cut it at the same moment.
func (c *connection) admittedUnder() policy.Mode {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.decision.Mode
}

// rejudge cuts the connection if the policy that is in force now outlaws it.
func (c *connection) rejudge() {
	if c.way != inbound {
		return
	}
	now, err := c.p.conf.Policy.Decide(c.port)
	if err != nil {
		return // the decision that admitted it stands
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cutBy == "" && outlawed(now.Mode, c.security, c.waiting) {
		c.decision = now
		c.cutLocked(endPolicy, nil)
	}
}

// isStrict reports whether a mode wants mutual TLS; all do that are not known to
// want something else.
func isStrict(m policy.Mode) bool { return m != policy.Permissive && m != policy.Disable }

// outlawed reports whether a connection may not go on under now. DISABLE takes
// nothing away: what is better protected than it has to be goes on.
func outlawed(now policy.Mode, s security, waiting bool) bool {
	if !isStrict(now) {
		return false
	}
	switch s {
	case mutualTLS:
		return false
	case undecided:
		// It has a deadline by which it is settled, and judged again then: a
		// handshake of the mesh that is under way must not notice. Without a
		// deadline the client has to come again.
		return waiting
	}
	return true
}

// wait notes that from now on there is no deadline, or that there is one again.
// It fails if that is not allowed.
func (c *connection) wait(waiting bool) error {
	c.mu.Lock()
	c.waiting = waiting
	c.mu.Unlock()
	c.rejudge()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cutBy != "" {
		return errCut
	}
	return nil
}

// finish closes what is open, and tells the log and the metrics.
func (c *connection) finish(o outcome) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cutBy == "" {
		_ = c.accepted.Close()
		if c.dialled != nil {
			_ = c.dialled.Close()
		}
	} else {
		// What its goroutines saw was only the effect.
		o = outcome{end: c.cutBy, err: c.cause}
	}
	c.cancel()
	toApp, toPeer := c.fromAccepted, c.fromDialled
	if c.way == outbound {
		toApp, toPeer = toPeer, toApp
	}
	c.p.metrics.ended(c.way, c.security, o, toApp, toPeer)

	attrs := []slog.Attr{
		slog.String("direction", string(c.way)),
		slog.String("listener", c.listener),
	}
	client := c.accepted.RemoteAddr().String()
	if c.way == inbound {
		attrs = append(attrs, slog.String("peer", client), slog.String("app", c.far))
	} else {
		attrs = append(attrs, slog.String("app", client), slog.String("peer", c.far))
	}
	attrs = append(attrs, slog.String("security", string(c.security)))
	if !c.peer.IsZero() {
		attrs = append(attrs, slog.String("spiffe_id", c.peer.String()))
	}
	if c.way == inbound {
		attrs = append(attrs, slog.String("mode", c.decision.Mode.String()), slog.String("policy", c.decision.Source))
	}
	attrs = append(attrs, slog.Int64("bytes_to_app", toApp), slog.Int64("bytes_to_peer", toPeer),
		slog.Float64("seconds", time.Since(c.began).Seconds()), slog.String("end", string(o.end)))
	if o.failure != "" {
		attrs = append(attrs, slog.String("failure", string(o.failure)))
	}
	if o.err != nil {
		attrs = append(attrs, slog.String("error", shorten(o.err.Error())))
	}
	c.p.conf.Log.LogAttrs(context.Background(), slog.LevelInfo, "connection", attrs...)
}

// shorten bounds what an error may add to the log. The texts are those of our
// own packages and of crypto/tls, which quote what a peer sent.
func shorten(text string) string {
	const most = 1 << 10
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}
