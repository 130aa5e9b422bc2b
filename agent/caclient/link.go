package caclient

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/meshca/meshca/identity"
)

// Limits and timers of a connection.
const (
	maxAnswer = 1 << 20  // bytes of one message from the CA
	maxHeader = 16 << 10 // bytes of header fields

	// A peer that vanished without a word (a power cut, a NAT that forgot us) is
	// noticed after 30 s. Servers commonly take pings every 20 s at most, and a
	// ping that was a little early must not cost the connection.
	keepaliveTime    = 22 * time.Second
	keepaliveTimeout = 8 * time.Second
)

// link is one connection: TCP, a finished and verified TLS handshake, and gRPC
// on top. It is never re-established: the next connection is a new link, with
// the trust anchor read again.
type link struct {
	n  int // index of the address
	cc *grpc.ClientConn

	// guarded by Client.mu
	users   int
	retired bool // no new calls; closed when the last one ends
}

func (l *link) alive() bool { return l.cc.GetState() == connectivity.Ready }

func (l *link) close() { _ = l.cc.Close() } // it fails only when closed already

// acquire returns a connection to address n, opening one if need be. The
// caller hands it back by release or discard.
func (c *Client) acquire(ctx context.Context, n int) (l *link, reused bool, err error) {
	select {
	case c.dialing <- struct{}{}:
		defer func() { <-c.dialing }()
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	if l, err := c.take(n); l != nil || err != nil {
		return l, true, err
	}
	l, err = c.dial(ctx, n)
	if err != nil {
		return nil, false, err
	}
	return l, false, c.put(l)
}

// take returns the current connection if it is to n and alive.
func (c *Client) take(n int) (*link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errStop{errClosed}
	}
	l := c.current
	if l == nil || l.n != n || !l.alive() {
		return nil, nil
	}
	l.users++
	return l, nil
}

// put makes l the current connection, with one user. The one before it serves
// the calls that it has.
func (c *Client) put(l *link) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		l.close()
		return errStop{errClosed}
	}
	if old := c.current; old != nil {
		old.retired = true
		if old.users == 0 {
			old.close()
		}
	}
	l.users = 1
	c.current = l
	return nil
}

// release hands a connection back.
func (c *Client) release(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l.users--
	if l.users == 0 && (l.retired || c.closed) {
		l.close()
	}
}

// retire hands back a connection that takes no more calls; those of others on
// it go on.
func (c *Client) retire(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l.users--
	l.retired = true
	if c.current == l {
		c.current = nil
	}
	if l.users == 0 {
		l.close()
	}
}

// discard hands back a connection that has failed, and ends the calls of others
// on it: they would find out only later.
func (c *Client) discard(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l.users--
	l.retired = true
	if c.current == l {
		c.current = nil
	}
	l.close()
}

// dial opens a connection to address n and waits until HTTP/2 is established
// on it, so that a CA that takes connections and then says nothing is found out
// here, in the same time as any other fault.
func (c *Client) dial(ctx context.Context, n int) (*link, error) {
	address := c.conf.Addresses[n]
	conf, err := c.tlsConfig(address)
	if err != nil {
		return nil, errStop{err}
	}
	raw, err := c.conf.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, withoutAddress(err)
	}
	conn := tls.Client(raw, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, staged("TLS handshake", c.explainTLS(conf.ServerName, err))
	}
	if p := conn.ConnectionState().NegotiatedProtocol; p != "h2" {
		_ = conn.Close()
		return nil, fmt.Errorf("TLS handshake: it selected the protocol %.40q, not %q; this is no gRPC server", p, "h2")
	}
	cc, err := newClientConn(address, conf.ServerName, conn)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	cc.Connect()
	for s := cc.GetState(); s != connectivity.Ready; s = cc.GetState() {
		if s == connectivity.TransientFailure || s == connectivity.Shutdown {
			_ = cc.Close()
			return nil, errors.New("it closed the connection instead of beginning HTTP/2")
		}
		if !cc.WaitForStateChange(ctx, s) {
			_ = cc.Close()
			return nil, staged("beginning HTTP/2", ctx.Err())
		}
	}
	return &link{n: n, cc: cc}, nil
}

// newClientConn puts gRPC onto a connection whose TLS handshake is done. The
// handshake is ours and not gRPC's for three reasons: its errors stay typed,
// the anchor is read for each one, and gRPC can never reconnect by itself.
func newClientConn(address, serverName string, conn *tls.Conn) (*grpc.ClientConn, error) {
	var used atomic.Bool
	return grpc.NewClient("passthrough:///"+address,
		grpc.WithAuthority(serverName),
		grpc.WithTransportCredentials(established{}),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if used.Swap(true) {
				return nil, errors.New("the connection has ended")
			}
			return conn, nil
		}),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
		grpc.WithMaxHeaderListSize(maxHeader),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.WithUserAgent("meshca-agent"),
	)
}

// tlsConfig reads the trust anchor.
func (c *Client) tlsConfig(address string) (*tls.Config, error) {
	pem, err := c.AnchorPEM()
	if err != nil {
		return nil, err
	}
	anchors, err := identity.ParsePEM(pem)
	if err == nil {
		// Only to have them judged: a leaf that stands in the file must not
		// become an anchor.
		_, err = identity.NewBundle(c.conf.TrustDomain, identity.BundleConfig{Authorities: anchors})
	}
	if err != nil {
		return nil, &AnchorError{File: c.conf.AnchorFile, Err: err}
	}
	roots := x509.NewCertPool()
	for _, a := range anchors {
		roots.AddCert(a)
	}
	name := c.conf.ServerName
	if name == "" {
		if name, _, err = net.SplitHostPort(address); err != nil {
			return nil, err
		}
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    roots,
		ServerName: name,
		NextProtos: []string{"h2"},
		Time:       c.conf.Now,
		// No ClientSessionCache: every connection verifies the server anew.
	}, nil
}

// explainTLS adds what crypto/tls does not say: which file the CA's certificate
// was judged by.
func (c *Client) explainTLS(name string, err error) error {
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	switch {
	case errors.As(err, &unknown):
		issuer := ""
		if unknown.Cert != nil {
			issuer = fmt.Sprintf(" (issuer %q)", cut(unknown.Cert.Issuer.String()))
		}
		return fmt.Errorf("its certificate%s chains to no certificate in %q: this is another CA, or the file is out of date: %w", issuer, c.conf.AnchorFile, &foreignError{err, true})
	case errors.As(err, &host):
		return fmt.Errorf("its certificate is not for %q: %w", name, &foreignError{err, true})
	}
	return &foreignError{err, false}
}

// established is the transport security of a connection whose handshake has
// been done before gRPC got it.
type established struct{}

// ClientHandshake implements [credentials.TransportCredentials].
func (established) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t, ok := conn.(*tls.Conn)
	if !ok || !t.ConnectionState().HandshakeComplete {
		return nil, nil, errors.New("connection without a finished TLS handshake")
	}
	return t, credentials.TLSInfo{
		State:          t.ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

// ServerHandshake implements [credentials.TransportCredentials]; there is no
// server here.
func (established) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("client credentials used by a server")
}

// Info implements [credentials.TransportCredentials].
func (established) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements [credentials.TransportCredentials].
func (e established) Clone() credentials.TransportCredentials { return e }

// OverrideServerName implements [credentials.TransportCredentials]; the name
// has been checked already.
func (established) OverrideServerName(string) error { return nil }
