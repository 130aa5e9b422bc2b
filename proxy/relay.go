package proxy

import (
	"crypto/tls"
	"io"
	"net"
	"sync"
)

// Sizes of what bytes are carried in where the kernel cannot do it alone. A
// direction that carries little holds a small one, so that idle connections stay
// cheap; most requests and many answers fit into it.
const (
	idleBuffer  = 1 << 10
	smallBuffer = 8 << 10
	largeBuffer = 32 << 10
)

// buffers are shared by all connections of a proxy.
type buffers struct{ sizes [3]sync.Pool }

// bufferSizes are in the order of the pools.
var bufferSizes = [3]int{idleBuffer, smallBuffer, largeBuffer}

func newBuffers() *buffers {
	b := &buffers{}
	for i, size := range bufferSizes {
		b.sizes[i].New = func() any { buf := make([]byte, size); return &buf }
	}
	return b
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

// copy is io.Copy with a buffer of the size that the traffic needs: a larger one
// when one was full, a smaller one when that would have done.
func (b *buffers) copy(dst io.Writer, src io.Reader) (n int64, err error) {
	size := 0
	held := b.sizes[size].Get().(*[]byte)
	defer func() { b.sizes[size].Put(held) }()
	for {
		got, readErr := src.Read(*held)
		if got > 0 {
			written, err := dst.Write((*held)[:got])
			if n += int64(written); err != nil {
				return n, err
			}
		}
		if readErr == io.EOF {
			return n, nil
		}
		if readErr != nil {
			return n, readErr
		}
		wanted := size
		switch {
		case got == len(*held) && size < len(bufferSizes)-1:
			wanted++
		case size > 0 && got < bufferSizes[size-1]:
			wanted--
		}
		if wanted != size {
			b.sizes[size].Put(held)
			size = wanted
			held = b.sizes[size].Get().(*[]byte)
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
