package sds

import (
	"context"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// What one socket bears. It belongs to one workload, so that the limits keep a
// pod from eating up its node's agent, and not one process of a pod from
// another.
const (
	maxMessageBytes = 64 << 10 // of a request
	maxHeaderBytes  = 16 << 10
	// windowBytes is what a client may send ahead of us, on a stream and on a
	// connection. gRPC would raise it to 16 MiB for a fast client.
	windowBytes = 64 << 10
	// bufferBytes is what a connection reads and writes at a time. It holds as much
	// while it is open, and connections here carry little.
	bufferBytes           = 4 << 10
	defaultMaxConnections = 256
	// maxStreamsPerConn leaves room for an Envoy, which has one connection and a
	// stream for each secret that its listeners and clusters name.
	maxStreamsPerConn = 64
	defaultMaxStreams = 256
	callsPerSecond    = 50  // on average
	callsBurst        = 200 // Envoy opens a stream for each of its secrets at once
	// requestTimeout is how long a call may take to say what it wants. It has a
	// place meanwhile.
	requestTimeout = 10 * time.Second
	// Requests of one stream. An Envoy sends one at the start, and one for each
	// response that it gets.
	requestsPerSecond = 20
	requestsBurst     = 100
)

// bucket is a token bucket.
type bucket struct {
	perSecond, burst float64
	tokens           float64
	at               time.Time
}

func newBucket(perSecond, burst float64, now time.Time) *bucket {
	return &bucket{perSecond: perSecond, burst: burst, tokens: burst, at: now}
}

func (b *bucket) refill(now time.Time) {
	if passed := now.Sub(b.at); passed > 0 { // a clock that steps back gives nothing
		b.tokens = min(b.burst, b.tokens+passed.Seconds()*b.perSecond)
	}
	b.at = now
}

// take takes a token if there is one.
func (b *bucket) take(now time.Time) bool {
	b.refill(now)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// debt takes a token in any case, and returns how long it takes until that is
// paid for.
func (b *bucket) debt(now time.Time) time.Duration {
	b.refill(now)
	b.tokens--
	return time.Duration(max(0, -b.tokens) / b.perSecond * float64(time.Second))
}

// admission decides which calls get in.
type admission struct {
	open *places

	mu    sync.Mutex
	calls *bucket
	now   func() time.Time
}

func newAdmission(open *places, now func() time.Time) *admission {
	return &admission{open: open, calls: newBucket(callsPerSecond, callsBurst, now()), now: now}
}

// enter admits a call, or says why not. An admitted call must leave.
func (a *admission) enter() (refusal, bool) {
	if !a.open.take() {
		return refusedStreams, false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.calls.take(a.now()) {
		a.open.leave()
		return refusedRate, false
	}
	return "", true
}

func (a *admission) leave() { a.open.leave() }

// requireHeader holds SPIFFE_Workload_Endpoint §3 for the Workload API: the
// security header, case-sensitive and once, against requests that somebody
// made a workload's own HTTP client send. Envoy knows no such header, and the
// other services go without.
func requireHeader(ctx context.Context, method string) error {
	if !strings.HasPrefix(method, "/"+workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName+"/") {
		return nil
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
		return status.Error(codes.InvalidArgument, "the metadata \"workload.spiffe.io: true\" is missing")
	}
	return nil
}

// limitListener closes connections over the limit at once. Leaving them in the
// backlog would hang clients without a word.
type limitListener struct {
	net.Listener
	places  *places
	refused func()
}

func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.places.take() {
			return &limitConn{Conn: c, leave: sync.OnceFunc(l.places.leave)}, nil
		}
		l.refused()
		_ = c.Close() // nothing was said on it
	}
}

type limitConn struct {
	net.Conn
	leave func()
}

func (c *limitConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
