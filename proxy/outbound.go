package proxy

import (
	"crypto/tls"
	"sync"
	"time"
)

// serveOutbound connects the workload's connection to its target, in mutual TLS
// and to the named peer. There is no other way for its bytes: where the target
// cannot be reached, or is somebody else, the connection is reset.
func (p *Proxy) serveOutbound(c *connection, conf *tls.Config) introduced {
	raw, err := c.dial()
	if err != nil {
		c.resetQuietly()
		return over(*p.unreachable(err))
	}
	conn := tls.Client(&below{TCPConn: raw}, conf)
	peer, err := handshake(conn, time.Now().Add(p.conf.HandshakeTime))
	if err != nil {
		c.resetQuietly()
		return over(outcome{end: endHandshake, failure: classify(err, conn.ConnectionState(), p.conf.Identity), err: err})
	}
	if err := c.settle(mutualTLS, peer); err != nil {
		return over(outcome{end: endReset, err: err})
	}
	return introduced{accepted: stream{conn: c.accepted}, dialled: stream{conn: conn}}
}

// resetQuietly lets the workload see that its connection came to nothing: an
// orderly end would look like an empty answer.
func (c *connection) resetQuietly() { reset(c.accepted) }

// relay carries both ways until both ends have said that they are done, or one
// breaks off: then the other is reset, too.
func (p *Proxy) relay(c *connection, accepted, dialled stream) outcome {
	var back sync.WaitGroup
	back.Go(func() {
		n, err := p.buffers.carry(accepted, dialled)
		c.fromDialled = n
		if err != nil {
			c.cut(endReset, err)
		}
	})
	n, err := p.buffers.carry(dialled, accepted)
	c.fromAccepted = n
	if err != nil {
		c.cut(endReset, err)
	}
	back.Wait()
	return outcome{end: endClosed}
}
