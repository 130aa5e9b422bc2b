package server

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/peer"

	"github.com/meshca/meshca/ca/caller"
)

// Limits by who asks. A stranger is known by address only; addresses are counted
// exactly as they are, since a prefix of IPv6 can be a pod, a node or a whole
// zone of a cloud, and only the totals hold against somebody who owns one.
const (
	// A call counts as arriving from its HEADERS until its caller is known. That
	// takes a signature check, or a wait for the keys to check with.
	maxArriving          = 4096
	maxArrivingPerSource = 512 // a node of 250 pods restarts behind one address

	// maxCallsPerCaller and maxStreamsPerCaller bound what one token is good for
	// at once. An agent needs one of each.
	maxCallsPerCaller   = 16
	maxStreamsPerCaller = 16

	// Health answers anybody, and has to read the question first.
	maxHealth          = 256
	maxHealthPerSource = 16
)

// limiter bounds how many of something are open, in total and for each key.
type limiter struct {
	what        string // for errors: connections, calls
	total, each int

	mu   sync.Mutex
	sum  int
	open map[string]int
}

func newLimiter(what string, total, each int) *limiter {
	return &limiter{what: what, total: total, each: each, open: make(map[string]int)}
}

// fullError says that all places are taken: not by who asked, and he may come again.
type fullError struct {
	taken int
	what  string
}

func (e *fullError) Error() string {
	return fmt.Sprintf("%d %s already, the most there may be", e.taken, e.what)
}

// enter takes a place, or says why there is none: a [*fullError] where others have all
// of them. Leave, which may be called more than once, gives it back.
func (l *limiter) enter(key string) (leave func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.sum >= l.total:
		return nil, &fullError{l.sum, l.what}
	case l.open[key] >= l.each:
		return nil, fmt.Errorf("%d %s of %.256q already, the most one may have", l.open[key], l.what, key)
	}
	l.sum++
	l.open[key]++
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.sum--
		if l.open[key]--; l.open[key] == 0 {
			delete(l.open, key)
		}
	}), nil
}

// sourceOf is the address that a connection comes from, without its port.
func sourceOf(a net.Addr) string {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap().WithZone("").String()
	}
	return a.String()
}

// sourceOfCall is the address that a call comes from.
func sourceOfCall(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return sourceOf(p.Addr)
	}
	return ""
}

// keyOf is what a caller's calls are counted under: its pod, or where there is
// none its identity on its machine, as many machines may share an identity.
func keyOf(ctx context.Context, who *caller.Caller) string {
	if _, uid := who.Pod(); uid != "" {
		return uid
	}
	return who.ID().String() + " at " + sourceOfCall(ctx)
}

// A stream needs a request to subscribe and one for each answer.
const (
	requestsPerSecond = 10
	requestsBurst     = 50
)

// budget is what a stream may ask for. Only its handler touches it.
type budget struct {
	left float64
	at   time.Time
}

func newBudget(now time.Time) *budget { return &budget{requestsBurst, now} }

// spend reports whether there was something left for a request.
func (b *budget) spend(now time.Time) bool {
	if passed := now.Sub(b.at); passed > 0 { // a clock that is set back gives and takes nothing
		b.left = min(requestsBurst, b.left+passed.Seconds()*requestsPerSecond)
	}
	b.at = now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}
