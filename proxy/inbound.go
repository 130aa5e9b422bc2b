package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
)

const (
	sniffBuffer    = 2 << 10 // most hellos fit
	greetingBuffer = 512
	// lingerTime and lingerBytes bound what is read from a client after its
	// handshake was refused.
	lingerTime  = 500 * time.Millisecond
	lingerBytes = 64 << 10
)

// serveInbound takes a peer's connection as far as the mode of its port lets it.
func (p *Proxy) serveInbound(c *connection) introduced {
	switch c.admittedUnder() {
	case policy.Disable:
		return p.pass(c, untouched, stream{conn: c.accepted}, nil)
	case policy.Permissive:
		return p.permissive(c)
	}
	return p.strict(c)
}

// strict wants mutual TLS. The deadline runs from the beginning, so that whoever
// says nothing is sent away as well.
func (p *Proxy) strict(c *connection) introduced {
	deadline := time.Now().Add(p.conf.HandshakeTime)
	_ = c.accepted.SetDeadline(deadline)
	var s sniffer
	what, err := sniff(c.accepted, &s, make([]byte, sniffBuffer))
	switch {
	case err == io.EOF && len(s.wire) == 0:
		return over(outcome{end: endClosed}) // a port check
	case err != nil:
		return over(p.handshakeFailed(c, tls.ConnectionState{}, err))
	case what == notTLS:
		c.mu.Lock()
		c.security = plaintext
		c.mu.Unlock()
		return over(outcome{end: endRefused, err: errors.New("plaintext, and the port takes mutual TLS only")})
	}
	return p.terminate(c, &s, deadline, nil)
}

// permissive takes mutual TLS of the mesh, TLS that is the app's own affair, and
// plaintext.
func (p *Proxy) permissive(c *connection) introduced {
	d, o := p.detect(c)
	if o != nil {
		return over(*o)
	}
	head := stream{conn: c.accepted, head: d.client.wire}
	switch {
	case d.what == notTLS:
		return p.pass(c, plaintext, head, d.app)
	case !offersMesh(d.client.alpn):
		p.hint(c, d.client.alpn)
		return p.pass(c, foreignTLS, head, d.app)
	}
	return p.terminate(c, &d.client, d.deadline, d.app)
}

// detected is what PERMISSIVE has learnt from who spoke first.
type detected struct {
	what     sighting
	client   sniffer
	deadline time.Time // of the handshake, if there is to be one
	app      *stream   // nil if the app was not dialled yet
}

// detect finds out what a client speaks. An outcome means that it ends here.
func (p *Proxy) detect(c *connection) (detected, *outcome) {
	var d detected
	buf := make([]byte, sniffBuffer)
	_ = c.accepted.SetReadDeadline(time.Now().Add(p.conf.DetectionTime))
	n, err := c.accepted.Read(buf)
	if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		return p.detectLate(c, buf)
	}
	o := p.recognise(c, &d, buf, n, err)
	return d, o
}

// detectLate goes on for a client that was silent. From now on it waits for the
// app as well, and whoever speaks first decides.
func (p *Proxy) detectLate(c *connection, buf []byte) (detected, *outcome) {
	var d detected
	if err := c.wait(true); err != nil {
		return d, broken(err)
	}
	conn, err := c.dial()
	if err != nil {
		return d, p.unreachable(err)
	}
	// Both may stay silent for long, as idle connections do.
	p.endHandshake(c)
	_ = c.accepted.SetReadDeadline(time.Time{})
	app := newGreeter(conn, c.accepted)
	n, err := c.accepted.Read(buf)
	var o *outcome
	switch {
	case !app.clientSpoke():
		d.what, d.client.wire = notTLS, buf[:n]
		if err != nil && err != io.EOF && !errors.Is(err, os.ErrDeadlineExceeded) {
			o = broken(err)
		}
	case !p.beginHandshake(c):
		o = &outcome{end: endLimit, err: errSourceLimit}
	default:
		if o = broken(c.wait(false)); o == nil {
			o = p.recognise(c, &d, buf, n, err)
		}
	}
	d.app, err = app.end()
	_ = c.accepted.SetReadDeadline(time.Time{})
	if o == nil {
		o = broken(err)
	}
	return d, o
}

// recognise looks at what the client's first read yielded, and reads on as far
// as that is needed.
//
// A client that has begun a TLS record has to finish its hello: from then on it
// is never taken for plaintext, whatever the app says meanwhile.
func (p *Proxy) recognise(c *connection, d *detected, buf []byte, n int, err error) *outcome {
	switch {
	case n == 0 && err == io.EOF:
		d.what = notTLS // the app is to see that nothing comes
		return nil
	case n == 0:
		return broken(err)
	}
	d.deadline = time.Now().Add(p.conf.HandshakeTime)
	_ = c.accepted.SetDeadline(d.deadline)
	if d.what, err = d.client.feed(buf[:n]); err == nil && d.what == unclear {
		d.what, err = sniff(c.accepted, &d.client, buf)
	}
	if err != nil {
		o := p.handshakeFailed(c, tls.ConnectionState{}, err)
		return &o
	}
	_ = c.accepted.SetDeadline(time.Time{})
	return nil
}

// broken is the outcome of an end that failed; nil if it has not.
func broken(err error) *outcome {
	if err == nil {
		return nil
	}
	return &outcome{end: endReset, err: err}
}

// sniff reads until it is clear what the client speaks.
func sniff(conn net.Conn, s *sniffer, buf []byte) (sighting, error) {
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if what, err := s.feed(buf[:n]); what != unclear || err != nil {
				return what, err
			}
		}
		if err != nil {
			return unclear, err
		}
	}
}

// greeter waits for the first bytes of an app whose client is silent, and
// settles which of the two spoke first.
type greeter struct {
	app      *net.TCPConn
	first    atomic.Bool // somebody has spoken
	done     chan struct{}
	greeting []byte // set before done is closed, as is err
	err      error
}

// newGreeter begins to listen to app. If app speaks first, a Read that waits for
// the client is ended. Call end when it is no longer needed.
func newGreeter(app, client *net.TCPConn) *greeter {
	g := &greeter{app: app, done: make(chan struct{})}
	go func() {
		defer close(g.done)
		buf := make([]byte, greetingBuffer)
		n, err := app.Read(buf)
		g.greeting = buf[:n]
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return // end called
		}
		if err != io.EOF { // the relay will see that itself
			g.err = err
		}
		if g.first.CompareAndSwap(false, true) {
			_ = client.SetReadDeadline(past())
		}
	}()
	return g
}

// clientSpoke says that the client has spoken. It returns false if the app did
// so before.
func (g *greeter) clientSpoke() bool { return g.first.CompareAndSwap(false, true) }

// end stops listening and returns the app with what it has said so far.
func (g *greeter) end() (*stream, error) {
	_ = g.app.SetReadDeadline(past())
	<-g.done
	_ = g.app.SetReadDeadline(time.Time{})
	return &stream{conn: g.app, head: g.greeting}, g.err
}

// past is a deadline that ends what is waiting.
func past() time.Time { return time.Unix(1, 0) }

// terminate ends the client's TLS here and hands what is inside to the app,
// which is dialled only for a peer that is known.
func (p *Proxy) terminate(c *connection, hello *sniffer, deadline time.Time, app *stream) introduced {
	from := &below{TCPConn: c.accepted, head: hello.wire}
	conn := tls.Server(from, p.server)
	peer, err := handshake(conn, deadline)
	if err != nil && from.oldTLS != nil {
		err = from.oldTLS
	}
	if err != nil {
		return over(p.handshakeFailed(c, conn.ConnectionState(), err))
	}
	if err := c.settle(mutualTLS, peer); err != nil {
		return over(outcome{end: endReset, err: err})
	}
	return p.deliver(c, stream{conn: conn}, app)
}

// handshake runs a handshake to its end and returns who the peer is.
func handshake(conn *tls.Conn, deadline time.Time) (identity.ID, error) {
	if err := conn.SetDeadline(deadline); err != nil {
		return identity.ID{}, err
	}
	if err := conn.Handshake(); err != nil {
		return identity.ID{}, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return identity.ID{}, err
	}
	return identity.PeerID(conn.ConnectionState())
}

// handshakeFailed lets the client read why, as far as an alert told it. A socket
// that is closed with bytes unread is reset by the kernel, which may take the
// alert from the client again; and a client of TLS 1.3 has usually sent its
// first request by then.
func (p *Proxy) handshakeFailed(c *connection, state tls.ConnectionState, err error) outcome {
	why := classify(err, state, p.conf.Identity)
	if why != failedTimeout && why != failedClosed && c.accepted.CloseWrite() == nil {
		_ = c.accepted.SetReadDeadline(time.Now().Add(lingerTime))
		_, _ = io.CopyN(io.Discard, c.accepted, lingerBytes)
	}
	return outcome{end: endHandshake, failure: why, err: err}
}

// pass hands bytes through as they are.
func (p *Proxy) pass(c *connection, s security, client stream, app *stream) introduced {
	if err := c.settle(s, identity.ID{}); err != nil {
		return over(outcome{end: endReset, err: err})
	}
	_ = c.accepted.SetDeadline(time.Time{})
	return p.deliver(c, client, app)
}

// deliver connects the client with the app, which is dialled unless it was already.
func (p *Proxy) deliver(c *connection, client stream, app *stream) introduced {
	if app == nil {
		conn, err := c.dial()
		if err != nil {
			return over(*p.unreachable(err))
		}
		app = &stream{conn: conn}
	}
	return introduced{accepted: client, dialled: *app}
}

func over(o outcome) introduced { return introduced{over: true, outcome: o} }

func (p *Proxy) unreachable(err error) *outcome {
	return &outcome{end: endUnreachable, err: fmt.Errorf("reaching the other side: %w", err)}
}

// hint tells, once for each client, why its TLS was not ours to terminate.
func (p *Proxy) hint(c *connection, alpn []string) {
	if !p.hinted(c.source) {
		return
	}
	p.conf.Log.Info("a client's TLS is passed to the app as it came: its ALPN offers no istio name; a client of the mesh should offer \"istio\"",
		"peer", c.source.String(), "listener", c.listener, "alpn", shorten(fmt.Sprintf("%q", alpn)))
}
