package certs

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/server"
	"github.com/meshca/meshca/ca/server/servertest"
	"github.com/meshca/meshca/identity"
)

// patience is for one handshake or one run of a small program.
const patience = 20 * time.Second

func (k *kind) tlsConfig() identity.TLSConfig {
	return identity.TLSConfig{SVIDs: k.ours, Bundles: k.bundle, Authorize: identity.AuthorizeAny(), Now: time.Now}
}

// serve accepts connections as the kind's identity until the test ends and
// tells each client who it is: "peer spiffe://…". In TLS 1.3 a client is
// done before the server has judged it, so only this line proves that we took
// its certificate.
func (k *kind) serve(t *testing.T) (port string) {
	t.Helper()
	config, err := identity.ServerTLS(k.tlsConfig())
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { greet(tls.Server(raw, config)) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return portOf(l.Addr())
}

func greet(conn *tls.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if err := conn.Handshake(); err != nil {
		return // the client's verdict is the one that counts
	}
	id, err := identity.PeerID(conn.ConnectionState())
	if err != nil {
		return
	}
	fmt.Fprintf(conn, "peer %s\n", id)
	_ = conn.CloseWrite()
	_, _ = conn.Read(make([]byte, 1)) // until the client has read and goes
}

// dial connects to a foreign server as the kind's identity, says hello, and
// returns the line that comes back. It fails if either side refuses.
func (k *kind) dial(t *testing.T, port string) (string, error) {
	t.Helper()
	config, err := identity.ClientTLS(k.tlsConfig())
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	raw, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", "127.0.0.1:"+port)
	if err != nil {
		return "", err
	}
	defer raw.Close()
	must(t, raw.SetDeadline(time.Now().Add(patience)))
	if _, err := fmt.Fprintln(raw, "hello"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(raw).ReadString('\n')
	if err != nil {
		return "", err
	}
	id, err := identity.PeerID(raw.(*tls.Conn).ConnectionState())
	if err != nil {
		return "", err
	}
	if id.String() != k.id {
		return "", fmt.Errorf("we see %s; expected %s", id, k.id)
	}
	return strings.TrimSpace(line), nil
}

// serveCA runs the CA's real port until the test ends.
func serveCA(t *testing.T, kit *catest.Kit) (port string) {
	t.Helper()
	_, port, err := net.SplitHostPort(servertest.Serve(t, server.Config{
		Authority: kit.Authority, Authenticator: kit.Authenticator, Log: slog.New(slog.DiscardHandler),
		Names: ca.ServingNames{DNS: []string{"meshca.meshca-system.svc"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}},
	}))
	must(t, err)
	return port
}

func portOf(a net.Addr) string {
	_, port, _ := net.SplitHostPort(a.String())
	return port
}
