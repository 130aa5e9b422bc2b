package bundle

import (
	"net"
	"net/netip"
	"sync"
)

// maxPerSource bounds the connections of one address, so that one client alone does
// not hold all places. Behind one address there may be all of a trust domain's
// clients; each of them comes every few minutes and stays for seconds.
const maxPerSource = 16

// fair closes at once what an address has open beyond its share. It goes below the
// limit of all, of which such a connection takes no place.
type fair struct {
	net.Listener
	mu   sync.Mutex
	open map[netip.Addr]int
}

func newFair(l net.Listener) *fair { return &fair{Listener: l, open: make(map[netip.Addr]int)} }

func (f *fair) Accept() (net.Conn, error) {
	for {
		c, err := f.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := sourceOf(c.RemoteAddr())
		if f.enter(from) {
			return &share{Conn: c, leave: sync.OnceFunc(func() { f.leave(from) })}, nil
		}
		_ = c.Close() // nobody is to be told
	}
}

func (f *fair) enter(from netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open[from] >= maxPerSource {
		return false
	}
	f.open[from]++
	return true
}

func (f *fair) leave(from netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open[from]--; f.open[from] == 0 {
		delete(f.open, from)
	}
}

// sourceOf is the address that is counted. With IPv6 that is the first half: any host
// may have as many addresses as it likes in the other one.
func sourceOf(a net.Addr) netip.Addr {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	if ip.Is6() {
		prefix, _ := ip.Prefix(64) // no address of IPv6 is shorter
		return prefix.Addr()
	}
	return ip
}

// share is one connection of an address.
type share struct {
	net.Conn
	leave func()
}

func (s *share) Close() error {
	defer s.leave()
	return s.Conn.Close()
}
