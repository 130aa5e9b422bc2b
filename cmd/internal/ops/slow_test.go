package ops

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/test/bufconn"
)

// A client that never finishes its headers is sent away.
func TestV67_HeadersHaveADeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pipe := bufconn.Listen(4 << 10)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- (&Endpoint{pipe}).Serve(ctx, Config{
				Ready: func() error { return nil }, Metrics: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler),
			})
		}()
		conn, err := pipe.DialContext(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: "); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		over := time.AfterFunc(time.Hour, func() { _ = conn.Close() })
		_, _ = io.Copy(io.Discard, conn)
		over.Stop()
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("sent away after %v", took)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Connections are bounded, and those that say nothing give their places up soon: who
// asks in earnest then is answered.
func TestV67_ConnectionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pipe := bufconn.Listen(4 << 10)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- (&Endpoint{pipe}).Serve(ctx, Config{
				Ready: func() error { return nil }, Metrics: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler),
			})
		}()
		for range maxConnections {
			conn, err := pipe.DialContext(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
		}
		began := time.Now()
		conn, err := pipe.DialContext(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if took := time.Since(began); took != headerTimeout {
			t.Errorf("one more was taken after %v; want %v", took, headerTimeout)
		}
		if _, err := io.WriteString(conn, "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if answer, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") {
			t.Errorf("it was answered %q, %v; want 200 and the end", answer, err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
