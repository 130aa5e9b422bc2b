package sds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
)

const (
	defaultFirstSVIDWait = 5 * time.Second
	// judgeInterval is how often the wall clock is asked whether the SVID has
	// ended: a suspended machine wakes up long after its timers were due.
	judgeInterval = 30 * time.Second
	// connectTimeout bounds the time in which a new connection must have spoken
	// HTTP/2.
	connectTimeout = 5 * time.Second
	// idleTimeout closes connections without a call, to give back their place.
	idleTimeout = 5 * time.Minute
	// minPingInterval is what a client's keepalive may ask of us.
	minPingInterval = 10 * time.Second
)

// Config is what a [Server] is made from.
type Config struct {
	Feed *Feed // required
	// Log gets one line for each delivery and each refusal; required. It should
	// carry what names the workload, such as its pod's UID.
	Log *slog.Logger
	// Metrics is where the server's metrics are registered; required. Several
	// servers may share one.
	Metrics prometheus.Registerer
	// Now is the clock that decides whether an SVID is still valid; required.
	Now func() time.Time
	// FirstSVIDWait is how long a Workload API call waits for the first SVID
	// before it ends with Unavailable. Zero means 5 s.
	FirstSVIDWait time.Duration
	// MaxStreams is how many calls may be open at once, on all connections.
	// Zero means 256.
	MaxStreams int
	// MaxConnections is how many connections may be open at once. Zero means 256.
	MaxConnections int
	// Budget is what this server shares with others of the process; nil if it is
	// the only one.
	Budget *Budget
}

// Server serves the agent's socket. Use [NewServer].
type Server struct {
	secretservice.UnimplementedSecretDiscoveryServiceServer
	workload.UnimplementedSpiffeWorkloadAPIServer
	discovery.UnimplementedAggregatedDiscoveryServiceServer

	conf      Config
	metrics   *metrics
	admission *admission
	names     nameBudget
	health    *health.Server
	served    atomic.Bool
	current   atomic.Pointer[view]
	receivers sync.WaitGroup // goroutines that read from streams
	consumers consumers

	problem string // the last one logged; owned by the refreshing goroutine
}

// NewServer checks the configuration and returns a server that does nothing
// until [Server.Serve].
func NewServer(c Config) (*Server, error) {
	if c.Feed == nil || c.Log == nil || c.Metrics == nil || c.Now == nil {
		return nil, errors.New("SDS server: Feed, Log, Metrics and Now must all be given")
	}
	if c.FirstSVIDWait < 0 || c.MaxStreams < 0 || c.MaxConnections < 0 {
		return nil, fmt.Errorf("SDS server: FirstSVIDWait %s, MaxStreams %d and MaxConnections %d must not be negative", c.FirstSVIDWait, c.MaxStreams, c.MaxConnections)
	}
	if c.FirstSVIDWait == 0 {
		c.FirstSVIDWait = defaultFirstSVIDWait
	}
	if c.MaxStreams == 0 {
		c.MaxStreams = defaultMaxStreams
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = defaultMaxConnections
	}
	m, err := newMetrics(c.Metrics)
	if err != nil {
		return nil, err
	}
	s := &Server{
		conf:      c,
		metrics:   m,
		admission: newAdmission(c.Budget.forCalls(c.MaxStreams), c.Now),
		health:    health.NewServer(),
	}
	s.current.Store(emptyView())
	s.setHealth(s.current.Load())
	return s, nil
}

// Serve accepts connections from l until ctx ends, then closes l and every
// connection, waits for all that it started, and returns nil. It may be called
// once.
//
// Streams are not drained: they have no end of their own, and clients of both
// protocols come back by themselves.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if s.served.Swap(true) {
		return errors.New("SDS server: Serve was called twice")
	}
	g := grpc.NewServer(
		grpc.Creds(transport()),
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreamsPerConn),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPingInterval, PermitWithoutStream: true}),
		grpc.StaticStreamWindowSize(windowBytes),
		grpc.StaticConnWindowSize(windowBytes),
		grpc.ReadBufferSize(bufferBytes),
		grpc.WriteBufferSize(bufferBytes),
		grpc.StreamInterceptor(s.guard),
		grpc.WaitForHandlers(true),
	)
	r := registrar{g}
	secretservice.RegisterSecretDiscoveryServiceServer(r, s)
	workload.RegisterSpiffeWorkloadAPIServer(r, s)
	discovery.RegisterAggregatedDiscoveryServiceServer(r, s)
	healthpb.RegisterHealthServer(r, s.health)
	reflection.RegisterV1(r)

	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	s.refresh() // before the first call, so that it finds what is there
	background.Go(func() { s.keepRefreshed(ctx) })
	if sock, ok := l.(*socket); ok {
		background.Go(func() { s.keepSocket(ctx, sock) })
	}
	background.Go(func() {
		<-ctx.Done()
		s.health.Shutdown()
		g.Stop()
	})
	err := g.Serve(&limitListener{
		Listener: l,
		places:   s.conf.Budget.forConnections(s.conf.MaxConnections),
		refused:  func() { s.metrics.refuse(refusedConnections) },
	})
	stopped := ctx.Err() != nil
	cancel()
	background.Wait()
	s.receivers.Wait()
	if stopped {
		return nil
	}
	return fmt.Errorf("serving the agent's socket %s: %w", l.Addr(), err)
}

// transport is plaintext: a workload that asks for its roots of trust has
// nothing yet to verify a server with, so the endpoint must not ask for TLS
// (SPIFFE_Workload_Endpoint §3.1). What protects it is the socket.
func transport() credentials.TransportCredentials { return insecure.NewCredentials() }

// keepRefreshed looks again whenever the feed changes, the SVID ends, or
// enough time has passed that the wall clock may have jumped.
func (s *Server) keepRefreshed(ctx context.Context) {
	for {
		changed, next := s.refresh()
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// refresh puts the feed's state in force. It returns the channel that tells of
// the feed's next change, and how long to wait for it at most.
func (s *Server) refresh() (changed <-chan struct{}, next time.Duration) {
	state, changed := s.conf.Feed.State()
	now := s.conf.Now()
	prev := s.current.Load()
	v, err := newView(prev, state, now)
	if v != prev {
		s.current.Store(v)
		s.setHealth(v)
		close(prev.replaced)
	}
	s.report(err) // last: a log that blocks must not hold up a certificate
	next = judgeInterval
	if v.svid != nil {
		next = min(next, v.svid.NotAfter().Sub(now.Round(0)))
	}
	return changed, next
}

// report logs what of a state cannot be served, once.
func (s *Server) report(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != s.problem {
		s.conf.Log.Error("part of the identity is not handed out", "reason", text)
	}
	s.problem = text
}

// setHealth says "serving" for what a call would get now.
func (s *Server) setHealth(v *view) {
	status := func(ok bool) healthpb.HealthCheckResponse_ServingStatus {
		if ok {
			return healthpb.HealthCheckResponse_SERVING
		}
		return healthpb.HealthCheckResponse_NOT_SERVING
	}
	sds := status(v.svid != nil)
	s.health.SetServingStatus("", sds)
	s.health.SetServingStatus(secretservice.SecretDiscoveryService_ServiceDesc.ServiceName, sds)
	s.health.SetServingStatus(discovery.AggregatedDiscoveryService_ServiceDesc.ServiceName, status(v.workload != nil))
	s.health.SetServingStatus(workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName, status(v.x509 != nil && v.denied == nil))
}
