package budget

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var small = Limits{Timeout: 3 * time.Second, AtOnce: 4, PerNode: 2, Waiting: 20, PerSecond: 1000, Burst: 1000}

// takes makes a request that takes so long.
func takes(d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// A node that floods waits for itself: it has its places and no more, and others
// need not wait behind it.
func TestF22_NodesTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(small, time.Now)
		var callers sync.WaitGroup
		var busy atomic.Int32
		for range 30 {
			callers.Go(func() {
				if err := b.Do(t.Context(), "flood", takes(10*time.Second)); errors.Is(err, errBusy) {
					busy.Add(1)
				} else if err == nil || !strings.Contains(err.Error(), "no answer within 3s") && !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("the flood: %v", err)
				}
			})
		}
		synctest.Wait()
		if n := busy.Load(); n != 30-2-20 {
			t.Errorf("%d were refused at once", n)
		}
		began := time.Now()
		if err := b.Do(t.Context(), "other", takes(time.Millisecond)); err != nil || time.Since(began) > time.Millisecond {
			t.Errorf("another node: %v after %v", err, time.Since(began))
		}
		callers.Wait()
		if b.places.free != small.AtOnce || len(b.places.inUse)+len(b.places.queues)+len(b.places.turns) != 0 {
			t.Errorf("after all: %+v", b.places)
		}
	})
}

// Places are never lost, whoever gives up when.
func TestPlacesAreKept(t *testing.T) {
	f := newFair(3, 2, 1000)
	var callers sync.WaitGroup
	var inside atomic.Int32
	for i := range 500 {
		callers.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), rand.N(3*time.Millisecond))
			defer cancel()
			leave, err := f.enter(ctx, fmt.Sprint(i%5))
			if err != nil {
				return
			}
			if n := inside.Add(1); n > 3 {
				t.Errorf("%d at once", n)
			}
			inside.Add(-1)
			leave()
		})
	}
	callers.Wait()
	if f.free != 3 || len(f.inUse)+len(f.queues)+len(f.turns) != 0 {
		t.Errorf("after all: %+v", f)
	}
}

// The wish to be left alone holds for all, for as long as it says and a minute at most.
func TestF23_LeftAlone(t *testing.T) {
	for header, want := range map[string]time.Duration{"20": 20 * time.Second, "": time.Second, "x": time.Second, "-5": time.Second, "86400": longestQuiet} {
		now := time.Unix(1e9, 0)
		b := New(small, func() time.Time { return now })
		rt := b.Wrap(roundTripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {header}}, Body: io.NopCloser(strings.NewReader(""))}, nil
		}))
		resp, err := rt.RoundTrip(nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		called := func() bool {
			ok := false
			_ = b.Do(t.Context(), "", func(context.Context) error { ok = true; return nil })
			return ok
		}
		now = now.Add(want - time.Millisecond)
		if called() {
			t.Errorf("%q: asked before %v were over", header, want)
		}
		if now = now.Add(time.Millisecond); !called() {
			t.Errorf("%q: not asked after %v", header, want)
		}
	}
}
