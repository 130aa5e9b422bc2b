package proxy

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"
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
