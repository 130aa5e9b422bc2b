package server

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// half begins calls and sends half of a message on each. It returns a function
// that waits for the verdict on a call, its grpc-status.
func (h *harness) half(t *testing.T, method string, authorizations ...string) (verdict func() (stream uint32, code codes.Code)) {
	t.Helper()
	conn, err := h.connect(t, h.clientTLS())
	must(t, err)
	_, err = io.WriteString(conn, http2.ClientPreface)
	must(t, err)
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	must(t, framer.WriteSettings())
	var block strings.Builder
	enc := hpack.NewEncoder(&block)
	for i, value := range authorizations {
		block.Reset()
		for _, f := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", method}, {":authority", dnsName},
			{"content-type", "application/grpc"}, {"te", "trailers"}, {"authorization", value}} {
			must(t, enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}))
		}
		stream := uint32(2*i + 1)
		must(t, framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: []byte(block.String()), EndHeaders: true}))
		must(t, framer.WriteData(stream, false, append([]byte{0, 0, 0, 4, 0}, make([]byte, 512)...)))
	}
	return func() (uint32, codes.Code) {
		for {
			frame, err := framer.ReadFrame()
			must(t, err)
			f, ok := frame.(*http2.MetaHeadersFrame)
			if !ok {
				continue
			}
			for _, field := range f.Fields {
				if field.Name == "grpc-status" {
					var code codes.Code
					must(t, code.UnmarshalJSON([]byte(field.Value)))
					return f.StreamID, code
				}
			}
		}
	}
}

// Half a message holds nothing for long: a stranger is refused without it, and a
// known caller is when the time for a call is over.
func TestT17_V60_HalfSentMessages(t *testing.T) {
	h := start(t, func(s *settings) { s.server.CallTimeout = time.Hour })
	for name, value := range map[string]string{"bad token": "Bearer x", "no token": ""} {
		if _, code := h.half(t, istio.IstioCertificateService_CreateCertificate_FullMethodName, value)(); code != codes.Unauthenticated {
			t.Errorf("%s: %v; want Unauthenticated", name, code)
		}
	}
	h = start(t, func(s *settings) { s.server.CallTimeout = 50 * time.Millisecond })
	for _, method := range []string{istio.IstioCertificateService_CreateCertificate_FullMethodName, grpc_health_v1.Health_Check_FullMethodName} {
		if _, code := h.half(t, method, "Bearer "+h.token(t, nil))(); code != codes.DeadlineExceeded {
			t.Errorf("%s: %v; want DeadlineExceeded", method, code)
		}
	}
	h.log.wait(t, "refused", "CreateCertificate", "had not arrived")
}

// One caller cannot take all the places, whatever it does with its own.
func TestT17_CallsOfOneCaller(t *testing.T) {
	h := start(t, func(s *settings) { s.server.CallTimeout = time.Hour })
	greedy := make([]string, maxCallsPerCaller+1)
	for i := range greedy {
		greedy[i] = "Bearer " + h.token(t, nil)
	}
	if _, code := h.half(t, istio.IstioCertificateService_CreateCertificate_FullMethodName, greedy...)(); code != codes.ResourceExhausted {
		t.Errorf("one call too many: %v; want ResourceExhausted", code)
	}
	other := bearer(t, "Bearer "+h.token(t, func(c *tokenissuer.Claims) { c.PodUID = nodeUID }))
	if _, err := h.create(t, other, &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)}); err != nil {
		t.Errorf("another caller, meanwhile: %v", err)
	}
}

func TestT17_HealthChecksOfOneAddress(t *testing.T) {
	h := start(t, func(s *settings) { s.server.CallTimeout = time.Hour })
	if _, code := h.half(t, grpc_health_v1.Health_Check_FullMethodName, make([]string, maxHealthPerSource+1)...)(); code != codes.ResourceExhausted {
		t.Errorf("one check too many: %v; want ResourceExhausted", code)
	}
}

// Streams are bounded for each caller and in total, and their places come back.
func TestT17_Streams(t *testing.T) {
	h := start(t, func(s *settings) { s.server.MaxStreams = maxStreamsPerCaller + 1 })
	open := func(uid string) (deltaClient, error) {
		stream := h.delta(t, bearer(t, "Bearer "+h.token(t, func(c *tokenissuer.Claims) { c.PodUID = uid })))
		if err := stream.Send(subscribe()); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err) // EOF: refused already, and Recv says why
		}
		_, err := stream.Recv()
		return stream, err
	}
	refused := func(uid, reason string) {
		t.Helper()
		_, err := open(uid)
		if status.Code(err) != codes.ResourceExhausted {
			t.Fatalf("%v; want ResourceExhausted", err)
		}
		h.log.wait(t, referenceOf(t, err), reason)
	}
	var first deltaClient
	for range maxStreamsPerCaller {
		stream, err := open(podUID)
		must(t, err)
		first = stream
	}
	refused(podUID, "the most one may have")
	_, err := open(nodeUID)
	must(t, err)
	refused("00000000-0000-4000-8000-000000000000", "the most there may be")
	must(t, first.CloseSend())
	_, err = first.Recv() // ends when its place is free
	if err != io.EOF {
		t.Fatal(err)
	}
	_, err = open(podUID)
	must(t, err)
}

// Calls whose caller is not known yet, because the keys to know it by do not
// come, are bounded, take no place of those that are known, and end in time.
func TestT17_F28_UnknownCallersTakeNoPlaces(t *testing.T) {
	keys := &trap{}
	h := start(t, func(s *settings) { s.keys, s.server.MaxCalls = keys, 1 })
	keys.next = h.tokens
	in, release := make(chan struct{}, 1), make(chan struct{})
	keys.set(func() error { in <- struct{}{}; <-release; return &token.UnavailableError{} })
	csr := newCSR(t, catest.NewKey(t), nil)
	conn := istio.NewIstioCertificateServiceClient(h.dial(t, nil))
	ctx := h.good(t)
	var waiting sync.WaitGroup
	for range 8 {
		waiting.Go(func() { _, _ = conn.CreateCertificate(ctx, &istio.IstioCertificateRequest{Csr: csr}) })
		<-in
	}
	keys.set(nil)
	if _, err := conn.CreateCertificate(ctx, &istio.IstioCertificateRequest{Csr: csr}); err != nil {
		t.Errorf("a known caller, meanwhile: %v", err)
	}
	close(release)
	waiting.Wait()
}

// Calls of one address that wait for the keys are bounded themselves.
func TestT17_ArrivingCalls(t *testing.T) {
	keys := &trap{}
	h := start(t, func(s *settings) { s.keys = keys })
	keys.next = h.tokens
	h.server.arriving = newLimiter("calls wait to be authenticated", 2, 1)
	in, release := make(chan struct{}, 2), make(chan struct{})
	keys.set(func() error { in <- struct{}{}; <-release; return &token.UnavailableError{} })
	req := &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)}
	conn := istio.NewIstioCertificateServiceClient(h.dial(t, nil))
	ctx := h.good(t)
	var waiting sync.WaitGroup
	waiting.Go(func() { _, _ = conn.CreateCertificate(ctx, req) })
	<-in
	keys.set(nil)
	_, err := conn.CreateCertificate(ctx, req)
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%v; want ResourceExhausted", err)
	}
	close(release)
	waiting.Wait()
	if _, err := conn.CreateCertificate(ctx, req); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestT17_Connections(t *testing.T) {
	h := start(t, func(s *settings) { s.server.MaxConnectionsPerSource = 2 })
	var open []*grpc.ClientConn // of callers: strangers make room
	for range 2 {
		conn := h.dial(t, nil)
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(h.good(t))
		must(t, err)
		exchange(t, stream, subscribe())
		open = append(open, conn)
	}
	if _, err := h.connect(t, h.clientTLS()); err == nil {
		t.Error("a third connection of one address stands")
	}
	h.log.wait(t, "connection refused", "the most one may have")
	if n := h.metric(t, "meshca_ca_connections_refused_total", ""); n != 1 {
		t.Errorf("%v refused connections were counted; want 1", n)
	}
	must(t, open[0].Close())
	for h.metric(t, "meshca_ca_connections", "") != 1 {
		runtime.Gosched()
	}
	if _, err := h.connect(t, h.clientTLS()); err != nil {
		t.Errorf("after one has gone: %v", err)
	}
}

func TestT17_LimiterCounts(t *testing.T) {
	l := newLimiter("things", 3, 2)
	var leave []func()
	enter := func(key string, good bool) {
		t.Helper()
		f, err := l.enter(key)
		if (err == nil) != good {
			t.Fatalf("%s: error %v", key, err)
		}
		if f != nil {
			leave = append(leave, f)
		}
	}
	enter("a", true)
	enter("a", true)
	enter("a", false)
	enter("b", true)
	enter("b", false) // in total
	leave[0]()
	leave[0]() // twice is once
	enter("b", true)
	enter("c", false)
	for _, f := range leave {
		f()
	}
	if l.sum != 0 || len(l.open) != 0 {
		t.Errorf("%d and %v are left", l.sum, l.open)
	}
	for from, want := range map[string]string{"10.0.0.1:80": "10.0.0.1", "[::ffff:10.0.0.1]:80": "10.0.0.1", "[fe80::1%1]:80": "fe80::1", "[2001:db8::1]:80": "2001:db8::1"} {
		a, err := net.ResolveTCPAddr("tcp", from)
		must(t, err)
		if got := sourceOf(a); got != want {
			t.Errorf("%s comes from %q; want %q", from, got, want)
		}
	}
}

func TestT17_Budget(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	b := newBudget(now)
	for range requestsBurst {
		if !b.spend(now) {
			t.Fatal("refused within the burst")
		}
	}
	if b.spend(now) {
		t.Error("a request beyond the burst")
	}
	now = now.Add(time.Hour)
	for n := range requestsBurst + 1 {
		if b.spend(now) != (n < requestsBurst) {
			t.Errorf("request %d after an hour", n+1)
		}
	}
	if b = newBudget(now); !b.spend(now.Add(-time.Hour)) {
		t.Error("a clock that was set back took what was left")
	}
}

// Whoever has no token takes no place from whoever has one: the reviewer's attack, from
// as many addresses as it takes to fill all places.
func TestT17_StrangersKeepNobodyOut(t *testing.T) {
	h := start(t, func(s *settings) {
		s.server.MaxConnections, s.server.MaxConnectionsPerSource, s.server.MaxStrangersPerSource = 24, 12, 8
	})
	var idle []*tls.Conn
	c := h.clientTLS()
	c.NextProtos = []string{"h2"}
	attack := func(rounds int) {
		for range rounds {
			for i := range 4 {
				d := &tls.Dialer{NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(i+1))}}, Config: c}
				conn, err := d.DialContext(t.Context(), "tcp", h.address)
				must(t, err)
				idle = append(idle, conn.(*tls.Conn))
				t.Cleanup(func() { _ = conn.Close() })
			}
		}
	}
	attack(10) // 40, for 24 places
	stream := h.delta(t, h.good(t))
	began := time.Now()
	exchange(t, stream, subscribe())
	if took := time.Since(began); took > time.Second {
		t.Errorf("an agent got in after %v", took)
	}
	if n := h.metric(t, "meshca_ca_connections", ""); n > 24 {
		t.Errorf("%v connections are open", n)
	}
	attack(10) // and stays in
	must(t, stream.Send(subscribe(cartURI)))
	if _, err := stream.Recv(); err != nil {
		t.Errorf("the agent that was in: %v", err)
	}
	_ = idle[0].SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.Copy(io.Discard, idle[0]); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the first stranger is still there")
	}
}

// Time makes room, too.
func TestT17_StrangersLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, func(s *settings) { s.bubble = true })
		raw, err := h.dialer(t.Context(), "")
		must(t, err)
		c := h.clientTLS()
		c.NextProtos = []string{"h2"}
		conn := tls.Client(raw, c)
		must(t, conn.Handshake())
		_, err = io.WriteString(conn, http2.ClientPreface)
		must(t, err)
		must(t, http2.NewFramer(conn, conn).WriteSettings())
		began := time.Now()
		_, _ = io.Copy(io.Discard, conn)
		_ = conn.Close()
		if took := time.Since(began); took != strangerTimeout {
			t.Errorf("it was closed after %v; want %v", took, strangerTimeout)
		}
		h.stop()
	})
}
