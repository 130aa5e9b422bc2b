// Package servertest runs the CA's real port for tests.
package servertest

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/server"
)

// patience is how long the port may take to be ready.
const patience = 20 * time.Second

// Serve serves on a port of the loopback until the test ends, and returns the address
// once the server is ready.
func Serve(tb testing.TB, c server.Config) (address string) {
	tb.Helper()
	s, err := server.New(c)
	if err != nil {
		tb.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(tb.Context()))
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			tb.Errorf("serving the CA's port: %v", err)
		}
	})
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for s.Ready() != nil {
		select {
		case <-deadline.C:
			tb.Fatalf("the CA's port is not ready: %v", s.Ready())
		case <-tick.C:
		}
	}
	return l.Addr().String()
}
