package proxy

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
)

// halfCloser is a connection of which one way can end by itself.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// ways are the two ways in: untouched bytes, and mutual TLS.
func ways(t *testing.T, run func(t *testing.T, k func(handle func(*net.TCPConn)) (*kit, halfCloser))) {
	t.Run("plaintext", func(t *testing.T) {
		run(t, func(handle func(*net.TCPConn)) (*kit, halfCloser) {
			k := start(t, withMode(policy.Permissive), with(impatient), withApp(newApp(t, handle)))
			return k, k.dial()
		})
	})
	t.Run("mutual TLS", func(t *testing.T) {
		run(t, func(handle func(*net.TCPConn)) (*kit, halfCloser) {
			k := start(t, withApp(newApp(t, handle)))
			return k, k.dialTLS(k.meshConfig(frontendID, "istio"))
		})
	})
}

func random(n int) []byte {
	p := make([]byte, n)
	source := rand.NewChaCha8([32]byte{1})
	_, _ = source.Read(p)
	return p
}

// Whoever is done first, the other may go on, and nothing is lost.
func TestF58_HalfCloseLosesNothing(t *testing.T) {
	request, response := random(1<<20+17), random(1<<20+33)
	ways(t, func(t *testing.T, connect func(func(*net.TCPConn)) (*kit, halfCloser)) {
		t.Run("the client first", func(t *testing.T) {
			k, conn := connect(func(c *net.TCPConn) {
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, request) {
					t.Errorf("the app got %d bytes, %v", len(got), err)
				}
				_, _ = c.Write(response)
			})
			go func() { // a server that is to hear the end first reads all of it first
				_, _ = conn.Write(request)
				_ = conn.CloseWrite()
			}()
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, response) {
				t.Errorf("the client got %d bytes, %v", len(got), err)
			}
			k.next(map[string]any{"end": "closed", "bytes_to_app": float64(len(request)), "bytes_to_peer": float64(len(response))})
		})
		t.Run("the app first", func(t *testing.T) {
			got := make(chan []byte, 1)
			k, conn := connect(func(c *net.TCPConn) {
				_, _ = c.Write(response)
				_ = c.CloseWrite()
				all, _ := io.ReadAll(c)
				got <- all
			})
			if all, err := io.ReadAll(conn); err != nil || !bytes.Equal(all, response) {
				t.Errorf("the client got %d bytes, %v", len(all), err)
			}
			if _, err := conn.Write(request); err != nil {
				t.Error(err)
			}
			if err := conn.CloseWrite(); err != nil {
				t.Error(err)
			}
			if all := <-got; !bytes.Equal(all, request) {
				t.Errorf("the app got %d bytes", len(all))
			}
			k.next(map[string]any{"end": "closed"})
		})
	})
}

// A reset is passed on as one: an end would look like all that there was.
func TestF58_ResetIsPassedOn(t *testing.T) {
	ways(t, func(t *testing.T, connect func(func(*net.TCPConn)) (*kit, halfCloser)) {
		t.Run("from the client", func(t *testing.T) {
			seen := make(chan error, 1)
			k, conn := connect(func(c *net.TCPConn) {
				buf := make([]byte, 5)
				_, _ = io.ReadFull(c, buf)
				_, _ = c.Write(buf)
				_, err := io.Copy(io.Discard, c)
				seen <- err
			})
			echoes(t, conn, "hello")
			reset(conn)
			if err := <-seen; !isReset(err) {
				t.Errorf("the app sees %v", err)
			}
			k.next(map[string]any{"end": "reset"})
		})
		t.Run("from the app", func(t *testing.T) {
			k, conn := connect(func(c *net.TCPConn) {
				_, _ = io.ReadFull(c, make([]byte, 5))
				reset(c)
			})
			_, _ = io.WriteString(conn, "hello")
			if _, err := io.Copy(io.Discard, conn); !isReset(err) {
				t.Errorf("the client sees %v", err)
			}
			k.next(map[string]any{"end": "reset"})
		})
	})
}

// TLS that stops without saying so may have been cut by anybody.
func TestTruncatedTLSIsNoEnd(t *testing.T) {
	seen := make(chan error, 1)
	k := start(t, withApp(newApp(t, func(c *net.TCPConn) {
		_, err := io.Copy(c, c)
		seen <- err
	})))
	conn := k.dialTLS(k.meshConfig(frontendID, "istio"))
	echoes(t, conn, "hello")
	if err := conn.NetConn().(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := <-seen; !isReset(err) {
		t.Errorf("the app sees %v", err)
	}
	line := k.next(map[string]any{"end": "reset"})
	if line["error"] != io.ErrUnexpectedEOF.Error() {
		t.Errorf("%v", line)
	}
}

// The app closes and comes back; each connection is its own.
func TestF58_FlappingAppHealsAtOnce(t *testing.T) {
	k := start(t, withApp(newApp(t, func(c *net.TCPConn) {
		one := make([]byte, 1)
		if _, err := io.ReadFull(c, one); err != nil || one[0] == 'x' {
			reset(c)
			return
		}
		_, _ = c.Write(one)
		echo(c)
	})))
	conf := k.meshConfig(frontendID, "istio")
	for i := range 20 {
		conn := k.dialTLS(conf)
		if i%2 == 0 {
			_, _ = io.WriteString(conn, "x")
			if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("the client sees %v", err)
			}
		} else {
			echoes(t, conn, "hello")
		}
		_ = conn.Close()
		k.next(nil)
	}
}

// From proxy to proxy: what real deployments do.
func TestProxyToProxy(t *testing.T) {
	server := start(t, withApp(newApp(t, greet)))
	client := start(t, func(k *kit, c *Config) {
		k.world.svid = server.ca.SVID(t, identitytest.ID(t, frontendID))
		k.world.bundle = server.ca.Bundle()
		withOutbound(server.in, cartID)(k, c)
	})
	conn := dialTCP(t, client.out)
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != greeting {
		t.Fatalf("%q, %v", got, err)
	}
	echoes(t, conn, string(random(200<<10)))
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(conn); err != nil || len(rest) != 0 {
		t.Errorf("%d bytes, %v", len(rest), err)
	}
	server.next(map[string]any{"security": "mutual TLS", "spiffe_id": frontendID, "end": "closed"})
	client.next(map[string]any{"security": "mutual TLS", "spiffe_id": cartID, "end": "closed", "direction": "outbound"})
}

var _ halfCloser = (*tls.Conn)(nil)
