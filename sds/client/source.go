package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/identity"
)

// The socket is on this machine, and asking costs nothing: the pauses only keep
// an agent that is starting from being hammered, and a proxy from being late.
const (
	firstPause   = 50 * time.Millisecond
	longestPause = time.Second
)

// Config is what [New] takes. Everything is required.
type Config struct {
	Socket string // path of the agent's socket
	Log    *slog.Logger
}

// Source is an [identity.SVIDSource] and an [identity.BundleSource] that an
// agent keeps current. It is safe for concurrent use. Use [New], then
// [Source.Run].
type Source struct {
	conf Config

	mu      sync.Mutex // never held while logging
	held    *material  // nil until the first
	why     error      // why there is none, or none newer
	changed chan struct{}
}

// New makes a source that holds nothing yet. It contacts nobody.
func New(c Config) (*Source, error) {
	if c.Socket == "" || c.Log == nil {
		return nil, errors.New("workload API client: Socket and Log must both be given")
	}
	return &Source{
		conf: c, changed: make(chan struct{}),
		why: fmt.Errorf("the agent at %q has not sent one yet", c.Socket),
	}, nil
}

// dial prepares a connection to the agent's socket; it is made when there is
// something to ask.
func dial(socket string) (*grpc.ClientConn, error) {
	// The dialer names the path itself, so that one with odd characters, or a
	// proxy in the environment, means nothing to gRPC.
	conn, err := grpc.NewClient("passthrough:///agent",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a Unix socket: its permissions protect it
		grpc.WithAuthority("localhost"),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: firstPause, Multiplier: 1.6, Jitter: 0.2, MaxDelay: longestPause},
			MinConnectTimeout: longestPause,
		}))
	if err != nil {
		return nil, fmt.Errorf("client of the agent at %q: %w", socket, err)
	}
	return conn, nil
}

// Run follows the agent until ctx ends. What goes wrong on the way is logged and
// tried again.
func (s *Source) Run(ctx context.Context) error {
	conn, err := dial(s.conf.Socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	api := workload.NewSpiffeWorkloadAPIClient(conn)
	said := ""
	again(ctx, func() bool {
		taken, err := s.follow(ctx, api)
		if ctx.Err() != nil {
			return false
		}
		if taken {
			said = ""
		}
		s.lost(err)
		if why := reason(err); why != said { // once for each kind of trouble
			said = why
			text := "no answer from the agent yet; trying again"
			if s.has() {
				text = "the agent's stream has ended; what was received last stays in use"
			}
			s.conf.Log.Warn(text, "socket", s.conf.Socket, "reason", why)
		}
		return taken
	})
	return nil
}

// again follows stream after stream until ctx ends, with pauses that grow while
// streams bring nothing.
func again(ctx context.Context, follow func() (taken bool)) {
	pause := firstPause
	for {
		if follow() {
			pause = firstPause
		}
		timer := time.NewTimer(pause/2 + rand.N(pause/2))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		pause = min(2*pause, longestPause)
	}
}

// follow takes what one stream brings until the stream ends, which always is an
// error. It reports whether the stream brought anything of use.
func (s *Source) follow(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (taken bool, err error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"))
	defer cancel()
	stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return false, err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return taken, err
		}
		m, skipped, err := parse(r)
		if err != nil {
			// The stream goes on: the next message may be better.
			s.lost(err)
			s.conf.Log.Error("the agent sent what cannot be used; what was received before stays in use",
				"socket", s.conf.Socket, "error", err.Error())
			continue
		}
		taken = true
		s.take(m)
		for _, err := range skipped {
			s.conf.Log.Error("the agent sent a bundle that cannot be used; its trust domain is not trusted", "error", err.Error())
		}
	}
}

func (s *Source) take(m *material) {
	s.mu.Lock()
	s.held, s.why = m, nil
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	// Not with the lock held: a log that nobody reads would hold up every
	// handshake.
	s.conf.Log.Info("identity received", "spiffe_id", m.svid.ID().String(), "serial", m.svid.Serial(),
		"not_after", m.svid.NotAfter().UTC().Format(time.RFC3339), "trust_domains", len(m.bundles))
}

// lost notes why there is nothing newer, for whoever asks while there is nothing
// at all.
func (s *Source) lost(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.why = fmt.Errorf("asking the agent at %q: %s", s.conf.Socket, reason(err))
}

func (s *Source) has() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held != nil
}

// reason is an error as an operator reads it.
func reason(err error) string {
	if st, ok := status.FromError(err); ok {
		// gRPC wraps what the kernel said about the socket three times.
		if _, cause, ok := strings.Cut(st.Message(), "Error while dialing: "); ok {
			return shorten(strings.TrimSuffix(cause, `"`))
		}
		return fmt.Sprintf("%v: %q", st.Code(), shorten(st.Message()))
	}
	return err.Error()
}

func shorten(text string) string {
	const most = 256
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}

// SVID returns the SVID that the agent sent last, which may have ended.
func (s *Source) SVID() (*identity.SVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		return nil, s.why
	}
	return s.held.svid, nil
}

// Bundle returns the bundle of td that the agent sent last.
func (s *Source) Bundle(td identity.TrustDomain) (*identity.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		return nil, s.why
	}
	b := s.held.bundles[td]
	if b == nil {
		return nil, &identity.NoBundleError{TrustDomain: td, Held: s.held.domains()}
	}
	return b, nil
}

// Changed returns a channel that is closed when the next set has been taken.
func (s *Source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}
