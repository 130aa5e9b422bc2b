package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

const (
	// tick bounds how long a deadline, or a new issuer, can go unseen.
	tick = 30 * time.Second
	// servingRetry is the pause after a failure while there is no certificate,
	// and the shortest of all.
	servingRetry = 500 * time.Millisecond
)

// serving keeps the server's own TLS certificate, under a new key each time.
type serving struct {
	authority *ca.Authority
	names     ca.ServingNames
	now       func() time.Time
	log       *slog.Logger
	end       prometheus.Gauge

	current atomic.Pointer[servingCertificate]
}

type servingCertificate struct {
	tls                  *tls.Certificate
	authority            string // that signed it, as [ca.Status] names it
	begin, renewAt, ends time.Time
}

// certificate returns what to show in a handshake now.
func (s *serving) certificate() (*tls.Certificate, error) {
	c := s.current.Load()
	if c == nil {
		return nil, errors.New("the CA has no serving certificate yet")
	}
	if now := s.now(); !now.Before(c.ends) {
		return nil, fmt.Errorf("the CA's serving certificate ended at %s, %v ago", c.ends.UTC().Format(time.RFC3339), now.Sub(c.ends).Round(time.Second))
	}
	return c.tls, nil
}

// run renews the certificate until ctx is done.
func (s *serving) run(ctx context.Context) {
	failing := false // and the log says so
	for ctx.Err() == nil {
		// The channel is taken first: what changes from here on wakes us.
		_, changed := s.authority.Bundle()
		had := s.current.Load() != nil
		wait, err := s.refresh(ctx)
		switch {
		case err == nil && failing:
			failing = false
			s.log.Info("the serving certificate has been renewed after a failure")
		case err != nil && had && !failing && ctx.Err() == nil:
			// Before the first one there is nothing to tell: the authority cannot
			// sign yet, and says itself why.
			failing = true
			s.log.Warn("no new serving certificate", "error", err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// refresh makes a certificate if one is due and says when to look again.
func (s *serving) refresh(ctx context.Context) (time.Duration, error) {
	now := s.now()
	// Read before signing: if the issuer changes in between, the certificate is
	// only taken for an older one than it is, and made once more.
	authority := s.authority.Status().Authority
	if c := s.current.Load(); c != nil && c.authority == authority && now.Before(c.renewAt) && !now.Before(c.begin) {
		return untilDue(now, c), nil
	}
	c, err := s.issue(ctx, authority)
	if err != nil {
		if s.current.Load() != nil {
			return tick, err
		}
		return servingRetry, err
	}
	s.current.Store(c)
	s.end.Set(float64(c.ends.Unix()))
	s.log.Info("new serving certificate", "authority", authority, "serial", identity.SerialString(c.tls.Leaf), "ends", c.ends)
	return untilDue(now, c), nil
}

// untilDue is never nothing: with a clock that is off, a new certificate can be
// due at once, and signing must not become a loop.
func untilDue(now time.Time, c *servingCertificate) time.Duration {
	return max(servingRetry, min(tick, c.renewAt.Sub(now)))
}

func (s *serving) issue(ctx context.Context, authority string) (*servingCertificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key for the serving certificate: %w", err)
	}
	now := s.now()
	chain, err := s.authority.IssueServing(ctx, s.names, key.Public())
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	c := &servingCertificate{tls: cert, authority: authority, begin: chain[0].NotBefore, ends: chain[0].NotAfter}
	for _, link := range chain {
		cert.Certificate = append(cert.Certificate, link.Raw)
		if link.NotAfter.Before(c.ends) {
			c.ends = link.NotAfter
		}
	}
	// Half of what is left and not of the period that the certificate states,
	// which begins before its issue.
	c.renewAt = now.Add(c.ends.Sub(now) / 2)
	return c, nil
}

// transport logs failed handshakes, which gRPC itself keeps quiet about. The
// commonest operators' question, why an agent cannot connect, has its answer
// in them.
type transport struct {
	credentials.TransportCredentials
	log *slog.Logger
}

func newTransport(c *tls.Config, log *slog.Logger) credentials.TransportCredentials {
	return &transport{credentials.NewTLS(c), log}
}

func (t *transport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := t.handshake(conn)
	if err != nil && !errors.Is(err, io.EOF) { // a peer that says nothing and leaves is a port check
		t.log.Info("TLS handshake failed", "peer", conn.RemoteAddr().String(), "error", cut(err.Error()))
	}
	if c, ok := conn.(*limitConn); ok && err == nil {
		if t, ok := info.(credentials.TLSInfo); ok {
			info = connInfo{t, c}
		}
	}
	return secured, info, err
}

// handshake runs on a goroutine of its own: its stack grows to many times of what the
// one that reads the connection from then on needs, and a stack shrinks late.
func (t *transport) handshake(conn net.Conn) (secured net.Conn, info credentials.AuthInfo, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		secured, info, err = t.TransportCredentials.ServerHandshake(conn)
	}()
	<-done
	return secured, info, err
}

// connInfo is what a call knows of its connection.
type connInfo struct {
	credentials.TLSInfo
	conn *limitConn
}

func (t *transport) Clone() credentials.TransportCredentials {
	return &transport{t.TransportCredentials.Clone(), t.log}
}
