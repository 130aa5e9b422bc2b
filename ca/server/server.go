package server

import (
	"cmp"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/census"
	"github.com/meshca/meshca/policy"
)

// Limits on what one connection may ask of the server.
const (
	MaxMessage = 64 << 10 // bytes of a request
	maxHeaders = 16 << 10 // bytes of a header list
	maxStreams = 100      // at once on a connection

	// connectionAge ends the taking of new calls on a connection, jittered by
	// gRPC by ±10 %, so that load spreads over replicas that come and go.
	// Streams end by themselves no later than streamAge from their beginning, so
	// the grace is only for those that do not read.
	connectionAge   = 30 * time.Minute
	connectionGrace = 35 * time.Minute
	streamAge       = 30 * time.Minute // ±10 %

	handshakeTimeout = 10 * time.Second
	idleTimeout      = 15 * time.Minute // of a connection without calls
	pingAfter        = time.Minute      // of silence, to find dead peers
	pingTimeout      = 20 * time.Second
	// pingMinimum lets clients ping every 30 s; a timer of theirs that is a
	// little early must not cost them the connection.
	pingMinimum = 20 * time.Second

	drainTimeout = 15 * time.Second
)

// What a connection keeps in memory is kept small: it holds for anybody.
const (
	readBuffer = 4 << 10
	// window is how much of a stream, and of a connection, is taken in unread. It
	// does not grow by itself, as gRPC's would, to megabytes.
	window = 64 << 10
)

// Defaults of [Config].
const (
	DefaultMaxCalls                = 2048
	DefaultCallTimeout             = 10 * time.Second
	DefaultMaxConnections          = 10_000
	DefaultMaxConnectionsPerSource = 1_000
	DefaultMaxStrangersPerSource   = 64
	DefaultMaxStreams              = 10_000
)

// istiodName is what Istio's agents verify if their CA address contains
// "localhost".
const istiodName = "istiod.istio-system.svc"

// Policies says what holds for workloads. Its methods are safe for concurrent use
// and answer at once.
type Policies interface {
	// Policy returns the decision about a workload, nil while the policies are not
	// known, and a channel that is closed when that may have become another. The
	// fewer channels there are, the less a stream of many workloads costs.
	Policy(Subject) (*policy.Resolved, <-chan struct{})
}

// Subject is the workload that a resource is about.
type Subject = caller.Subject

// Pods says which pods live where. Its methods are safe for concurrent use and
// answer at once.
type Pods interface {
	// Live returns the namespace and the ServiceAccount of the pod with a UID, if it
	// lives on the node.
	Live(uid, node string) (namespace, serviceAccount string, ok bool)
	// Follow has tell called whenever Live may have become another, except by time
	// alone, until stop. Tell does not block.
	Follow(uid string, tell func()) (stop func())
}

// Refusal is a definite no to a caller whose token was good in itself.
type Refusal struct {
	Namespace, Pod, PodUID string
	Code                   codes.Code
	Reason                 string // for the pod's owner to read
}

// Config is what a [Server] is made from.
type Config struct {
	Authority     *ca.Authority         // required
	Authenticator *caller.Authenticator // required
	// Names are the server's own, by which clients verify it; at least one.
	// istiod.istio-system.svc is always among them in the certificate.
	Names ca.ServingNames
	// MaxCalls bounds the calls to CreateCertificate that are worked on or wait for
	// that at once, their callers known; zero means [DefaultMaxCalls]. More are refused
	// at once.
	MaxCalls int
	// CallTimeout bounds one call, from its first byte; zero means
	// [DefaultCallTimeout].
	CallTimeout time.Duration
	// MaxConnections bounds the connections that are open at once; zero means
	// [DefaultMaxConnections]. More are closed at once.
	MaxConnections int
	// MaxConnectionsPerSource bounds those from one IP address; zero means
	// [DefaultMaxConnectionsPerSource]. The agents of a node share its address
	// where they use its network, and all behind a NAT share one.
	MaxConnectionsPerSource int
	// MaxStrangersPerSource bounds those of them on which no caller was authenticated
	// yet; zero means [DefaultMaxStrangersPerSource]. One more closes the oldest.
	MaxStrangersPerSource int
	// MaxStreams bounds the xDS streams that are open at once; zero means
	// [DefaultMaxStreams].
	MaxStreams int
	// CallersReady, if any, says whether callers can be authenticated, such as
	// whether there are keys to verify tokens with. It must not wait.
	CallersReady func() error
	// Policies, if any, says what PeerAuthentication holds for a workload. Without
	// it none is sent.
	Policies Policies
	// Pods, if any, is what node agents are shown the workloads of their node by.
	// Without it they see themselves only, as everybody does.
	Pods Pods
	// Refused, if any, is told of each refusal of a pod. It must not block.
	Refused func(Refusal)
	// Census, if any, is told what becomes of each workload.
	Census  *census.Census
	Now     func() time.Time      // nil means time.Now
	Log     *slog.Logger          // nil means no log
	Metrics prometheus.Registerer // nil means none
}

// Server serves the CA on one port. Its methods are safe for concurrent use.
type Server struct {
	authority     *ca.Authority
	authenticator *caller.Authenticator
	serving       *serving
	connections   *limiter // by address
	strangers     int      // connections of one address without a caller
	arriving      *limiter // calls whose caller is not known yet, by address
	calls         *limiter // to CreateCertificate, by caller
	queue         *queue   // of those that have been read
	answers       *answers // to those that come again
	streams       *limiter // of xDS, by caller
	healthChecks  *limiter // by address
	callTimeout   time.Duration
	callersReady  func() error
	policies      Policies // nil for none
	pods          Pods     // nil for none
	refused       func(Refusal)
	census        *census.Census
	clock         func() time.Time
	log           *slog.Logger
	metrics       *metrics
	grpc          *grpc.Server
	draining      chan struct{} // closed when Serve begins to end
	hasBegun      atomic.Bool   // it was ready once
	toldWaiting   atomic.Bool   // the log says that it was not when somebody came
}

// New checks the configuration and makes a server.
func New(c Config) (*Server, error) {
	if c.Authority == nil || c.Authenticator == nil {
		return nil, errors.New("CA server: Authority and Authenticator must both be given")
	}
	if err := c.Names.Validate(); err != nil {
		return nil, fmt.Errorf("CA server: the names of its certificate, by which clients verify it: %w", err)
	}
	if c.MaxCalls < 0 || c.CallTimeout < 0 || c.MaxConnections < 0 || c.MaxConnectionsPerSource < 0 || c.MaxStrangersPerSource < 0 || c.MaxStreams < 0 {
		return nil, fmt.Errorf("CA server: MaxCalls %d, CallTimeout %v, MaxConnections %d, MaxConnectionsPerSource %d, MaxStrangersPerSource %d and MaxStreams %d must not be negative",
			c.MaxCalls, c.CallTimeout, c.MaxConnections, c.MaxConnectionsPerSource, c.MaxStrangersPerSource, c.MaxStreams)
	}
	c.MaxCalls = cmp.Or(c.MaxCalls, DefaultMaxCalls)
	c.CallTimeout = cmp.Or(c.CallTimeout, DefaultCallTimeout)
	c.MaxConnections = cmp.Or(c.MaxConnections, DefaultMaxConnections)
	c.MaxConnectionsPerSource = cmp.Or(c.MaxConnectionsPerSource, DefaultMaxConnectionsPerSource)
	c.MaxStrangersPerSource = cmp.Or(c.MaxStrangersPerSource, DefaultMaxStrangersPerSource)
	c.MaxStreams = cmp.Or(c.MaxStreams, DefaultMaxStreams)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.CallersReady == nil {
		c.CallersReady = func() error { return nil }
	}
	if c.Refused == nil {
		c.Refused = func(Refusal) {}
	}
	if c.Census == nil {
		c.Census = census.New() // that nobody asks
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if !slices.Contains(c.Names.DNS, istiodName) {
		c.Names.DNS = append(slices.Clone(c.Names.DNS), istiodName)
	}
	queue := newQueue()
	m, err := newMetrics(c.Metrics, queue)
	if err != nil {
		return nil, fmt.Errorf("CA server: metrics: %w", err)
	}
	s := &Server{
		authority: c.Authority, authenticator: c.Authenticator,
		connections:  newLimiter("connections are open", c.MaxConnections, c.MaxConnectionsPerSource),
		strangers:    c.MaxStrangersPerSource,
		arriving:     newLimiter("calls wait to be authenticated", maxArriving, maxArrivingPerSource),
		calls:        newLimiter("calls are being worked on", c.MaxCalls, maxCallsPerCaller),
		queue:        queue,
		answers:      newAnswers(),
		streams:      newLimiter("streams are open", c.MaxStreams, maxStreamsPerCaller),
		healthChecks: newLimiter("health checks are open", maxHealth, maxHealthPerSource),
		callTimeout:  c.CallTimeout, callersReady: c.CallersReady, policies: c.Policies, pods: c.Pods, refused: c.Refused, census: c.Census,
		clock: c.Now, log: c.Log, metrics: m, draining: make(chan struct{}),
	}
	s.serving = &serving{authority: c.Authority, names: c.Names, now: s.now, log: c.Log, end: m.servingEnd}
	s.grpc = s.newGRPC()
	return s, nil
}

// now is the wall clock, without the monotonic reading that stands still while
// a machine sleeps.
func (s *Server) now() time.Time { return s.clock().Round(0) }

func (s *Server) newGRPC() *grpc.Server {
	g := grpc.NewServer(
		grpc.Creds(newTransport(s.tlsConfig(), s.log)),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
		grpc.ReadBufferSize(readBuffer),
		grpc.InTapHandle(s.begin),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: idleTimeout, MaxConnectionAge: connectionAge, MaxConnectionAgeGrace: connectionGrace,
			Time: pingAfter, Timeout: pingTimeout,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingMinimum, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
		grpc.StatsHandler(&callTagger{s}),
		grpc.StreamInterceptor(s.streamEdge),
		grpc.UnknownServiceHandler(unknownMethod),
	)
	g.RegisterService((&csrService{s: s}).desc(), nil)
	discovery.RegisterAggregatedDiscoveryServiceServer(g, &adsService{s: s})
	g.RegisterService((&healthService{s}).desc(), nil)
	return g
}

// tlsConfig asks for a client certificate without verifying it, if one could
// prove anything: crypto/tls checks that the peer holds its key, package caller
// what it proves. One that does not verify must not fail the handshake, or an
// expired certificate would stand in the way of a good token.
func (s *Server) tlsConfig() *tls.Config {
	clientAuth := tls.NoClientCert
	if s.authenticator.TakesCertificates() {
		clientAuth = tls.RequestClientCert
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		ClientAuth:             clientAuth,
		SessionTicketsDisabled: true, // a resumed session would keep its old certificates
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return s.serving.certificate()
		},
	}
}

// Serve serves on l until ctx is done, then lets calls in work finish, for 15 s
// at most, and returns nil. It must be called once and closes l. Until the
// authority can sign there is no certificate to serve with, and handshakes
// fail: clients go to another address.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { s.serving.run(ctx) })
	wg.Go(func() {
		<-ctx.Done()
		close(s.draining)
		force := time.AfterFunc(drainTimeout, s.grpc.Stop)
		defer force.Stop()
		s.grpc.GracefulStop()
	})
	// Only the goroutine above stops it.
	if err := s.grpc.Serve(s.limited(l)); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serving the CA on %s: %w", l.Addr(), err)
	}
	return nil
}

// limited is l with at most so many connections open.
func (s *Server) limited(l net.Listener) net.Listener {
	return &limitListener{
		Listener: l, places: s.connections, each: s.strangers, strangers: list.New(), open: make(map[string]*list.List), opened: s.metrics.connections.Inc, closed: s.metrics.connections.Dec,
		begun: s.begun,
		refuse: func(from net.Addr, err error) {
			s.metrics.refused.Inc()
			s.log.Warn("connection refused", "peer", from.String(), "reason", err.Error())
		},
	}
}

// begun returns nil once the server has been ready. From then on a fault is told on
// the connection, to each caller.
func (s *Server) begun() error {
	if s.hasBegun.Load() {
		return nil
	}
	err := s.Ready()
	if err == nil {
		s.hasBegun.Store(true)
		return nil
	}
	s.metrics.refused.Inc()
	if !s.toldWaiting.Swap(true) {
		s.log.Info("connections are closed until the CA is ready for the first time", "reason", err.Error())
	}
	return err
}

// Ready returns nil if a certificate could be issued to a caller now: the
// authority can sign, there is a serving certificate to be reached with, and
// callers can be authenticated. It never waits.
func (s *Server) Ready() error {
	if err := s.authority.Ready(); err != nil {
		return err
	}
	if _, err := s.serving.certificate(); err != nil {
		return err
	}
	return s.callersReady()
}
