package caclient

import (
	"context"
	"io"
	"net"
	"sync/atomic"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
)

// dropper forwards connections until it is cut; from then on it swallows all
// bytes of both directions and closes nothing, as a firewall that has forgotten
// a connection.
type dropper struct{ cut atomic.Bool }

func (d *dropper) now() { d.cut.Store(true) }

func (d *dropper) serve(n *caclienttest.Network, from, to string) {
	n.Handle(from, func(client net.Conn) {
		server, err := n.Dial(context.Background(), "tcp", to)
		if err != nil {
			return
		}
		done := make(chan struct{}, 2)
		copyUntilCut := func(dst, src net.Conn) {
			_, _ = io.Copy(&gate{d, dst}, src)
			done <- struct{}{}
		}
		go copyUntilCut(server, client)
		go copyUntilCut(client, server)
		<-done
		_, _ = server.Close(), client.Close()
		<-done
	})
}

type gate struct {
	d   *dropper
	dst net.Conn
}

func (g *gate) Write(p []byte) (int, error) {
	if g.d.cut.Load() {
		return len(p), nil
	}
	return g.dst.Write(p)
}
