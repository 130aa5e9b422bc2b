package relays

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/test/bench/measure"
)

const (
	requestSize = 64
	chunk       = 64 << 10
	dialers     = 8
	// patience bounds an exchange that would hang.
	patience = 30 * time.Second
)

// target is where clients connect to.
type target struct {
	address string
	tls     *tls.Config // nil: plaintext
}

// dial returns a connection on which a request has been answered: a client of
// TLS 1.3 believes to be connected before the server has judged it. It has no
// deadline.
func (t target) dial(ctx context.Context) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", t.address)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	if t.tls != nil {
		conn = tls.Client(conn, t.tls)
	}
	if err := exchange(conn, make([]byte, requestSize)); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("the first request on a connection to %s: %w", t.address, err)
	}
	_ = conn.SetDeadline(time.Time{})
	return conn, nil
}

var request = bytes.Repeat([]byte("0123456789abcdef"), requestSize/16)

// exchange sends a request and wants it back.
func exchange(conn net.Conn, buf []byte) error {
	if _, err := conn.Write(request); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, buf); err != nil {
		return err
	}
	if !bytes.Equal(buf, request) {
		return fmt.Errorf("%q came back", buf)
	}
	return nil
}

// each runs f n times, by some goroutines, until one fails.
func each(n, by int, f func() error) (err error) {
	var (
		left atomic.Int64
		once sync.Once
		wg   sync.WaitGroup
	)
	left.Store(int64(n))
	for range by {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if e := f(); e != nil {
					once.Do(func() { err = e })
					left.Store(0)
				}
			}
		})
	}
	wg.Wait()
	return err
}

// connections opens n connections, for a request each.
func (t target) connections(ctx context.Context, n int) error {
	return each(n, dialers, func() error {
		conn, err := t.dial(ctx)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// open opens n connections to keep; those that were opened before a failure are
// returned with it.
func (t target) open(ctx context.Context, n int) (conns []net.Conn, err error) {
	var mu sync.Mutex
	err = each(n, dialers, func() error {
		conn, err := t.dial(ctx)
		if err == nil {
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
		}
		return err
	})
	return conns, err
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		_ = c.Close()
	}
}

// all runs f for each connection at once.
func all(conns []net.Conn, within time.Duration, f func(i int, conn net.Conn) error) error {
	errs := make([]error, len(conns))
	var wg sync.WaitGroup
	for i, conn := range conns {
		_ = conn.SetDeadline(time.Now().Add(within))
		wg.Go(func() { errs[i] = f(i, conn) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// pingPong makes requests on all connections for a while, on each the next when
// the last was answered, and returns how many it made.
func pingPong(ctx context.Context, conns []net.Conn, d time.Duration) (int64, error) {
	var count atomic.Int64
	end := time.Now().Add(d)
	err := all(conns, d+patience, func(_ int, conn net.Conn) error {
		buf, n := make([]byte, requestSize), int64(0)
		for time.Now().Before(end) && ctx.Err() == nil {
			if err := exchange(conn, buf); err != nil {
				return err
			}
			n++
		}
		count.Add(n)
		return ctx.Err()
	})
	return count.Load(), err
}

// bulk sends as much as it can on all connections for a while, reads all of it
// back meanwhile, and returns how many bytes that were.
func bulk(ctx context.Context, conns []net.Conn, d time.Duration) (int64, error) {
	var total atomic.Int64
	end := time.Now().Add(d)
	err := all(conns, d+patience, func(_ int, conn net.Conn) error {
		// Room enough that the writer never waits for the reader but through TCP.
		sent := make(chan struct{}, 1<<16)
		failed := make(chan error, 1)
		go func() {
			defer close(sent)
			data := make([]byte, chunk)
			for time.Now().Before(end) && ctx.Err() == nil {
				sent <- struct{}{}
				if _, err := conn.Write(data); err != nil {
					failed <- err
					return
				}
			}
			failed <- ctx.Err()
		}()
		buf := make([]byte, chunk)
		var readErr error
		for range sent {
			if readErr != nil {
				continue
			}
			n, err := io.ReadFull(conn, buf)
			total.Add(int64(n))
			if err != nil {
				readErr = err
				_ = conn.Close() // which ends the writer
			}
		}
		return errors.Join(readErr, <-failed)
	})
	return total.Load(), err
}

// openLoop starts requests by the clock for a while, on connections in turn, and
// returns how long after its due time each was answered. The instants are drawn,
// as of clients who know nothing of each other.
func openLoop(ctx context.Context, conns []net.Conn, rate float64, d time.Duration) (measure.Latencies, error) {
	var after []time.Duration // when each is due
	for at := time.Duration(0); at < d; {
		after = append(after, at)
		at += time.Duration(rand.ExpFloat64() / rate * float64(time.Second))
	}
	runtime.GC() // now, and not meanwhile
	took := make(measure.Latencies, len(after))
	began := time.Now().Add(10 * time.Millisecond)
	var writeErr error
	var wg sync.WaitGroup
	wg.Go(func() {
		writeErr = byTheClock(began, after, func(i int) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			_, err := conns[i%len(conns)].Write(request)
			return err
		})
		if writeErr != nil {
			for _, c := range conns {
				_ = c.Close() // which ends the readers
			}
		}
	})
	readErr := all(conns, d+patience, func(c int, conn net.Conn) error {
		buf := make([]byte, requestSize)
		for i := c; i < len(after); i += len(conns) {
			if _, err := io.ReadFull(conn, buf); err != nil {
				return err
			}
			took[i] = time.Since(began.Add(after[i]))
		}
		return nil
	})
	wg.Wait()
	return took, errors.Join(writeErr, readErr)
}

// byTheClock calls f at each instant, until it fails. Go's timers may be a
// millisecond late, several times what is measured, so that a thread sleeps
// instead, as exactly as the kernel can.
func byTheClock(began time.Time, after []time.Duration, f func(i int) error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// In nanoseconds; 0 is the default again. A kernel without it is 50 µs late.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) }()
	for i, a := range after {
		for wait := time.Until(began.Add(a)); wait > 0; wait = time.Until(began.Add(a)) {
			ts := unix.NsecToTimespec(int64(wait))
			_ = unix.Nanosleep(&ts, nil) // a signal may end it early
		}
		if err := f(i); err != nil {
			return err
		}
	}
	return nil
}
