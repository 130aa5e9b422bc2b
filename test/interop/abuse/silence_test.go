package abuse

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/test/bufconn"
)

// handshakeTimeout is what a peer has from the first byte to the end of the
// HTTP/2 preface.
const handshakeTimeout = 10 * time.Second

// hello is the beginning of an ordinary ClientHello.
func hello(t *testing.T) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer far.Close()
	go func() { _ = tls.Client(near, &tls.Config{ServerName: hostName}).Handshake() }()
	defer near.Close()
	b := make([]byte, 100)
	_, err := io.ReadFull(far, b)
	must(t, err)
	return b
}

// Peers that connect and say nothing, or next to nothing, are closed when the
// handshake timeout has passed, by whichever part of the handshake they stop
// at, and never keep others waiting.
func TestF57_SilentPeersAreReaped(t *testing.T) {
	begin := hello(t)
	synctest.Test(t, func(t *testing.T) {
		l := bufconn.Listen(64 << 10)
		p := serve(t, l, l.DialContext)
		ended := make(chan time.Duration, 100)
		count := 0
		stall := func(how func(net.Conn)) {
			count++
			conn, err := p.dial(t.Context())
			must(t, err)
			began := time.Now()
			go func() {
				defer conn.Close()
				how(conn)
				_, _ = io.Copy(io.Discard, conn)
				ended <- time.Since(began)
			}()
		}
		for range 40 {
			stall(func(net.Conn) {})
		}
		for range 20 {
			stall(func(conn net.Conn) { _, _ = conn.Write(begin) })
		}
		for range 20 { // one byte a second is life, and not enough
			stall(func(conn net.Conn) {
				for i := range begin {
					if _, err := conn.Write(begin[i : i+1]); err != nil {
						return
					}
					<-time.After(time.Second)
				}
			})
		}
		for range 20 { // TLS, and then no preface
			stall(func(conn net.Conn) {
				secured := tls.Client(conn, p.clientTLS())
				_ = secured.HandshakeContext(context.Background())
			})
		}
		synctest.Wait() // all of them are where they stop
		began := time.Now()
		must(t, p.good(t))
		if took := time.Since(began); took != 0 {
			t.Errorf("a good client waited %v behind silent ones", took)
		}
		for range count {
			// The slow writers notice within their next second.
			if took := <-ended; took < handshakeTimeout-time.Second || took > handshakeTimeout+time.Second {
				t.Errorf("a stalled peer was closed after %v; want %v", took, handshakeTimeout)
			}
		}
	})
}

// Over real sockets: silent peers, broken ones and those that reset the
// connection in the middle of the handshake.
func TestF57_BrokenHandshakes(t *testing.T) {
	p := listen(t)
	begin := hello(t)
	huge := append([]byte{22, 3, 1, 0xff, 0xff}, make([]byte, 16<<10)...)
	p.while(t, func() {
		var silent []net.Conn
		for range 40 {
			silent = append(silent, p.connect(t))
		}
		for _, garbage := range [][]byte{
			[]byte("GET / HTTP/1.1\r\nHost: meshca\r\n\r\n"), []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), []byte("SSH-2.0-x\r\n"), huge, make([]byte, 1000),
		} {
			for range 4 {
				conn := p.connect(t)
				_, _ = conn.Write(garbage) // it may be closed before the end
				if _, err := io.Copy(io.Discard, conn); err != nil && !gone(err) {
					t.Errorf("after %.20q the connection was not closed: %v", garbage, err)
				}
			}
		}
		for range 40 {
			conn := p.connect(t)
			_, err := conn.Write(begin)
			must(t, err)
			must(t, conn.(*net.TCPConn).SetLinger(0)) // close resets
			must(t, conn.Close())
		}
		must(t, p.good(t))
		for _, conn := range silent {
			must(t, conn.Close())
		}
	})
}
