package proxy

import (
	"crypto/tls"
	"io"
	"net"
	"sync"
)

// Sizes of what bytes are carried in where the kernel cannot do it alone. A
// direction that carries little holds the small one, so that idle connections
// stay cheap.
const (
	smallBuffer = 4 << 10
	largeBuffer = 32 << 10
)

// buffers are shared by all connections of a proxy.
type buffers struct{ small, large sync.Pool }

func newBuffers() *buffers {
	return &buffers{
		small: sync.Pool{New: func() any { return new([smallBuffer]byte) }},
		large: sync.Pool{New: func() any { return new([largeBuffer]byte) }},
	}
}

// stream is one end of a relay.
type stream struct {
	conn net.Conn // of net, or a *tls.Conn over one
	head []byte   // what was read from conn already
}

// closeWriter is what can say that nothing more will come: all TCP connections,
// and TLS over them.
type closeWriter interface{ CloseWrite() error }

// carry copies what comes from src to dst until src says that it has ended, and
// then tells dst. It returns how many bytes dst took. An error means that one of
// the two is broken; it is not passed on here.
func (b *buffers) carry(dst, src stream) (n int64, err error) {
	if len(src.head) > 0 {
		written, err := dst.conn.Write(src.head)
		if n += int64(written); err != nil {
			return n, err
		}
	}
	var more int64
	from, plainFrom := src.conn.(*net.TCPConn)
	to, plainTo := dst.conn.(*net.TCPConn)
	if plainFrom && plainTo {
		more, err = io.Copy(to, from) // splice: the bytes stay in the kernel
	} else {
		more, err = b.copy(dst.conn, src.conn)
	}
	if n += more; err != nil {
		return n, err
	}
	if truncated(src.conn) {
		return n, io.ErrUnexpectedEOF
	}
	if w, ok := dst.conn.(closeWriter); ok {
		return n, w.CloseWrite()
	}
	return n, nil
}

// copy is io.Copy with a buffer of the size that the traffic needs.
func (b *buffers) copy(dst io.Writer, src io.Reader) (n int64, err error) {
	small := b.small.Get().(*[smallBuffer]byte)
	var large *[largeBuffer]byte
	defer func() {
		if small != nil {
			b.small.Put(small)
		}
		if large != nil {
			b.large.Put(large)
		}
	}()
	for {
		buf := small[:]
		if large != nil {
			buf = large[:]
		}
		got, readErr := src.Read(buf)
		if got > 0 {
			written, err := dst.Write(buf[:got])
			if n += int64(written); err != nil {
				return n, err
			}
		}
		switch {
		case readErr == io.EOF:
			return n, nil
		case readErr != nil:
			return n, readErr
		case large == nil && got == smallBuffer:
			large = b.large.Get().(*[largeBuffer]byte)
		case large != nil && got < smallBuffer:
			b.large.Put(large)
			large = nil
		}
	}
}

// reset closes c so that its peer sees a reset: what it got is not all there
// was. On a TLS connection it skips the alert that would say otherwise.
func reset(c net.Conn) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if l, ok := c.(interface{ SetLinger(int) error }); ok {
		_ = l.SetLinger(0)
	}
	_ = c.Close()
}

// below is a connection that TLS runs on. Only one goroutine reads from it.
type below struct {
	*net.TCPConn
	head   []byte // read before there was TLS, and read again first
	ended  bool   // the end was read: of TCP, and not TLS's own
	oldTLS error  // what GetConfigForClient found and cannot say itself
}

func (b *below) Read(p []byte) (int, error) {
	if len(b.head) == 0 {
		n, err := b.TCPConn.Read(p)
		b.ended = b.ended || err == io.EOF
		return n, err
	}
	n := copy(p, b.head)
	if b.head = b.head[n:]; len(b.head) == 0 {
		b.head = nil
	}
	return n, nil
}

// truncated reports whether what was read from c ended without TLS saying so.
// crypto/tls takes that for an end; but anybody on the way can end a TCP
// connection, and the app must not take a part for the whole (RFC 8446 §6.1).
func truncated(c net.Conn) bool {
	t, ok := c.(*tls.Conn)
	if !ok {
		return false
	}
	b, ok := t.NetConn().(*below)
	return ok && b.ended
}
