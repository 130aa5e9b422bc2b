package relays

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/meshca/meshca/test/bench/measure"
	"github.com/meshca/meshca/test/bench/rig"
)

// running is a process of a relay, with a backend of its own.
type running struct {
	*relay
	target  target
	backend *backend
	ops     string // where it serves profiles; nowhere if empty
	family  []int
	stops   []func() error
}

// start runs a relay until stop, and returns when it relays. Its files have a
// name of their own.
func start(ctx context.Context, r *rig.Run, kind *relay, name string, conf *tls.Config) (*running, error) {
	return startWith(ctx, r, &running{relay: kind}, name, conf)
}

func startWith(ctx context.Context, r *rig.Run, s *running, name string, conf *tls.Config) (*running, error) {
	if err := s.start(ctx, r, name, conf); err != nil {
		return nil, errors.Join(fmt.Errorf("starting %s: %w", s.name, err), s.stop())
	}
	return s, nil
}

func (s *running) start(ctx context.Context, r *rig.Run, name string, conf *tls.Config) (err error) {
	if s.backend, err = newBackend(); err != nil {
		return err
	}
	s.stops = append(s.stops, func() error { s.backend.close(); return nil })
	listen, err := freeAddress(s.host)
	if err != nil {
		return err
	}
	s.target = target{listen, conf}
	command, err := s.command(site{name: name, listen: listen, backend: s.backend.address(), ops: s.ops})
	if err != nil {
		return err
	}
	process, stop, err := r.Start(name, command[0], command[1:]...)
	if err != nil {
		return err
	}
	s.stops = append(s.stops, stop)
	up, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := rig.Poll(up, "a request through it", time.Minute, func() error {
		if process.Exited() != nil {
			cancel() // stop will say how
		}
		return s.target.connections(up, 1)
	}); err != nil {
		return fmt.Errorf("%w; the last of its log:\n%s", err, process.LogTail(20))
	}
	// Connections for all threads and workers: what each makes once is made.
	if err := s.target.connections(ctx, 100); err != nil {
		return err
	}
	if s.family, err = measure.Family(process.PID()); err != nil {
		return err
	}
	return s.backend.awaitOpen(ctx, 0)
}

func (s *running) stop() error {
	var errs []error
	for i := len(s.stops) - 1; i >= 0; i-- {
		errs = append(errs, s.stops[i]())
	}
	return errors.Join(errs...)
}

// cpu is the processor time that f costs the relay. It ends when so many
// connections are left open.
func (s *running) cpu(ctx context.Context, left int, f func() error) (time.Duration, error) {
	before, err := measure.CPU(s.family...)
	if err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, fmt.Errorf("%s: %w", s.name, err)
	}
	if err := s.backend.awaitOpen(ctx, left); err != nil {
		return 0, fmt.Errorf("%s: %w", s.name, err)
	}
	after, err := measure.CPU(s.family...)
	return after - before, err
}

// sessions counts the tickets that a client is given.
type sessions struct{ given int }

func (s *sessions) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (s *sessions) Put(_ string, state *tls.ClientSessionState) {
	if state != nil {
		s.given++
	}
}

// check wants the relay to do the same TLS as all others, and no less.
func (s *running) check(ctx context.Context) error {
	conf, tickets := s.target.tls.Clone(), &sessions{}
	conf.SessionTicketsDisabled, conf.ClientSessionCache = false, tickets
	var conn net.Conn
	conn, err := target{s.target.address, conf}.dial(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	defer conn.Close()
	state := conn.(*tls.Conn).ConnectionState()
	key, _ := state.PeerCertificates[0].PublicKey.(*ecdsa.PublicKey)
	switch {
	case state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519 || state.CipherSuite != tls.TLS_AES_128_GCM_SHA256:
		return fmt.Errorf("%s speaks %s with %s and %s; want TLS 1.3 with X25519 and TLS_AES_128_GCM_SHA256",
			s.name, tls.VersionName(state.Version), state.CurveID, tls.CipherSuiteName(state.CipherSuite))
	case key == nil || key.Curve != elliptic.P256() || len(state.PeerCertificates) != 2:
		return fmt.Errorf("%s shows %d certificates, the first with a %T; want a P-256 leaf and an intermediate",
			s.name, len(state.PeerCertificates), state.PeerCertificates[0].PublicKey)
	case tickets.given > 0:
		return fmt.Errorf("%s gives %d session tickets; want none", s.name, tickets.given)
	}
	nobody := s.target.tls.Clone()
	nobody.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }
	if err := (target{s.target.address, nobody}).connections(ctx, 1); err == nil {
		return fmt.Errorf("%s lets in a client without a certificate", s.name)
	}
	return nil
}
