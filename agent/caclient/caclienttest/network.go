package caclienttest

import (
	"context"
	"net"
	"sync"
	"syscall"
	"testing"

	"google.golang.org/grpc/test/bufconn"
)

// Network is a set of addresses in memory. An address that nobody listens on
// refuses connections.
type Network struct {
	tb testing.TB

	mu    sync.Mutex
	hosts map[string]func(context.Context) (net.Conn, error)
	dials []string
}

// NewNetwork returns an empty network.
func NewNetwork(tb testing.TB) *Network {
	return &Network{tb: tb, hosts: make(map[string]func(context.Context) (net.Conn, error))}
}

// Dial has the form of [caclient.Config]'s Dial.
func (n *Network) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	n.mu.Lock()
	n.dials = append(n.dials, address)
	host := n.hosts[address]
	n.mu.Unlock()
	if host == nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	}
	return host(ctx)
}

// Dials returns the addresses that have been dialled, in order.
func (n *Network) Dials() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.dials...)
}

// Listen opens an address.
func (n *Network) Listen(address string) net.Listener {
	l := bufconn.Listen(64 << 10)
	n.tb.Cleanup(func() { _ = l.Close() })
	n.set(address, l.DialContext)
	return l
}

// Swallow makes an address drop everything, as a firewall does it: connecting
// never ends.
func (n *Network) Swallow(address string) {
	n.set(address, func(ctx context.Context) (net.Conn, error) {
		<-ctx.Done()
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
	})
}

// Handle makes an address give each connection to f, in a goroutine of its own.
// The connection is closed when f returns.
func (n *Network) Handle(address string, f func(net.Conn)) {
	l := n.Listen(address)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.tb.Cleanup(func() { _ = c.Close() })
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				f(c)
			})
		}
	})
	n.tb.Cleanup(func() { _ = l.Close() })
}

// Refuse makes an address refuse connections again.
func (n *Network) Refuse(address string) { n.set(address, nil) }

func (n *Network) set(address string, host func(context.Context) (net.Conn, error)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[address] = host
}
