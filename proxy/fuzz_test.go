package proxy

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// said is a connection on which a client has said all that it ever will.
type said struct {
	net.Conn
	rest []byte
}

func (s *said) Read(p []byte) (int, error) {
	if len(s.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func (*said) Write(p []byte) (int, error)      { return len(p), nil }
func (*said) SetDeadline(time.Time) error      { return nil }
func (*said) SetWriteDeadline(time.Time) error { return nil }
func (*said) Close() error                     { return nil }

// asCryptoTLS returns the ALPN names that crypto/tls reads from a hello, and
// whether it could read one.
func asCryptoTLS(wire []byte) (alpn []string, ok bool) {
	stop := errors.New("seen enough")
	conn := tls.Server(&said{rest: wire}, &tls.Config{
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			alpn, ok = slices.Clone(hello.SupportedProtos), true
			return nil, stop
		},
	})
	_ = conn.Handshake()
	return alpn, ok
}

// FuzzSniffer: the answer does not depend on the pieces that the bytes come in,
// nothing of them is lost, what crypto/tls takes for a hello is not plaintext to
// us, and the protocols in it are the same. Where we refuse what it would take,
// the connection is closed, which is safe.
func FuzzSniffer(f *testing.F) {
	for _, alpn := range [][]string{nil, {"istio"}, {"istio-peer-exchange", "istio"}, {"h2", "http/1.1"}} {
		hello := recordHello(&tls.Config{InsecureSkipVerify: true, NextProtos: alpn}) //nolint:gosec // never answered
		f.Add(hello, 1)
		f.Add(splitRecords(hello, 100), 7)
		old := recordHello(&tls.Config{InsecureSkipVerify: true, NextProtos: alpn, MaxVersion: tls.VersionTLS12}) //nolint:gosec // as above
		f.Add(old, 3)
	}
	for _, b := range firstBytes() {
		f.Add(b.bytes, 2)
	}
	f.Fuzz(func(t *testing.T, wire []byte, size int) {
		var whole, pieces sniffer
		what, err := whole.feed(wire)
		if string(whole.wire) != string(wire) {
			t.Fatal("bytes were lost")
		}
		size = max(1, min(size, len(wire)))
		var piecewise sighting
		var piecewiseErr error
		for rest := wire; len(rest) > 0 && piecewise == unclear && piecewiseErr == nil; {
			n := min(size, len(rest))
			piecewise, piecewiseErr = pieces.feed(rest[:n])
			rest = rest[n:]
		}
		if what != piecewise || !errors.Is(err, piecewiseErr) || !slices.Equal(whole.alpn, pieces.alpn) {
			t.Fatalf("at once: %v, %v, %q; in pieces of %d: %v, %v, %q",
				what, err, whole.alpn, size, piecewise, piecewiseErr, pieces.alpn)
		}
		theirs, ok := asCryptoTLS(wire)
		if ok && what == notTLS && wire[1] == majorVersion { // it takes other versions, too
			t.Fatal("crypto/tls reads a hello, we say that it is none")
		}
		if ok && what == tlsHello && err == nil && !slices.Equal(theirs, whole.alpn) {
			t.Fatalf("crypto/tls reads the protocols %q, we read %q", theirs, whole.alpn)
		}
	})
}

// FuzzAccessLog: whatever a peer puts into its ALPN or into an error, and whoever
// it claims to be, a line of the log is one line, can be read, and is short.
func FuzzAccessLog(f *testing.F) {
	for _, s := range []string{"", "istio", "a\nb", "\x1b[31m", `","level":"ERROR`, "\x00", "é\u202e", "\xff\xfe", strings.Repeat("x", 5000), strings.Repeat("\n", 3000)} {
		f.Add(s, s)
	}
	target := newApp(f, func(*net.TCPConn) {})
	accepted := dialTCP(f, target.address) // only its address is wanted
	metrics, err := newMetrics(&Proxy{conf: Config{Metrics: prometheus.NewRegistry()}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, alpn, text string) {
		for name, handler := range map[string]func(io.Writer) slog.Handler{
			"JSON": func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, nil) },
			"text": func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, nil) },
		} {
			var out bytes.Buffer
			p := &Proxy{conf: Config{Log: slog.New(handler(&out))}, metrics: metrics, told: make(map[netip.Addr]struct{})}
			c := &connection{
				p: p, way: inbound, listener: "127.0.0.1:1", far: "127.0.0.1:2", accepted: accepted, security: undecided,
				cancel: func() {},
			}
			p.hint(c, []string{alpn, alpn})
			c.finish(outcome{end: endHandshake, failure: failedProtocol, err: errors.New(text)})
			lines := bytes.SplitAfter(out.Bytes(), []byte("\n"))
			if len(lines) != 3 || len(lines[2]) != 0 {
				t.Fatalf("%s: two entries are %d lines: %q", name, len(lines)-1, out.Bytes())
			}
			for _, line := range lines[:2] {
				// A byte may be escaped as \u0000, and shown as \\x00 before that.
				if len(line) > 16<<10 || bytes.ContainsAny(line[:len(line)-1], "\n\r\x00\x1b") {
					t.Errorf("%s: %d bytes: %.300q", name, len(line), line)
				}
				if name == "JSON" && !json.Valid(line) {
					t.Errorf("no JSON: %.300q", line)
				}
			}
		}
	})
}
