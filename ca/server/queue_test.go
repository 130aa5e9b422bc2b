package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// oneWorker is a queue whose only worker is busy until release.
func oneWorker(t *testing.T) (q *queue, release func()) {
	t.Helper()
	q = newQueue()
	q.workers = 1
	hold := make(chan struct{})
	began := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := q.do(context.Background(), first, "busy", func() { close(began); <-hold }); err != nil {
			t.Error(err)
		}
	})
	<-began
	return q, func() { close(hold); wg.Wait() }
}

// over waits until the workers of a bubble have ended.
func over() { <-time.After(2 * lingers) }

// order has calls wait behind the busy worker, in the order given, and returns the one
// in which they were taken.
func order(t *testing.T, calls ...string) []string {
	t.Helper()
	var got []string
	synctest.Test(t, func(t *testing.T) {
		defer over()
		q, release := oneWorker(t)
		var wg sync.WaitGroup
		for _, name := range calls {
			c := first
			if name[0] == 'r' {
				c = renewal
			}
			wg.Go(func() {
				if err := q.do(t.Context(), c, name[1:2], func() { got = append(got, name) }); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		release()
		wg.Wait()
		synctest.Wait() // for the worker to see that nobody waits
		q.mu.Lock()
		running, lines := q.running, len(q.waiting[first].nodes)+len(q.waiting[renewal].nodes)
		q.mu.Unlock()
		if running != 0 || lines != 0 || q.lengths() != [classes]int{} {
			t.Errorf("%d at work, %v waiting, after all have gone", running, q.lengths())
		}
	})
	return got
}

// A node with many calls does not keep another's waiting.
func TestL1_NodesTakeTurns(t *testing.T) {
	got := order(t, "fa1", "fa2", "fa3", "fb1", "fb2", "fc1")
	if want := []string{"fa1", "fb1", "fc1", "fa2", "fb2", "fa3"}; !slices.Equal(got, want) {
		t.Errorf("taken in the order %q, want %q", got, want)
	}
}

// A pod that has nothing comes before one that renews with half of a life left; and a
// renewal still comes after so many of them.
func TestL1_FirstCertificatesBeforeRenewals(t *testing.T) {
	if got, want := order(t, "ra1", "rb1", "fa1", "fb1"), []string{"fa1", "fb1", "ra1", "rb1"}; !slices.Equal(got, want) {
		t.Errorf("taken in the order %q, want %q", got, want)
	}
	calls := []string{"ra1"}
	for i := range firstsPerRenewal + 2 {
		calls = append(calls, fmt.Sprint("fa", i))
	}
	if i := slices.Index(order(t, calls...), "ra1"); i != firstsPerRenewal {
		t.Errorf("the renewal is taken after %d first certificates, want %d", i, firstsPerRenewal)
	}
}

// In a crowd a node has so many places and no more, and others have theirs.
func TestL1_ACrowdedNodeLeavesPlacesToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer over()
		q, release := oneWorker(t)
		q.interval = time.Nanosecond
		var wg sync.WaitGroup
		var refused atomic.Int64
		wait := func(node string) {
			wg.Go(func() {
				var busy *busyError
				if err := q.do(t.Context(), first, node, func() {}); errors.As(err, &busy) {
					refused.Add(1)
				} else if err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		for range crowded + 10 { // alone it may fill the line up to there
			wait("a")
		}
		if refused.Load() != 10 {
			t.Errorf("%d of a node that came first were refused, want 10", refused.Load())
		}
		for range crowded/2 + 1 { // with two, each has half
			wait("b")
		}
		if refused.Load() != 11 {
			t.Errorf("%d of a second node were refused, want 1", refused.Load()-10)
		}
		for n := range crowded {
			for range perNode {
				wait(fmt.Sprint("c", n))
			}
		}
		if refused.Load() != 11 {
			t.Errorf("%d of many nodes were refused, want 0", refused.Load()-11)
		}
		wait("c0")
		if refused.Load() != 12 {
			t.Error("a node has more than its share")
		}
		release()
		wg.Wait()
	})
}

// Only so many are at work, however many ask.
func TestT17_FewAreAtWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer over()
		q := newQueue()
		var now, most atomic.Int64
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				err := q.do(t.Context(), first, fmt.Sprint(i%7), func() {
					most.Store(max(most.Load(), now.Add(1)))
					time.Sleep(time.Millisecond)
					now.Add(-1)
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if most.Load() != int64(q.workers) {
			t.Errorf("%d at work at once, of %d workers", most.Load(), q.workers)
		}
	})
}

// Who would wait for too long is refused at once, and is told to come back when those
// before him will have been served: each at an instant of his own.
func TestT17_BusyIsSaidEarlyWithATimeToComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer over()
		q, release := oneWorker(t)
		q.interval = 100 * time.Millisecond
		var wg sync.WaitGroup
		wait := func(c class) {
			wg.Go(func() {
				if err := q.do(t.Context(), c, "a", func() {}); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		for range 15 { // 1.5 s
			wait(renewal)
		}
		var told []time.Duration
		for range 3 {
			var busy *busyError
			if err := q.do(t.Context(), renewal, "b", func() { t.Error("it was begun") }); !errors.As(err, &busy) || busy.Waiting != 15 {
				t.Fatalf("error %v", err)
			}
			told = append(told, busy.After)
		}
		if told[0] < renewalsLater+500*time.Millisecond || told[1]-told[0] != q.interval/2 || told[2]-told[1] != q.interval/2 {
			t.Errorf("told to come back in %v", told)
		}
		wait(first) // which waits for its like only
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		var busy *busyError
		if err := q.do(ctx, first, "b", func() {}); !errors.As(err, &busy) {
			t.Errorf("with less time than the wait takes: %v", err)
		}
		if d := q.delay(first); d >= renewalsLater {
			t.Errorf("a first certificate is told to come back in %v", d)
		}
		for range 1000 {
			if d := q.delay(first); d <= 0 || d > longestDelay {
				t.Fatalf("told to come back in %v", d)
			}
		}
		release()
		wg.Wait()
	})
}

// A call whose caller has gone is not begun, and nobody waits for it.
func TestT17_AbandonedCallsAreNotBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer over()
		q, release := oneWorker(t)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := q.do(ctx, first, "a", func() { t.Error("begun") }); !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
		})
		synctest.Wait()
		cancel()
		synctest.Wait()
		if l := &q.waiting[first]; l.n != 0 || len(l.nodes) != 0 || len(l.turns) != 0 {
			t.Errorf("%d wait, of %d nodes with %d turns", l.n, len(l.nodes), len(l.turns))
		}
		taken := false
		wg.Go(func() {
			if err := q.do(t.Context(), first, "a", func() { taken = true }); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		release()
		wg.Wait()
		if !taken {
			t.Error("the next one was not begun")
		}
	})
}

// V62: on a worker's goroutine a panic would end the process.
func TestV62_APanicInTheQueueIsOneCallsProblem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer over()
		q, release := oneWorker(t)
		var wg sync.WaitGroup
		wg.Go(func() {
			var crash *panicError
			if err := q.do(t.Context(), first, "a", func() { panic("of one") }); !errors.As(err, &crash) {
				t.Errorf("error %v", err)
			}
		})
		synctest.Wait()
		release()
		wg.Wait()
		synctest.Wait()
		if err := q.do(t.Context(), first, "a", func() {}); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.running != 0 {
			t.Errorf("%d are at work still", q.running)
		}
	})
}
