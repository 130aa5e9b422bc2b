package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"syscall"
	"time"

	"github.com/meshca/meshca/policy"
)

const (
	firstBackOff  = 5 * time.Millisecond
	longestPause  = time.Second
	limitLogEvery = 10 * time.Second
	reclaimEvery  = time.Second
)

// The limits, as they are told.
var (
	errConnectionLimit = errors.New("too many connections are open")
	errSourceLimit     = errors.New("too many connections of this address have not finished their handshake")
)

// accept takes connections from a listener until ctx ends. When the process has
// run out of file descriptors it waits a little and goes on: those that are open
// will end, and whoever waits in the kernel's queue is served then.
func (p *Proxy) accept(ctx context.Context, d door) error {
	var pause time.Duration
	for {
		conn, err := d.Accept()
		if ctx.Err() != nil {
			if err == nil {
				reset(conn)
			}
			return nil
		}
		if err == nil {
			pause = 0
			if err := p.admit(d, conn); err != nil {
				return err
			}
			continue
		}
		if !passes(err) {
			return fmt.Errorf("accepting on %q: %w", d.address, err)
		}
		p.metrics.acceptFails.Inc()
		if isShortage(err) {
			p.reclaim()
		}
		if pause == 0 {
			p.conf.Log.Warn("no connection can be accepted for now", "listener", d.address, "error", err.Error())
		}
		pause = min(max(2*pause, firstBackOff), longestPause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// reclaim gives back the descriptors that nobody uses, now and then. The pipes
// that bytes are spliced through are descriptors too, two for each way of a
// connection; the standard library keeps them when a connection ends, and lets
// go of them in the second collection after that.
func (p *Proxy) reclaim() {
	p.mu.Lock()
	now := time.Now()
	due := now.Sub(p.reclaimed) >= reclaimEvery
	if due {
		p.reclaimed = now
	}
	p.mu.Unlock()
	if due {
		runtime.GC()
		runtime.GC()
	}
}

// isShortage reports whether err is the want of something that open connections
// hold and will give back.
func isShortage(err error) bool {
	return isAny(err, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM)
}

// passes reports whether an accept failed for a reason that passes: a shortage,
// or a fault of one connection.
func passes(err error) bool {
	// EPERM: a firewall's word on one connection
	return isShortage(err) || isAny(err, syscall.ECONNABORTED, syscall.EPROTO, syscall.EPERM)
}

func isAny(err error, numbers ...syscall.Errno) bool {
	return slices.ContainsFunc(numbers, func(n syscall.Errno) bool { return errors.Is(err, n) })
}

// admit starts serving a connection, or refuses it for one of the limits.
func (p *Proxy) admit(d door, conn net.Conn) error {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		_ = conn.Close()
		return fmt.Errorf("listener %q yields %T; only TCP is carried", d.address, conn)
	}
	c := &connection{
		p: p, way: d.way, listener: d.address, far: d.far, port: d.port,
		source: sourceOf(tcp), began: time.Now(), accepted: tcp, security: undecided,
	}
	if d.way == inbound {
		// An error cannot follow a success: sources keep their last decision. If
		// one does, the zero decision is STRICT.
		c.decision, _ = p.conf.Policy.Decide(d.port)
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if err := p.register(c); err != nil {
		c.cancel()
		p.refuse(c, err)
		return nil
	}
	p.open.Go(func() {
		c.rejudge() // the policy may have changed before the connection was known
		i := p.introduce(c, d)
		if !i.over {
			i.outcome = p.relay(c, i.accepted, i.dialled)
		}
		p.unregister(c)
		c.finish(i.outcome)
	})
	return nil
}

// introduced is a connection whose two ends are known and may talk, or that is over.
type introduced struct {
	accepted, dialled stream
	over              bool
	outcome           outcome
}

// introduce serves a connection until its two ends may talk. What may take a handshake
// is for the workers.
func (p *Proxy) introduce(c *connection, d door) (i introduced) {
	if d.way == inbound && c.admittedUnder() == policy.Disable {
		return p.serveInbound(c)
	}
	p.handshakers.call(func() {
		if d.way == inbound {
			i = p.serveInbound(c)
		} else {
			i = p.serveOutbound(c, d.client)
		}
	})
	return i
}

// refuse resets a connection for which there is no room. It is counted, and the
// log hears of it now and then: a line for each would help whoever floods us.
func (p *Proxy) refuse(c *connection, why error) {
	reset(c.accepted)
	p.metrics.ended(c.way, undecided, outcome{end: endLimit}, 0, 0)
	p.mu.Lock()
	now := time.Now()
	say := now.Sub(p.limitLogged) >= limitLogEvery
	if say {
		p.limitLogged = now
	}
	p.mu.Unlock()
	if say {
		p.conf.Log.Warn("connections are refused", "direction", string(c.way), "listener", c.listener,
			"peer", c.source.String(), "reason", why.Error())
	}
}

func sourceOf(c *net.TCPConn) netip.Addr {
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// register makes room for a connection among those that are open, and an inbound
// one among its source's handshakes.
func (p *Proxy) register(c *connection) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.live) >= p.conf.MaxConnections {
		return errConnectionLimit
	}
	if c.way == inbound && !p.beginHandshakeLocked(c) {
		return errSourceLimit
	}
	p.live[c] = struct{}{}
	p.metrics.active.WithLabelValues(string(c.way)).Inc()
	return nil
}

func (p *Proxy) unregister(c *connection) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.live, c)
	p.endHandshakeLocked(c)
	p.metrics.active.WithLabelValues(string(c.way)).Dec()
}

// beginHandshake takes a slot of the connection's source; false if there is none.
func (p *Proxy) beginHandshake(c *connection) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.beginHandshakeLocked(c)
}

func (p *Proxy) beginHandshakeLocked(c *connection) bool {
	if p.handshakes[c.source] >= p.conf.MaxHandshakes {
		return false
	}
	p.handshakes[c.source]++
	c.holdsSlot = true
	return true
}

// endHandshake gives the slot back, if the connection holds one.
func (p *Proxy) endHandshake(c *connection) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endHandshakeLocked(c)
}

func (p *Proxy) endHandshakeLocked(c *connection) {
	if !c.holdsSlot {
		return
	}
	c.holdsSlot = false
	if p.handshakes[c.source]--; p.handshakes[c.source] == 0 {
		delete(p.handshakes, c.source)
	}
}
