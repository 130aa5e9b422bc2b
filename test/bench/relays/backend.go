package relays

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/meshca/meshca/test/bench/rig"
)

// backend is the app behind a relay: it sends back what it gets.
type backend struct {
	listener net.Listener
	group    sync.WaitGroup

	mu   sync.Mutex
	open map[net.Conn]bool
}

// newBackend makes one that runs until close.
func newBackend() (*backend, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listening as the backend: %w", err)
	}
	b := &backend{listener: l, open: make(map[net.Conn]bool)}
	b.group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // close called; without it, clients see what went wrong
			}
			b.mu.Lock()
			b.open[conn] = true
			b.mu.Unlock()
			b.group.Go(func() { b.echo(conn) })
		}
	})
	return b, nil
}

func (b *backend) address() string { return b.listener.Addr().String() }

// echo does not use io.Copy, whose splice would hold a pipe for each idle
// connection. Its buffer is small until much comes, as thousands are idle.
func (b *backend) echo(conn net.Conn) {
	defer func() {
		_ = conn.Close()
		b.mu.Lock()
		delete(b.open, conn)
		b.mu.Unlock()
	}()
	buf := make([]byte, 512)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if _, err := conn.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
		if n == len(buf) && n < chunk {
			buf = make([]byte, chunk)
		}
	}
}

// awaitOpen returns when so many connections are open. A relay's work on one is
// over when it is closed here.
func (b *backend) awaitOpen(ctx context.Context, n int) error {
	return rig.Poll(ctx, fmt.Sprintf("%d connections at the backend", n), time.Minute, func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if len(b.open) != n {
			return fmt.Errorf("there are %d", len(b.open))
		}
		return nil
	})
}

// close ends all connections and returns when nothing runs any more.
func (b *backend) close() {
	_ = b.listener.Close()
	b.mu.Lock()
	for conn := range b.open {
		_ = conn.Close()
	}
	b.mu.Unlock()
	b.group.Wait()
}
