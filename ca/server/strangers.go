package server

import (
	"container/list"
	"net"
	"sync"
	"time"
)

// strangerTimeout is how long a connection may be open without a call whose caller is
// known: the time for its handshake, and some for the call.
const strangerTimeout = handshakeTimeout + 15*time.Second

// limitListener bounds connections. Those on which nobody has said yet who they are
// are strangers: they have a bound of their own for each address, are closed when
// their time is over, and make room, the oldest first, where there is none. So
// somebody without a token takes no place from those who have one.
//
// Connections over the limit are closed at once, before TLS: leaving them in the backlog
// would hang clients without a word. So are all of them until there is somebody to
// serve them: the handshakes of ten thousand agents that have lost their CA would else
// keep the new one from getting ready, for nothing. Package sds has one for a socket without addresses;
// what both share is too little for a package.
type limitListener struct {
	net.Listener
	places *limiter
	each   int // strangers of one address
	opened func()
	closed func()
	refuse func(net.Addr, error)
	begun  func() error // why connections are of no use yet

	mu        sync.Mutex
	strangers *list.List            // of *limitConn, the oldest first
	open      map[string]*list.List // the same by address; none is empty
}

func (l *limitListener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if err := l.begun(); err != nil {
			_ = raw.Close()
			continue
		}
		c := &limitConn{Conn: raw, l: l, source: sourceOf(raw.RemoteAddr())}
		leave, err := l.enter(c.source)
		if err != nil {
			_ = raw.Close() // nothing was said on it
			l.refuse(raw.RemoteAddr(), err)
			continue
		}
		l.opened()
		c.leave = sync.OnceFunc(func() { c.known(); leave(); l.closed() })
		l.mu.Lock()
		c.stranger = l.strangers.PushBack(c)
		of := l.open[c.source]
		if of == nil {
			of = list.New()
			l.open[c.source] = of
		}
		c.ofSource = of.PushBack(c)
		c.timer = time.AfterFunc(strangerTimeout, func() {
			if l.isStranger(c) {
				_ = c.Close()
			}
		})
		l.mu.Unlock()
		return c, nil
	}
}

// enter takes a place, if need be a stranger's.
func (l *limitListener) enter(source string) (leave func(), err error) {
	l.mu.Lock()
	crowded := l.open[source] != nil && l.open[source].Len() >= l.each
	l.mu.Unlock()
	if crowded {
		l.evict(source)
	}
	if leave, err = l.places.enter(source); err == nil {
		return leave, nil
	}
	// One of the same address first: it may be that address's own bound.
	if !l.evict(source) && !l.evict("") {
		return nil, err
	}
	return l.places.enter(source)
}

// evict closes the oldest stranger of an address; empty for any.
func (l *limitListener) evict(source string) bool {
	l.mu.Lock()
	of := l.strangers
	if source != "" {
		of = l.open[source]
	}
	var oldest *limitConn
	if of != nil && of.Len() > 0 {
		oldest = of.Front().Value.(*limitConn)
	}
	l.mu.Unlock()
	if oldest == nil {
		return false
	}
	_ = oldest.Close()
	return true
}

func (l *limitListener) isStranger(c *limitConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return c.stranger != nil
}

// limitConn gives its place back when it is closed.
type limitConn struct {
	net.Conn
	l      *limitListener
	source string
	leave  func()

	// Guarded by l.mu.
	stranger *list.Element // nil once it is none
	ofSource *list.Element // of those from its address
	timer    *time.Timer
}

// known ends its being a stranger's.
func (c *limitConn) known() {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if c.stranger == nil {
		return
	}
	c.timer.Stop()
	c.l.strangers.Remove(c.stranger)
	c.stranger = nil
	of := c.l.open[c.source]
	if of.Remove(c.ofSource); of.Len() == 0 {
		delete(c.l.open, c.source)
	}
}

func (c *limitConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
