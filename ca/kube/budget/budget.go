package budget

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Limits are what a [Budget] keeps to. All are required.
type Limits struct {
	Timeout   time.Duration // of one request, waiting for its turn included
	AtOnce    int
	PerNode   int     // at once, of one node's callers
	Waiting   int     // of one node's callers
	PerSecond float64 // in all
	Burst     int
}

// longestQuiet is the most that is made of a wish to be left alone.
const longestQuiet = time.Minute

// Budget is safe for concurrent use. Use [New].
type Budget struct {
	limits Limits
	places *fair
	rate   *rate.Limiter
	now    func() time.Time
	quiet  atomic.Int64 // Unix nanoseconds until which the API server wants no requests
}

// New makes a Budget. Now is the wall clock.
func New(l Limits, now func() time.Time) *Budget {
	return &Budget{
		limits: l, places: newFair(l.AtOnce, l.PerNode, l.Waiting),
		rate: rate.NewLimiter(rate.Limit(l.PerSecond), l.Burst), now: now,
	}
}

// Do calls request, for a caller on a node, once its turn has come. It does not
// wait while the API server wants to be left alone.
func (b *Budget) Do(ctx context.Context, node string, request func(context.Context) error) error {
	if wait := time.Duration(b.quiet.Load() - b.now().UnixNano()); wait > 0 {
		return fmt.Errorf("the API server has too much to do and wants no request within the next %v", wait.Round(time.Millisecond))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, b.limits.Timeout, fmt.Errorf("no answer within %v", b.limits.Timeout))
	defer cancel()
	leave, err := b.places.enter(ctx, node)
	if err != nil {
		return err
	}
	defer leave()
	if err := b.rate.Wait(ctx); err != nil {
		return fmt.Errorf("the API server is asked %v times a second already: %w", b.limits.PerSecond, err)
	}
	err = request(ctx)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w (%w)", context.Cause(ctx), err)
	}
	return err
}

// Wrap watches answers for the wish to be left alone (429). Client-go obeys it for
// the one request and would go on sending all others.
func (b *Budget) Wrap(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(req *http.Request) (*http.Response, error) {
		resp, err := next.RoundTrip(req)
		if err == nil && resp.StatusCode == http.StatusTooManyRequests {
			seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
			if err != nil {
				seconds = 1
			}
			quiet := min(max(time.Duration(seconds), 1)*time.Second, longestQuiet)
			b.quiet.Store(b.now().Add(quiet).UnixNano())
		}
		return resp, err
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }
