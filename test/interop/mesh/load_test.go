package mesh

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// load is steady traffic: mostly requests on connections of their own, which is
// where certificates matter, and some on one connection that is kept.
type load struct {
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu       sync.Mutex
	fresh    int // requests on connections of their own
	kept     int // requests on the kept connection
	failures []error
	slowest  time.Duration
}

// traffic is how to send one request of either kind.
type traffic struct{ fresh, kept func(context.Context) error }

const (
	freshEvery = 25 * time.Millisecond
	keptEvery  = 100 * time.Millisecond
)

func startLoad(ctx context.Context, tr traffic) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel}
	l.done.Go(func() { l.send(ctx, freshEvery, tr.fresh, &l.fresh) })
	l.done.Go(func() { l.send(ctx, keptEvery, tr.kept, &l.kept) })
	return l
}

func (l *load) send(ctx context.Context, every time.Duration, send func(context.Context) error, count *int) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		began := time.Now()
		// Not ctx: the last request is not cut short.
		one, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		err := send(one)
		cancel()
		l.mu.Lock()
		*count++
		l.slowest = max(l.slowest, time.Since(began))
		if err != nil {
			l.failures = append(l.failures, fmt.Errorf("at %s: %w", began.Format(time.StampMilli), err))
		}
		l.mu.Unlock()
	}
}

// stop ends the traffic and returns when it has ended. It may be called again.
func (l *load) stop() {
	l.cancel()
	l.done.Wait()
}

func (l *load) wantNoFailure(t *testing.T) {
	t.Helper()
	for _, err := range l.failures[:min(5, len(l.failures))] {
		t.Error(err)
	}
	if n := len(l.failures); n > 0 {
		t.Errorf("%d requests failed of %d", n, l.fresh+l.kept)
	}
	if l.fresh < 100 || l.kept < 20 {
		t.Errorf("only %d and %d requests were sent; that is no load", l.fresh, l.kept)
	}
}

func (l *load) String() string {
	return fmt.Sprintf("%d requests on new connections, %d on a kept one, %d failed, the slowest took %s",
		l.fresh, l.kept, len(l.failures), l.slowest.Round(time.Millisecond))
}

// httpThrough sends HTTP requests to the address. The kept connection has to
// last: Envoy must not close it because a certificate was replaced.
func httpThrough(t *testing.T, address string) traffic {
	dials := 0 // the kept requests are sent one after the other
	keep := &http.Transport{
		MaxConnsPerHost: 1,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			dials++
			if dials > 1 {
				return nil, fmt.Errorf("the kept connection was closed")
			}
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}
	t.Cleanup(keep.CloseIdleConnections)
	client := &http.Client{Transport: keep}
	return traffic{
		fresh: func(ctx context.Context) error { return once(ctx, address, nil) },
		kept:  func(ctx context.Context) error { return request(ctx, client, "http://"+address) },
	}
}
