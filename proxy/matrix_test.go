package proxy

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
)

// tlsApp is an app with TLS of its own, that asks for no certificate.
func tlsApp(t testing.TB) *app {
	ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "app.test"))
	conf := configOf(ca.SVID(t, identitytest.ID(t, "spiffe://app.test/app")))
	return newApp(t, func(c *net.TCPConn) {
		conn := tls.Server(c, conf)
		_, _ = io.Copy(conn, conn)
		_ = conn.Close()
	})
}

// The result matrix of the modes: the rows for TCP ports, for ports of unknown
// protocol and for ports in no Service, which are one for a proxy that carries
// TCP. What the client gets is judged at its own end of the socket.
func TestV25_T10_ResultMatrix(t *testing.T) {
	const reached, through, refused = "reached", "passed through", "refused"
	modes := []policy.Mode{policy.Disable, policy.Permissive, policy.Strict, policy.Unknown, policy.Unset, policy.Mode(99)}
	for _, tt := range []struct {
		call string
		// alpn is nil for plaintext; "-" stands for TLS without the extension.
		alpn        []string
		certificate bool
		want        [3]string // under DISABLE, PERMISSIVE, STRICT and whatever is not known
	}{
		{"plaintext", nil, false, [3]string{reached, reached, refused}},
		{"TLS, no ALPN", []string{"-"}, false, [3]string{through, through, refused}},
		{"HTTPS", []string{"h2", "http/1.1"}, false, [3]string{through, through, refused}},
		{"TLS, unknown ALPN", []string{"acme-tls/1"}, false, [3]string{through, through, refused}},
		{"TLS, no ALPN, our certificate", []string{"-"}, true, [3]string{through, through, reached}},
		{"HTTPS, our certificate", []string{"h2", "http/1.1"}, true, [3]string{through, through, reached}},
		{"unknown ALPN, our certificate", []string{"acme-tls/1"}, true, [3]string{through, through, reached}},
		{"mesh TCP, no certificate", []string{"istio"}, false, [3]string{through, refused, refused}},
		{"mesh TCP", []string{"istio"}, true, [3]string{through, reached, reached}},
		{"mesh TCP, Istio's offer", []string{"istio-peer-exchange", "istio"}, true, [3]string{through, reached, reached}},
		{"mesh HTTP", []string{"istio-http/1.1", "istio", "http/1.1"}, true, [3]string{through, reached, reached}},
		{"mesh HTTP/2", []string{"istio-h2", "istio", "h2"}, true, [3]string{through, reached, reached}},
		{"mesh HTTP alone", []string{"istio-http/1.1"}, true, [3]string{through, reached, reached}},
	} {
		for i, mode := range modes {
			want := tt.want[min(i, 2)]
			t.Run(fmt.Sprintf("%s under %s", tt.call, mode), func(t *testing.T) {
				app := newApp(t, echo)
				if want == through {
					app = tlsApp(t)
				}
				k := start(t, withMode(mode), withApp(app))
				conn, err := k.call(tt.alpn, tt.certificate)
				if err == nil {
					err = tryEcho(conn, "hello")
				}
				if (err == nil) != (want != refused) {
					t.Errorf("the client: %v, want %s", err, want)
				}
				if want == refused {
					app.untouched(t)
				}
				if conn, ok := conn.(*tls.Conn); ok && err == nil {
					k.judgeTLS(conn, want == through, tt.alpn)
				}
				_ = conn.Close()
				k.next(map[string]any{"security": wantSecurity(mode, tt.alpn, want), "mode": mode.String(), "policy": "shop/" + mode.String()})
			})
		}
	}
}

func wantSecurity(mode policy.Mode, alpn []string, want string) string {
	switch {
	case mode == policy.Disable:
		return "untouched"
	case alpn == nil:
		return "plaintext"
	case want == "refused":
		return "none"
	case want == "reached":
		return "mutual TLS"
	}
	return "foreign TLS"
}

func (k *kit) call(alpn []string, certificate bool) (net.Conn, error) {
	if alpn == nil {
		return k.dial(), nil
	}
	conf := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // judged below
	if certificate {
		conf = k.meshConfig(frontendID)
	}
	if alpn[0] != "-" {
		conf.NextProtos = alpn
	}
	conn := tls.Client(k.dial(), conf)
	return conn, conn.Handshake()
}

// judgeTLS looks at who answered, and at the protocol that was selected.
func (k *kit) judgeTLS(conn *tls.Conn, apps bool, offered []string) {
	k.t.Helper()
	state := conn.ConnectionState()
	who := state.PeerCertificates[0].URIs[0].String()
	if ours := who == cartID; ours == apps {
		k.t.Errorf("TLS ended at %s", who)
	}
	if apps {
		return
	}
	want := ""
	for _, name := range offered {
		if name == "h2" || name == "http/1.1" {
			want = name
			break
		}
	}
	if state.NegotiatedProtocol != want {
		k.t.Errorf("%q was selected of %q, want %q", state.NegotiatedProtocol, offered, want)
	}
}
