package server

import (
	"crypto/tls"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity/identitytest"
)

// as connects with a peer's certificates.
func (h *harness) as(t testing.TB, p identitytest.Peer) *grpc.ClientConn {
	t.Helper()
	pair := &tls.Certificate{PrivateKey: p.Key}
	for _, c := range p.Chain {
		pair.Certificate = append(pair.Certificate, c.Raw)
	}
	return h.dial(t, func(c *tls.Config) {
		// Whatever authorities the server names: a stranger shows what it has.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil }
	})
}

// A certificate that does not verify opens no call of any method, although it
// claims an ID that may renew by certificate.
func TestV3_BadCertificatesOpenNoCall(t *testing.T) {
	peers := identitytest.NewPeers(t, identitytest.ID(t, cartURI))
	h := start(t, func(s *settings) { s.byCert, s.believes = []string{cartURI}, peers })
	for _, p := range peers.All {
		believed := p.AsClient && p.Claims.String() == cartURI
		conn := h.as(t, p)
		if believed {
			key := catest.NewKey(t)
			_, err := istio.NewIstioCertificateServiceClient(conn).CreateCertificate(bearer(t), &istio.IstioCertificateRequest{Csr: newCSR(t, key, nil)})
			if who := h.gate.last(); err != nil || who == nil || who.Method() != caller.ByCertificate {
				t.Errorf("%s: %v", p.Name, err)
			}
			continue
		}
		h.gate.forget()
		want, services := codes.Unauthenticated, h.server.grpc.GetServiceInfo()
		if len(p.Chain[0].RawTBSCertificate) == 0 {
			want, services = codes.Unavailable, nil // crypto/tls cannot read it: there is not even a connection
		}
		for service, info := range services {
			for _, m := range info.Methods {
				method := "/" + service + "/" + m.Name
				code := callWithout(t, conn, method, m.IsClientStream || m.IsServerStream)
				if method == grpc_health_v1.Health_Check_FullMethodName && code == codes.OK {
					continue // which needs no credentials
				}
				if code != want && code != codes.Unimplemented {
					t.Errorf("%s, %s: %v; want %v", p.Name, method, code, want)
				}
			}
		}
		_, err := istio.NewIstioCertificateServiceClient(conn).CreateCertificate(bearer(t), &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)})
		if status.Code(err) != want {
			t.Errorf("%s: %v; want %v", p.Name, err, want)
		}
		if who := h.gate.last(); who != nil {
			t.Errorf("%s: it was worked on, for %v", p.Name, who.LogValue())
		}
	}
}

// A client's Certificate message of 10 MiB ends its connection, and nobody
// else's.
func TestV61_CertificateMessageOf10MiB(t *testing.T) {
	h := start(t, func(s *settings) { s.byCert = []string{cartURI} })
	good := h.svid(t)
	monster := *good
	monster.Certificate = append(slices.Clip(good.Certificate), make([]byte, 10<<20))
	conf := h.clientTLS()
	conf.NextProtos = []string{"h2"}
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &monster, nil }
	conn, err := tls.Dial("tcp", h.address, conf)
	if err == nil {
		_ = conn.Close()
		t.Error("all of it was taken")
	}
	if _, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)}); err != nil {
		t.Errorf("a good client, afterwards: %v", err)
	}
}
