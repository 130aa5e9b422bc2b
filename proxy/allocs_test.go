//go:build !race

package proxy

import (
	"io"
	"net"
	"testing"
)

// What is carried costs no allocation, however small the pieces are.
func TestAllocationsOfARequest(t *testing.T) {
	b := newBuffers()
	client, from := net.Pipe()
	to, app := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = b.copy(to, from)
	}()
	defer func() {
		_ = client.Close()
		_ = app.Close()
		_ = to.Close()
		<-done
		_ = from.Close()
	}()
	message, got := make([]byte, 64), make([]byte, 64)
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := client.Write(message); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(app, got); err != nil {
			t.Error(err)
		}
	}); n > 0 {
		t.Errorf("%.1f allocations for a request, want none", n)
	}
}
