package proxy

import (
	"errors"
	"fmt"
)

// Limits on what a client may send before it has said everything that a
// decision needs.
const (
	// maxHello bounds a ClientHello, its handshake header included. crypto/tls
	// has the same bound.
	maxHello = 64 << 10
	// maxHelloWire bounds the records that carry it. Each costs five bytes more, so
	// a hello that is split beyond reason reaches this first.
	maxHelloWire = 2 * maxHello
)

// Numbers of TLS (RFC 8446, §4, §5.1 and appendix B; RFC 7301).
const (
	// A record's version means nothing (RFC 8446 §5.1); that of the first tells TLS
	// from what is none.
	recordHeader        = 5
	maxRecord           = 1 << 14
	recordHandshake     = 22
	majorVersion        = 3
	handshakeHeader     = 4
	typeClientHello     = 1
	extensionALPN       = 16
	randomAndVersion    = 2 + 32
	minProtocolListByte = 2
)

// Why a hello is not looked at any further.
var (
	errHelloTooLarge = fmt.Errorf("the ClientHello is larger than %d bytes", maxHello)
	errHelloBroken   = errors.New("the ClientHello is malformed")
)

// sighting is what the first bytes of a connection turned out to be.
type sighting int

const (
	unclear  sighting = iota // too few bytes to tell
	notTLS                   // no ClientHello begins here
	tlsHello                 // a whole ClientHello
)

// sniffer tells from a client's first bytes what it speaks, whatever pieces
// they arrive in. It keeps the bytes, since somebody has to be given them.
//
// It reads of a ClientHello what has to be known before it is decided who
// terminates it: the ALPN names. Everything else is left to crypto/tls.
type sniffer struct {
	wire  []byte // all that was read, in the order it came
	next  int    // where in wire the next record begins
	hello []byte // the handshake bytes of the records before next
	alpn  []string
}

// feed takes the next bytes, and says what they are once that is certain. After
// an answer other than unclear it is not called again.
func (s *sniffer) feed(p []byte) (sighting, error) {
	s.wire = append(s.wire, p...)
	for {
		rest := s.wire[s.next:]
		first := s.next == 0
		if first && !beginsTLS(rest) {
			return notTLS, nil
		}
		if len(rest) < recordHeader {
			return unclear, nil
		}
		length := int(rest[3])<<8 | int(rest[4])
		switch {
		case rest[0] != recordHandshake || length == 0 || length > maxRecord:
			return unclear, errHelloBroken
		case s.next+recordHeader+length > maxHelloWire:
			return unclear, errHelloTooLarge
		case first && len(rest) > recordHeader && rest[recordHeader] != typeClientHello:
			return notTLS, nil
		case len(rest) < recordHeader+length:
			return unclear, nil
		}
		s.hello = append(s.hello, rest[recordHeader:recordHeader+length]...)
		s.next += recordHeader + length
		if body, whole, err := clientHello(s.hello); err != nil {
			return unclear, err
		} else if whole {
			s.alpn, err = offeredProtocols(body)
			s.hello = nil
			return tlsHello, err
		}
	}
}

// beginsTLS reports whether p may be the beginning of a handshake record.
func beginsTLS(p []byte) bool {
	return (len(p) < 1 || p[0] == recordHandshake) && (len(p) < 2 || p[1] == majorVersion)
}

// clientHello returns the body of the ClientHello that hs begins with, once all
// of it is there.
func clientHello(hs []byte) (body []byte, whole bool, err error) {
	if len(hs) < handshakeHeader {
		return nil, false, nil
	}
	length := int(hs[1])<<16 | int(hs[2])<<8 | int(hs[3])
	if handshakeHeader+length > maxHello {
		return nil, false, errHelloTooLarge
	}
	if len(hs) < handshakeHeader+length {
		return nil, false, nil
	}
	return hs[handshakeHeader : handshakeHeader+length], true, nil
}

// offeredProtocols returns the ALPN names of a ClientHello's body, in the
// client's order. The list is nil where there is no such extension.
func offeredProtocols(body []byte) ([]string, error) {
	r := reader{rest: body}
	r.take(randomAndVersion)
	r.vector(1) // session ID
	r.vector(2) // cipher suites
	r.vector(1) // compression methods
	if r.broken {
		return nil, errHelloBroken
	}
	if len(r.rest) == 0 { // a hello of TLS 1.2 or older may have no extensions
		return nil, nil
	}
	extensions := reader{rest: r.vector(2)}
	if r.broken || len(r.rest) != 0 {
		return nil, errHelloBroken
	}
	var names []string
	for len(extensions.rest) > 0 {
		number, content := extensions.number(2), extensions.vector(2)
		if extensions.broken || number == extensionALPN && names != nil {
			return nil, errHelloBroken
		}
		if number == extensionALPN {
			if names = protocolNames(content); names == nil {
				return nil, errHelloBroken
			}
		}
	}
	return names, nil
}

// protocolNames reads a ProtocolNameList (RFC 7301 §3.1); nil if it is none.
func protocolNames(content []byte) []string {
	list := reader{rest: content}
	entries := reader{rest: list.vector(2)}
	if list.broken || len(list.rest) != 0 || len(entries.rest) < minProtocolListByte {
		return nil
	}
	var names []string
	for len(entries.rest) > 0 {
		name := entries.vector(1)
		if entries.broken || len(name) == 0 {
			return nil
		}
		names = append(names, string(name))
	}
	return names
}

// reader takes TLS's presentation language apart (RFC 8446 §3). What runs over
// the end reads as nothing, and is remembered.
type reader struct {
	rest   []byte
	broken bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.rest) {
		r.rest, r.broken = nil, true
		return nil
	}
	taken := r.rest[:n]
	r.rest = r.rest[n:]
	return taken
}

func (r *reader) number(bytes int) int {
	n := 0
	for _, b := range r.take(bytes) {
		n = n<<8 | int(b)
	}
	return n
}

// vector takes what stands behind a length of so many bytes.
func (r *reader) vector(lengthBytes int) []byte { return r.take(r.number(lengthBytes)) }
