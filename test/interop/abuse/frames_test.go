package abuse

import (
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/meshca/meshca/ca/server"
)

const createCertificate = "/istio.v1.auth.IstioCertificateService/CreateCertificate"

// stranger speaks HTTP/2 by hand.
type stranger struct {
	*http2.Framer
	conn  *tls.Conn
	block bytes.Buffer
	enc   *hpack.Encoder
	next  uint32 // stream
}

// greet opens a connection and says the preface.
func (p *port) greet(t *testing.T) *stranger {
	t.Helper()
	s := &stranger{conn: p.handshake(t, p.connect(t)), next: 1}
	s.Framer = http2.NewFramer(s.conn, s.conn)
	s.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	s.enc = hpack.NewEncoder(&s.block)
	_, err := io.WriteString(s.conn, http2.ClientPreface)
	must(t, err)
	must(t, s.WriteSettings())
	return s
}

// headers encodes those of a call, and more.
func (s *stranger) headers(more ...hpack.HeaderField) []byte {
	s.block.Reset()
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"}, {Name: ":path", Value: createCertificate},
		{Name: ":authority", Value: hostName}, {Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}, more...) {
		_ = s.enc.WriteField(f) // to memory
	}
	return s.block.Bytes()
}

// call begins a call and returns its stream.
func (s *stranger) call(more ...hpack.HeaderField) (uint32, error) {
	id := s.next
	s.next += 2
	return id, s.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: s.headers(more...), EndHeaders: true})
}

// window is what may be sent on a new stream and connection before the other
// end has said more.
const window = 1<<16 - 1

// send sends the whole of a message, as the other end lets it, and returns the
// verdict on the stream; see verdict.
func (s *stranger) send(t *testing.T, stream uint32, data []byte) string {
	t.Helper()
	own, all := window, window // of the stream and of the connection
	for len(data) > 0 {
		n := min(len(data), own, all, 16<<10)
		if n == 0 {
			frame, err := s.ReadFrame()
			if update, ok := frame.(*http2.WindowUpdateFrame); ok && update.StreamID == 0 {
				all += int(update.Increment)
			} else if ok {
				own += int(update.Increment)
			} else if answer := judge(frame, err, stream); answer != "" {
				return answer
			}
			continue
		}
		must(t, s.WriteData(stream, n == len(data), data[:n]))
		data, own, all = data[n:], own-n, all-n
	}
	return s.verdict(stream)
}

// verdict reads until the server has answered the stream: its grpc-status, or
// what became of the stream or of the connection.
func (s *stranger) verdict(stream uint32) string {
	for {
		frame, err := s.ReadFrame()
		if answer := judge(frame, err, stream); answer != "" {
			return answer
		}
	}
}

// judge says what a frame means for a stream; empty for nothing.
func judge(frame http2.Frame, err error, stream uint32) string {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "no answer"
	} else if err != nil {
		return "connection ended"
	}
	switch f := frame.(type) {
	case *http2.GoAwayFrame:
		return "GOAWAY " + f.ErrCode.String()
	case *http2.RSTStreamFrame:
		if f.StreamID == stream {
			return "RST " + f.ErrCode.String()
		}
	case *http2.MetaHeadersFrame:
		for _, field := range f.Fields {
			if f.StreamID == stream && (field.Name == "grpc-status" || field.Name == ":status" && field.Value != "200") {
				return field.Name + " " + field.Value
			}
		}
	}
	return ""
}

// message is gRPC's framing: a flag, the length, the content.
func message(flag byte, length uint32, content []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{flag}, length), content...)
}

func TestT17_MessagesOverTheLimit(t *testing.T) {
	p := listen(t)
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	_, err := z.Write(make([]byte, 8<<20))
	must(t, err)
	must(t, z.Close())
	for _, tt := range []struct {
		name string
		more []hpack.HeaderField
		data []byte
		want string
	}{
		// Zeros are no protobuf; that they are read at all is the point.
		{"64 KiB", nil, message(0, server.MaxMessage, make([]byte, server.MaxMessage)), "grpc-status 13"},
		{"64 KiB and one byte", nil, message(0, server.MaxMessage+1, make([]byte, server.MaxMessage+1)), "grpc-status 8"},
		{"4 GiB, announced", nil, message(0, 1<<32-1, make([]byte, 100)), "grpc-status 8"},
		{"a gzip bomb", []hpack.HeaderField{{Name: "grpc-encoding", Value: "gzip"}}, message(1, uint32(bomb.Len()), bomb.Bytes()), "grpc-status 12"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := p.greet(t)
			stream, err := s.call(append(tt.more, p.authorization(t, 0))...)
			must(t, err)
			if got := s.send(t, stream, tt.data); got != tt.want {
				t.Errorf("%s; want %s", got, tt.want)
			}
		})
	}
	must(t, p.good(t))
}

// Header lists are bounded by their size once decoded: small blocks that grow
// by references into the table count as what they become.
func TestT17_HeaderListsOverTheLimit(t *testing.T) {
	p := listen(t)
	for name, more := range map[string][]hpack.HeaderField{
		"one long field": {{Name: "padding", Value: strings.Repeat("x", 17<<10)}},
		"many fields":    repeat(hpack.HeaderField{Name: "a", Value: "b"}, 1000),
		"references":     repeat(hpack.HeaderField{Name: "padding", Value: strings.Repeat("x", 3000)}, 5000),
	} {
		t.Run(name, func(t *testing.T) {
			s := p.greet(t)
			block := s.headers(more...)
			t.Logf("%d fields in %d bytes", len(more), len(block))
			first := block[:min(len(block), 16<<10)]
			must(t, s.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: first, EndHeaders: len(first) == len(block)}))
			if rest := block[len(first):]; len(rest) > 0 {
				must(t, s.WriteContinuation(1, true, rest))
			}
			if got := s.verdict(1); strings.HasPrefix(got, "grpc-status") || got == "no answer" {
				t.Errorf("the call was worked on: %s", got)
			} else {
				t.Log(got)
			}
		})
	}
	must(t, p.good(t))
}

func repeat(f hpack.HeaderField, n int) []hpack.HeaderField {
	all := make([]hpack.HeaderField, n)
	for i := range all {
		all[i] = f
	}
	return all
}

// A hundred calls may be open on a connection at once; one more is refused, and
// the others stay. Only known callers get that far: those of strangers end.
func TestT17_V60_StreamsAtOnce(t *testing.T) {
	p := listen(t)
	p.while(t, func() {
		s := p.greet(t)
		for n := range 100 {
			stream, err := s.call(p.authorization(t, n))
			must(t, err)
			must(t, s.WriteData(stream, false, message(0, 100, make([]byte, 50))))
		}
		over, err := s.call()
		must(t, err)
		if got := s.verdict(over); got != "RST REFUSED_STREAM" {
			t.Errorf("%s; want RST REFUSED_STREAM", got)
		}
		if got := s.send(t, 1, make([]byte, 50)); got != "grpc-status 13" { // zeros are no protobuf
			t.Errorf("the first call: %s; want grpc-status 13", got)
		}
		must(t, s.conn.Close())
	})
}

// Half of a message on each stream of each connection. A stranger's calls end
// as soon as their headers are there, so that nothing of them is kept.
func TestT17_V60_HalfSentMessages(t *testing.T) {
	p := listen(t)
	p.while(t, func() {
		for range 8 {
			s := p.greet(t)
			for range 100 {
				stream, err := s.call(hpack.HeaderField{Name: "authorization", Value: "Bearer x"})
				must(t, err)
				if got := s.part(t, stream, message(0, server.MaxMessage, make([]byte, 10<<10))); got != "grpc-status 16" {
					t.Fatalf("%s; want grpc-status 16", got)
				}
			}
			must(t, s.conn.Close())
		}
	})
}

// authorization is that of the nth of many callers.
func (p *port) authorization(t *testing.T, n int) hpack.HeaderField {
	t.Helper()
	return hpack.HeaderField{Name: "authorization", Value: "Bearer " + p.kit.Token(t, "shop", fmt.Sprintf("cart-%d", n))}
}

// part sends the beginning of a message, without an end, and returns the verdict.
func (s *stranger) part(t *testing.T, stream uint32, data []byte) string {
	t.Helper()
	must(t, s.WriteData(stream, false, data))
	return s.verdict(stream)
}

// Rapid reset (CVE-2023-44487): calls that are cancelled as fast as they are
// begun.
func TestV60_RapidReset(t *testing.T) {
	p := listen(t)
	p.while(t, func() {
		s := p.greet(t)
		for n := range 2000 {
			stream, err := s.call()
			if err == nil {
				err = s.WriteRSTStream(stream, http2.ErrCodeCancel)
			}
			if gone(err) {
				t.Logf("the server closed the connection after %d", n)
				break
			}
			must(t, err)
		}
		must(t, s.conn.Close())
	})
}

// A header block without end (CVE-2023-45288 and kin) must cost the sender its
// connection, not the server its memory.
func TestV60_T17_ContinuationFlood(t *testing.T) {
	p := listen(t)
	p.while(t, func() {
		s := p.greet(t)
		must(t, s.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: s.headers()}))
		ended := make(chan string, 1)
		go func() { ended <- s.verdict(0) }()
		s.block.Reset()
		must(t, s.enc.WriteField(hpack.HeaderField{Name: "padding", Value: strings.Repeat("x", 3000)}))
		fragment := bytes.Clone(s.block.Bytes())
		const most = 16 << 20
		sent := 0
		for sent < most {
			if err := s.WriteContinuation(1, false, fragment); err != nil {
				if !gone(err) {
					t.Error(err)
				}
				break
			}
			sent += len(fragment)
		}
		if sent >= most {
			t.Errorf("%d bytes of one header block were taken", sent)
		}
		t.Logf("%s after at most %d KiB", <-ended, sent>>10)
		_ = s.conn.Close()
	})
}

// Keepalive has a least interval; who pings without end is sent away.
func TestT17_PingFlood(t *testing.T) {
	p := listen(t)
	p.while(t, func() {
		s := p.greet(t)
		ended := make(chan string, 1)
		go func() { ended <- s.verdict(0) }()
		for n := range 2000 {
			if err := s.WritePing(false, [8]byte{byte(n)}); err != nil {
				if !gone(err) {
					t.Error(err)
				}
				break
			}
		}
		if got := <-ended; got != "GOAWAY ENHANCE_YOUR_CALM" && got != "connection ended" {
			t.Errorf("%s; want GOAWAY ENHANCE_YOUR_CALM", got)
		} else {
			t.Log(got)
		}
		_ = s.conn.Close()
	})
}

// gone says whether the other end has closed the connection.
func gone(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) || strings.Contains(fmt.Sprint(err), "closed")
}
