package proxy

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
)

// bare is what a few lines of crypto/tls and io.Copy do: the yardstick. It
// verifies as the proxy does, and does nothing else.
func bare(b *testing.B, k *kit) string {
	b.Helper()
	conf, err := identity.ServerTLS(identity.TLSConfig{SVIDs: k.world, Bundles: k.world, Authorize: identity.AuthorizeAny(), Now: time.Now})
	if err != nil {
		b.Fatal(err)
	}
	front := newApp(b, func(c *net.TCPConn) {
		conn := tls.Server(c, conf)
		if conn.Handshake() != nil {
			return
		}
		back, err := net.Dial("tcp", k.app.address)
		if err != nil {
			return
		}
		defer back.Close()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(conn, back)
			_ = conn.CloseWrite()
		}()
		_, _ = io.Copy(back, conn)
		_ = back.(*net.TCPConn).CloseWrite()
		<-done
	})
	return front.address
}

// relays runs a benchmark against both.
func relays(b *testing.B, k *kit, run func(b *testing.B, address string)) {
	b.Run("bare", func(b *testing.B) { run(b, bare(b, k)) })
	b.Run("proxy", func(b *testing.B) { run(b, k.in) })
}

// BenchmarkConnection: connect, handshake, one byte there and back, end.
func BenchmarkConnection(b *testing.B) {
	k := start(b)
	conf := k.meshConfig(frontendID, "istio")
	relays(b, k, func(b *testing.B, address string) {
		for b.Loop() {
			conn, err := tls.Dial("tcp", address, conf)
			if err != nil {
				b.Fatal(err)
			}
			if err := tryEcho(conn, "x"); err != nil {
				b.Fatal(err)
			}
			_ = conn.Close()
		}
	})
}

// bulk is how much a client gets.
const bulk = 16 << 20

func source(c *net.TCPConn) {
	buf := make([]byte, 64<<10)
	for sent := 0; sent < bulk; sent += len(buf) {
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
	_ = c.CloseWrite()
	_, _ = io.Copy(io.Discard, c)
}

func BenchmarkBulkMutualTLS(b *testing.B) {
	k := start(b, withApp(newApp(b, source)))
	conf := k.meshConfig(frontendID, "istio")
	relays(b, k, func(b *testing.B, address string) {
		b.SetBytes(bulk)
		for b.Loop() {
			conn, err := tls.Dial("tcp", address, conf)
			if err != nil {
				b.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, conn); n != bulk || err != nil {
				b.Fatal(n, err)
			}
			_ = conn.Close()
		}
	})
}

// BenchmarkBulkPlaintext is spliced, and is compared with no proxy at all.
func BenchmarkBulkPlaintext(b *testing.B) {
	k := start(b, withMode(policy.Disable), withApp(newApp(b, source)))
	run := func(b *testing.B, address string) {
		b.SetBytes(bulk)
		for b.Loop() {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				b.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, conn); n != bulk || err != nil {
				b.Fatal(n, err)
			}
			_ = conn.Close()
		}
	}
	b.Run("direct", func(b *testing.B) { run(b, k.app.address) })
	b.Run("proxy", func(b *testing.B) { run(b, k.in) })
}
