package csi_test

import (
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity/identitytest"
)

// One pod that opens as many connections as it can takes nothing from another.
func TestOnePodsFloodIsItsOwn(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	loud, quiet := w.pod(1), w.pod(2)
	w.publish(i, loud)
	w.publish(i, quiet)
	socket := filepath.Join(w.target(loud), "agent.sock")
	closed := 0
	for range 400 {
		c, err := dialUnix(w.context(), socket)
		check(t, err)
		t.Cleanup(func() { _ = c.Close() })
		// A server says something first on HTTP/2; what is over the limit is closed.
		if _, err := c.Read(make([]byte, 1)); err != nil {
			closed++
		}
	}
	if closed < 100 {
		t.Errorf("%d of 400 connections were closed", closed)
	}
	w.served(quiet)
	w.publish(i, w.pod(3))
	w.served(w.pod(3))
}

// A CA that gives a pod the certificate of another account: nobody gets it, and
// the pod's event says so.
func TestV39_CertificateOfAnotherAccountIsNotServed(t *testing.T) {
	w := newWorld(t)
	ca := caclienttest.New(t, identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/admin"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	ca.Serve(l, ca.TLS(caName))
	w.node.CA, w.node.Anchor = l.Addr().String(), ca.AnchorFile()
	i := w.start()
	p := w.pod(1)
	_, err = i.NodePublishVolume(w.context(), w.request(p, p.token(w, "meshca")))
	if s := status.Convert(err); s.Code() != codes.PermissionDenied || !strings.Contains(s.Message(), "no identity for pod shop/cart-1: asked for "+p.id()) ||
		!strings.Contains(s.Message(), "it is about spiffe://cluster.local/ns/shop/sa/admin") {
		t.Errorf("the event would be %v", err)
	}
	if exists(w.target(p)) || len(w.stateFiles()) != 0 {
		t.Error("left behind")
	}
}
