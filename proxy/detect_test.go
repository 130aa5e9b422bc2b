package proxy

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/policy"
)

// impatient dials the app as soon as a client is silent.
func impatient(c *Config) { c.DetectionTime = time.Millisecond }

// hasty gives up on handshakes at once.
func hasty(c *Config) { c.HandshakeTime = 50 * time.Millisecond }

func TestV25_ServerFirstUnderPermissive(t *testing.T) {
	k := start(t, withMode(policy.Permissive), with(impatient), withApp(newApp(t, greet)))
	conn := k.dial()
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != greeting {
		t.Fatalf("%q, %v", got, err)
	}
	echoes(t, conn, "EHLO cart\r\n")
	_ = conn.Close()
	k.next(map[string]any{"security": "plaintext", "end": "closed", "bytes_to_peer": float64(len(greeting) + 11)})
}

// A client that is slow, and an app that waits for it: what the client sends
// first still decides, long after the app was dialled.
func TestV25_LateClientDecides(t *testing.T) {
	for _, tt := range []struct {
		name, security string
		app            func(testing.TB) *app
		alpn           []string
	}{
		{"mesh", "mutual TLS", func(t testing.TB) *app { return newApp(t, echo) }, []string{"istio"}},
		{"foreign TLS", "foreign TLS", tlsApp, []string{"-"}},
		{"plaintext", "plaintext", func(t testing.TB) *app { return newApp(t, echo) }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := start(t, withMode(policy.Permissive), with(impatient), withApp(tt.app(t)))
			raw := k.dial()
			k.app.accepted(t) // detection's time is over
			var conn net.Conn = raw
			if tt.alpn != nil {
				conf := k.meshConfig(frontendID)
				if tt.alpn[0] != "-" {
					conf.NextProtos = tt.alpn
				}
				conn = tls.Client(raw, conf)
			}
			echoes(t, conn, "hello")
			_ = conn.Close()
			k.next(map[string]any{"security": tt.security})
		})
	}
}

// An app that speaks while a hello is under way does not make its connection
// plaintext; what it said arrives inside.
func TestV25_F54_BegunHelloIsFinished(t *testing.T) {
	speak := make(chan struct{})
	spoken := make(chan struct{})
	app := newApp(t, func(c *net.TCPConn) {
		<-speak
		_, _ = io.WriteString(c, greeting)
		close(spoken)
		echo(c)
	})
	k := start(t, withMode(policy.Permissive), with(impatient), withApp(app))
	raw := k.dial()
	app.accepted(t)
	eventually(t, func() bool { return !k.handshaking() }) // it waits for both now
	slow := &firstByteApart{Conn: raw, between: func() {
		for !k.handshaking() {
			runtime.Gosched()
		}
		close(speak)
		<-spoken
	}}
	conn := tls.Client(slow, k.meshConfig(frontendID, "istio"))
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != greeting {
		t.Fatalf("%q, %v", got, err)
	}
	echoes(t, conn, "hello")
	_ = conn.Close()
	k.next(map[string]any{"security": "mutual TLS"})
}

// handshaking reports whether a client has taken a handshake's slot.
func (k *kit) handshaking() bool {
	k.proxy.mu.Lock()
	defer k.proxy.mu.Unlock()
	return len(k.proxy.handshakes) > 0
}

// firstByteApart sends the first byte by itself.
type firstByteApart struct {
	net.Conn
	between func()
}

func (f *firstByteApart) Write(p []byte) (int, error) {
	if f.between == nil {
		return f.Conn.Write(p)
	}
	if _, err := f.Conn.Write(p[:1]); err != nil {
		return 0, err
	}
	f.between()
	f.between = nil
	n, err := f.Conn.Write(p[1:])
	return n + 1, err
}

// bytewise sends every byte by itself.
type bytewise struct{ net.Conn }

func (b bytewise) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := b.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

// resplit sends the first handshake message as so many records, or as records
// of one byte.
type resplit struct {
	net.Conn
	records int // 0: of one byte
	done    bool
}

func (r *resplit) Write(p []byte) (int, error) {
	if r.done {
		return r.Conn.Write(p)
	}
	r.done = true
	size := 1
	if r.records > 0 {
		size = (len(p) - recordHeader + r.records - 1) / r.records
	}
	_, err := r.Conn.Write(splitRecords(p, size))
	return len(p), err
}

// splitRecords cuts the one record in p into smaller ones.
func splitRecords(p []byte, size int) []byte {
	var out []byte
	for body := p[recordHeader:]; len(body) > 0; {
		n := min(size, len(body))
		out = append(out, p[0], p[1], p[2])
		out = binary.BigEndian.AppendUint16(out, uint16(n))
		out = append(out, body[:n]...)
		body = body[n:]
	}
	return out
}

func TestV25_HelloInPieces(t *testing.T) {
	for _, mode := range []policy.Mode{policy.Permissive, policy.Strict} {
		for name, cut := range map[string]func(net.Conn) net.Conn{
			"bytes":            func(c net.Conn) net.Conn { return bytewise{c} },
			"records":          func(c net.Conn) net.Conn { return &resplit{Conn: c} },
			"five records":     func(c net.Conn) net.Conn { return &resplit{Conn: c, records: 5} },
			"records in bytes": func(c net.Conn) net.Conn { return &resplit{Conn: bytewise{c}, records: 5} },
		} {
			t.Run(fmt.Sprintf("%s, %s", mode, name), func(t *testing.T) {
				k := start(t, withMode(mode))
				conn := tls.Client(cut(k.dial()), k.meshConfig(frontendID, "istio"))
				echoes(t, conn, "hello")
				_ = conn.Close()
				k.next(map[string]any{"security": "mutual TLS", "spiffe_id": frontendID})
			})
		}
	}
}

// first is what a client sends at once, and what becomes of it.
type first struct {
	name       string
	bytes      []byte
	permissive string // "echo": the app's; else the failure
	strict     string // "plaintext", or the failure
}

func firstBytes() []first {
	hello := recordHello(&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"istio"}}) //nolint:gosec // only its hello is wanted
	broken := bytes.Clone(hello)
	broken[recordHeader+extensionsAt(hello[recordHeader:])]++ // as if 256 bytes more of extensions followed
	all := []first{
		{"garbage", []byte{0, 1, 2, 3, 0xff}, "echo", "plaintext"},
		{"SSH", []byte("SSH-2.0-OpenSSH_9.9\r\n"), "echo", "plaintext"},
		{"HTTP/2", []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "echo", "plaintext"},
		{"PROXY v1, then TLS", append([]byte("PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n"), hello...), "echo", "plaintext"},
		{"PROXY v2, then TLS", append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x01\x02\x03\x04\x05\x06\x07\x08\x00\x01\x00\x02"), hello...), "echo", "plaintext"},
		{"SSL 2", []byte("\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10"), "echo", "plaintext"},
		{"TLS alert", []byte("\x15\x03\x01\x00\x02\x02\x28"), "echo", "plaintext"},
		{"a server's hello", []byte("\x16\x03\x03\x00\x04\x02\x00\x00\x00"), "echo", "plaintext"},
		{"handshake of another version", []byte("\x16\x04\x00\x00\x05\x01\x00\x00\x01\x00"), "echo", "plaintext"},
		{"empty record", []byte("\x16\x03\x01\x00\x00\x16\x03\x01"), "hello malformed", "hello malformed"},
		{"record of 16 KiB and a byte", []byte("\x16\x03\x01\x40\x01\x01\x00\x40\x00"), "hello malformed", "hello malformed"},
		{"hello of 64 KiB and a byte", []byte("\x16\x03\x01\x40\x00\x01\x00\xff\xfd"), "", ""}, // completed below
		{"hello of 16 MiB", append([]byte("\x16\x03\x01\x00\x04\x01\xff\xff\xff"), hello...), "hello too large", "hello too large"},
		{"broken hello", broken, "hello malformed", "hello malformed"},
		{"another record in the hello", append([]byte("\x16\x03\x01\x00\x01\x01"), "\x17\x03\x01\x00\x01\x00"...), "hello malformed", "hello malformed"},
		{"the beginning of a hello", hello[:20], "timeout", "timeout"},
		{"the first byte of one", hello[:1], "timeout", "timeout"},
	}
	for i := range all {
		if strings.HasSuffix(all[i].name, "KiB and a byte") && all[i].strict == "" {
			all[i].bytes = append(all[i].bytes, make([]byte, 1<<14-4)...)
			all[i].permissive, all[i].strict = "hello too large", "hello too large"
		}
	}
	for _, verb := range []string{"GET", "POST", "CONNECT", "OPTIONS"} {
		all = append(all, first{verb, []byte(verb + " / HTTP/1.1\r\nHost: cart\r\n\r\n"), "echo", "plaintext"})
	}
	return all
}

// recordHello returns the record that a client begins with.
func recordHello(conf *tls.Config) []byte {
	client, server := net.Pipe()
	go func() {
		_ = tls.Client(client, conf).Handshake()
		_ = client.Close()
	}()
	defer server.Close()
	head := make([]byte, recordHeader)
	if _, err := io.ReadFull(server, head); err != nil {
		return nil
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(server, body); err != nil {
		return nil
	}
	return append(head, body...)
}

func TestV25_FirstBytes(t *testing.T) {
	for _, mode := range []policy.Mode{policy.Disable, policy.Permissive, policy.Strict} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			k := start(t, withMode(mode), with(hasty))
			for _, f := range firstBytes() {
				want := map[policy.Mode]string{policy.Disable: "echo", policy.Permissive: f.permissive, policy.Strict: f.strict}[mode]
				conn := k.dial()
				if _, err := conn.Write(f.bytes); err != nil {
					t.Fatal(err)
				}
				if want == "echo" {
					got := make([]byte, len(f.bytes))
					if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, f.bytes) {
						t.Errorf("%s: %q, %v", f.name, got, err)
					}
					k.app.accepted(t)
				} else if n, err := io.Copy(io.Discard, conn); n != 0 || err != nil && !isReset(err) {
					t.Errorf("%s: %d bytes, then %v; want a close", f.name, n, err)
				}
				_ = conn.Close()
				line := k.next(nil)
				switch want {
				case "echo":
					if line["end"] != "closed" || line["bytes_to_app"] != float64(len(f.bytes)) {
						t.Errorf("%s: %v", f.name, line)
					}
				case "plaintext":
					if line["end"] != "refused" || line["security"] != "plaintext" {
						t.Errorf("%s: %v", f.name, line)
					}
				default:
					if line["end"] != "handshake failed" || line["failure"] != want {
						t.Errorf("%s: %v", f.name, line)
					}
				}
			}
			k.app.untouched(t)
		})
	}
}

// A client that connects and says nothing.
func TestF57_SilenceIsBounded(t *testing.T) {
	t.Run("STRICT", func(t *testing.T) {
		k := start(t, with(hasty))
		ended(t, k.dial())
		k.next(map[string]any{"end": "handshake failed", "failure": "timeout", "security": "none"})
		k.app.untouched(t)
	})
	t.Run("PERMISSIVE", func(t *testing.T) { // the app's affair, as without a proxy
		app := newApp(t, func(*net.TCPConn) {}) // closes
		k := start(t, withMode(policy.Permissive), with(impatient), withApp(app))
		conn := k.dial()
		ended(t, conn)
		_ = conn.Close()
		k.next(map[string]any{"security": "plaintext"})
	})
	t.Run("a byte now and then", func(t *testing.T) {
		k := start(t, withMode(policy.Permissive), with(hasty))
		conn := k.dial()
		hello := recordHello(&tls.Config{InsecureSkipVerify: true}) //nolint:gosec // never answered
		for i := 0; ; i++ {                                         // never reaches the hello's last byte
			if _, err := conn.Write(hello[min(i, 20) : min(i, 20)+1]); err != nil || i == 20 {
				break
			}
		}
		ended(t, conn)
		k.next(map[string]any{"end": "handshake failed", "failure": "timeout"})
	})
}

// An empty connection reaches the app where plaintext may, and is a port check
// where it may not.
func TestV25_EmptyConnection(t *testing.T) {
	for mode, security := range map[policy.Mode]string{policy.Disable: "untouched", policy.Permissive: "plaintext", policy.Strict: "none"} {
		k := start(t, withMode(mode), withApp(newApp(t, greet)))
		conn := k.dial()
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(conn)
		if err != nil || (mode != policy.Strict) != (string(got) == greeting) {
			t.Errorf("%s: %q, %v", mode, got, err)
		}
		k.next(map[string]any{"end": "closed", "security": security})
	}
}

func TestOldTLSIsToldWhatToSet(t *testing.T) {
	for _, mode := range []policy.Mode{policy.Permissive, policy.Strict} {
		k := start(t, withMode(mode))
		conf := k.meshConfig(frontendID, "istio")
		conf.MaxVersion = tls.VersionTLS12
		err := tls.Client(k.dial(), conf).Handshake()
		if err == nil || !strings.Contains(err.Error(), "protocol version") {
			t.Errorf("%s: the client sees %v", mode, err)
		}
		line := k.next(map[string]any{"end": "handshake failed", "failure": "old tls"})
		if text, _ := line["error"].(string); !strings.Contains(text, "TLS 1.2") || !strings.Contains(text, "tls_maximum_protocol_version: TLSv1_3") {
			t.Errorf("%s: %v", mode, line)
		}
		k.app.untouched(t)
	}
}

func TestForeignTLSIsHintedAtOnce(t *testing.T) {
	k := start(t, withMode(policy.Permissive), withApp(tlsApp(t)))
	for range 3 {
		conn, err := k.call([]string{"h2"}, false)
		if err != nil {
			t.Fatal(err)
		}
		echoes(t, conn, "hello")
		_ = conn.Close()
		k.next(map[string]any{"security": "foreign TLS"})
	}
	hints := 0
	for len(k.logged) > 0 {
		if text, _ := (<-k.logged)["msg"].(string); strings.Contains(text, `should offer "istio"`) {
			hints++
		}
	}
	if hints != 1 {
		t.Errorf("%d hints for one client", hints)
	}
}

func TestHelloOf64KiBIsTaken(t *testing.T) {
	hello := recordHello(&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"istio"}}) //nolint:gosec // only its hello is wanted
	// Pad with an extension that nobody knows, up to the limit exactly.
	message := bytes.Clone(hello[recordHeader:])
	extensions := extensionsAt(message)
	padding := maxHello - len(message) - 4
	message = append(message, 0xfa, 0xfa)
	message = binary.BigEndian.AppendUint16(message, uint16(padding))
	message = append(message, make([]byte, padding)...)
	binary.BigEndian.PutUint16(message[extensions:], uint16(len(message)-extensions-2))
	put24(message[1:], len(message)-handshakeHeader)

	for extra, want := range map[int]error{0: nil, 1: errHelloTooLarge} {
		m := bytes.Clone(message)
		put24(m[1:], len(m)-handshakeHeader+extra)
		var s sniffer
		what, err := s.feed(splitRecords(append(make([]byte, 0, 1), record(m)...), 1<<14))
		if !errors.Is(err, want) || want == nil && (what != tlsHello || !offersMesh(s.alpn)) {
			t.Errorf("%d bytes: %v, %v", len(m)+extra, what, err)
		}
	}
}

func put24(p []byte, n int) { p[0], p[1], p[2] = byte(n>>16), byte(n>>8), byte(n) }

// record puts a header before m, whose length it does not look at.
func record(m []byte) []byte { return append([]byte{recordHandshake, majorVersion, 1, 0, 0}, m...) }

// extensionsAt returns where a ClientHello's extensions have their length.
func extensionsAt(message []byte) int {
	at := handshakeHeader + randomAndVersion
	at += 1 + int(message[at])
	at += 2 + int(binary.BigEndian.Uint16(message[at:]))
	return at + 1 + int(message[at])
}
