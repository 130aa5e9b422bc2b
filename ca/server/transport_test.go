package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
)

// connect makes a TLS connection and the HTTP/2 preface by hand.
func (h *harness) connect(t *testing.T, c *tls.Config) (*tls.Conn, error) {
	t.Helper()
	if c.NextProtos == nil {
		c.NextProtos = []string{"h2"}
	}
	conn, err := (&tls.Dialer{Config: c}).DialContext(t.Context(), "tcp", h.address)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	return conn.(*tls.Conn), nil
}

func TestServingCertificateAndTLS(t *testing.T) {
	h := start(t, nil)
	for _, name := range []string{dnsName, "istiod.istio-system.svc", "127.0.0.1"} {
		c := h.clientTLS()
		c.ServerName = name
		conn, err := h.connect(t, c)
		if err != nil {
			t.Errorf("as %q: %v", name, err)
			continue
		}
		state := conn.ConnectionState()
		if state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != "h2" {
			t.Errorf("as %q: version %x, protocol %q", name, state.Version, state.NegotiatedProtocol)
		}
		leaf := state.PeerCertificates[0]
		if len(leaf.URIs) != 0 || !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) {
			t.Errorf("the serving certificate has URIs %v and usages %v", leaf.URIs, leaf.ExtKeyUsage)
		}
	}
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2":      func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"another ALPN": func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} },
		"another name": func(c *tls.Config) { c.ServerName = "evil.test" },
		"other roots":  func(c *tls.Config) { c.RootCAs = x509.NewCertPool() },
	} {
		c := h.clientTLS()
		change(c)
		conn, err := h.connect(t, c)
		if err == nil {
			// In TLS 1.3 a client can be done before the server has judged.
			_, err = conn.Read(make([]byte, 1))
		}
		if err == nil {
			t.Errorf("%s: the connection stands", name)
		}
	}
	h.log.wait(t, "TLS handshake failed", "offered only unsupported versions")
}

type sessions struct {
	tls.ClientSessionCache
	t *testing.T
}

func (s sessions) Put(key string, state *tls.ClientSessionState) {
	if state != nil {
		s.t.Error("the server gave a session ticket")
	}
	s.ClientSessionCache.Put(key, state)
}

func TestV6_V66_NoSessionTickets(t *testing.T) {
	h := start(t, nil)
	c := h.clientTLS()
	c.ClientSessionCache = sessions{tls.NewLRUClientSessionCache(1), t}
	for range 2 {
		conn, err := h.connect(t, c)
		must(t, err)
		_, err = conn.Write([]byte(http2.ClientPreface))
		must(t, err)
		_, err = conn.Read(make([]byte, 1)) // tickets come before the first byte of HTTP/2
		must(t, err)
		if conn.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		must(t, conn.Close())
	}
}

// A certificate that could prove nothing is not asked for: checking that the
// peer has its key would be work for anybody.
func TestV44_T17_CertificatesAreAskedForIfAnybodyIsListed(t *testing.T) {
	for _, listed := range []bool{false, true} {
		h := start(t, func(s *settings) {
			if listed {
				s.byCert = []string{cartURI}
			}
		})
		asked := false
		c := h.clientTLS()
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			asked = true
			return &tls.Certificate{}, nil
		}
		_, err := h.connect(t, c)
		must(t, err)
		if asked != listed {
			t.Errorf("listed: %t, asked for: %t", listed, asked)
		}
	}
}

// The limits that a client is told when it connects.
func TestT17_Limits(t *testing.T) {
	h := start(t, nil)
	conn, err := h.connect(t, h.clientTLS())
	must(t, err)
	_, err = conn.Write([]byte(http2.ClientPreface))
	must(t, err)
	framer := http2.NewFramer(conn, conn)
	must(t, framer.WriteSettings())
	frame, err := framer.ReadFrame()
	must(t, err)
	said, ok := frame.(*http2.SettingsFrame)
	if !ok {
		t.Fatalf("the first frame is a %T", frame)
	}
	for id, want := range map[http2.SettingID]uint32{http2.SettingMaxConcurrentStreams: 100, http2.SettingMaxHeaderListSize: 16 << 10} {
		if got, ok := said.Value(id); !ok || got != want {
			t.Errorf("%v = %d; want %d", id, got, want)
		}
	}

	ctx := metadata.AppendToOutgoingContext(h.good(t), "padding", strings.Repeat("x", 16<<10))
	if _, err := h.create(t, ctx, &istio.IstioCertificateRequest{}); err == nil {
		t.Error("17 KiB of headers were accepted")
	}
}

// A path without its slash reaches no handler, and no interceptor decides about
// access anyway (CVE-2026-33186).
func TestV60_PathWithoutASlash(t *testing.T) {
	h := start(t, nil)
	conn, err := h.connect(t, h.clientTLS())
	must(t, err)
	_, err = conn.Write([]byte(http2.ClientPreface))
	must(t, err)
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	must(t, framer.WriteSettings())
	var block strings.Builder
	enc := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", "istio.v1.auth.IstioCertificateService/CreateCertificate"},
		{":authority", dnsName}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		must(t, enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}))
	}
	must(t, framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte(block.String()), EndHeaders: true}))
	must(t, framer.WriteData(1, true, []byte{0, 0, 0, 0, 0}))
	for {
		frame, err := framer.ReadFrame()
		must(t, err)
		switch f := frame.(type) {
		case *http2.RSTStreamFrame:
			return
		case *http2.MetaHeadersFrame:
			for _, field := range f.Fields {
				if field.Name == "grpc-status" {
					if field.Value != "12" { // Unimplemented
						t.Errorf("grpc-status %s; want Unimplemented", field.Value)
					}
					return
				}
			}
		}
	}
}

// No method does anything for somebody without credentials; health's Check is
// the one exception, by design.
func TestV14_V52_V60_EveryMethodRefusesStrangers(t *testing.T) {
	h := start(t, nil)
	conn := h.dial(t, nil)
	services := h.server.grpc.GetServiceInfo()
	if len(services) != 3 {
		t.Errorf("%d services are registered; this test knows 3", len(services))
	}
	for service, info := range services {
		for _, m := range info.Methods {
			t.Run(service+"/"+m.Name, func(t *testing.T) {
				method := "/" + service + "/" + m.Name
				code := callWithout(t, conn, method, m.IsClientStream || m.IsServerStream)
				switch {
				case method == grpc_health_v1.Health_Check_FullMethodName:
					if code != codes.OK {
						t.Errorf("%v; health must answer anybody", code)
					}
				case code != codes.Unauthenticated && code != codes.Unimplemented:
					t.Errorf("%v; want Unauthenticated or Unimplemented", code)
				}
			})
		}
	}
	for _, method := range []string{"/nothing/Here", "/istio.v1.auth.IstioCertificateService/Nothing", "//", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"} {
		if code := callWithout(t, conn, method, false); code != codes.Unimplemented {
			t.Errorf("%s: %v; want Unimplemented", method, code)
		}
	}
}

func callWithout(t *testing.T, conn *grpc.ClientConn, method string, streaming bool) codes.Code {
	t.Helper()
	ctx := bearer(t)
	if !streaming {
		return status.Code(conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{}))
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	must(t, err)
	_ = stream.SendMsg(&emptypb.Empty{})
	_ = stream.CloseSend()
	return status.Code(stream.RecvMsg(&emptypb.Empty{}))
}

type away struct{ ca.Upstream }

func (away) SignIntermediate(context.Context, ca.IntermediateRequest) (*ca.Signed, error) {
	return nil, errors.New("vault is sealed")
}

// Before the authority has ever signed, nobody gets a connection, so clients
// try another address; and readiness says why.
func TestT18_WithoutAServingCertificate(t *testing.T) {
	h := start(t, func(s *settings) {
		s.unready, s.upstream = true, func(u ca.Upstream) ca.Upstream { return away{u} }
	})
	h.log.wait(t, "no new intermediate", "vault is sealed")
	if err := h.server.Ready(); err == nil || !strings.Contains(err.Error(), "no intermediate") {
		t.Errorf("Ready = %v", err)
	}
	if _, err := h.connect(t, h.clientTLS()); err == nil {
		t.Error("a handshake succeeded without a serving certificate")
	}
	_, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("%v; want Unavailable", err)
	}
}

// A CA that can verify no token is of no use to anybody.
func TestT18_WithoutAWayToKnowCallers(t *testing.T) {
	var keys atomic.Pointer[error]
	h := start(t, func(s *settings) {
		s.server.CallersReady = func() error {
			if err := keys.Load(); err != nil {
				return *err
			}
			return nil
		}
	})
	client := grpc_health_v1.NewHealthClient(h.dial(t, nil))
	check := func(want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		resp, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		if err != nil || resp.GetStatus() != want {
			t.Errorf("health: %v, %v; want %v", resp, err, want)
		}
	}
	check(grpc_health_v1.HealthCheckResponse_SERVING)
	why := errors.New("no keys")
	keys.Store(&why)
	if err := h.server.Ready(); !errors.Is(err, why) {
		t.Errorf("Ready = %v; want %v", err, why)
	}
	check(grpc_health_v1.HealthCheckResponse_NOT_SERVING)
}

// Until the CA has been ready nobody's handshake costs it anything; from then on
// whoever comes is told what is wrong.
func TestL4_NoHandshakeBeforeTheCAIsReady(t *testing.T) {
	var missing atomic.Bool
	missing.Store(true)
	h := start(t, func(s *settings) {
		s.unready = true
		s.server.CallersReady = func() error {
			if missing.Load() {
				return errors.New("the pods are not known yet")
			}
			return nil
		}
	})
	for { // it can sign, and has a certificate to serve with
		if _, err := h.server.serving.certificate(); err == nil {
			break
		}
		runtime.Gosched()
	}
	for range 3 {
		conn, err := net.Dial("tcp", h.address)
		must(t, err)
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("read %d bytes, error %v", n, err)
		}
		must(t, conn.Close())
	}
	if said, _ := h.log.find("connections are closed until the CA is ready", "the pods are not known yet"); len(said) != 1 {
		t.Errorf("the log says so %d times, want once", len(said))
	}
	missing.Store(false)
	for h.server.Ready() != nil {
		runtime.Gosched()
	}
	ask := func() error {
		_, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)})
		return err
	}
	must(t, ask())
	missing.Store(true) // and it goes on serving: here the keys are there, only readiness is not
	must(t, ask())
}

func TestHealth(t *testing.T) {
	h := start(t, nil)
	client := grpc_health_v1.NewHealthClient(h.dial(t, nil))
	for service, want := range map[string]codes.Code{"": codes.OK, "istio.v1.auth.IstioCertificateService": codes.OK, "x": codes.NotFound} {
		resp, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: service})
		if status.Code(err) != want || err == nil && resp.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Errorf("%q: %v, %v", service, resp, err)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	h := start(t, nil)
	good := Config{Authority: h.authority, Authenticator: h.server.authenticator, Names: ca.ServingNames{DNS: []string{dnsName}}}
	for name, change := range map[string]func(*Config){
		"no authority":     func(c *Config) { c.Authority = nil },
		"no authenticator": func(c *Config) { c.Authenticator = nil },
		"no names":         func(c *Config) { c.Names = ca.ServingNames{} },
		"negative":         func(c *Config) { c.MaxCalls = -1 },
		"metrics twice":    func(c *Config) { c.Metrics = h.registry },
	} {
		c := good
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestServeEnds(t *testing.T) {
	h := start(t, nil)
	stream := h.delta(t, h.good(t))
	must(t, stream.Send(subscribe()))
	_, err := stream.Recv()
	must(t, err)
	h.stop()
	if _, err := stream.Recv(); err == nil || err.Error() != "EOF" {
		t.Errorf("the stream ended with %v; want status OK", err)
	}
	if c, err := net.Dial("tcp", h.address); err == nil {
		_ = c.Close()
		t.Error("the port is still open")
	}
}
