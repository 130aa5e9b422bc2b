package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/identity/token/tokenissuer"
	"github.com/meshca/meshca/wire"
	"github.com/meshca/meshca/wire/meshcav1"
)

func subscribe(names ...string) *discovery.DeltaDiscoveryRequest {
	return &discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResourceNamesSubscribe: names}
}

// exchange sends and waits for one response.
func exchange(t testing.TB, stream deltaClient, req *discovery.DeltaDiscoveryRequest) *discovery.DeltaDiscoveryResponse {
	t.Helper()
	must(t, stream.Send(req))
	resp, err := stream.Recv()
	must(t, err)
	return resp
}

func workload(t testing.TB, resp *discovery.DeltaDiscoveryResponse) *meshcav1.Workload {
	t.Helper()
	if len(resp.GetResources()) != 1 {
		t.Fatalf("%d resources; want one", len(resp.GetResources()))
	}
	w := &meshcav1.Workload{}
	must(t, resp.GetResources()[0].GetResource().UnmarshalTo(w))
	return w
}

func TestDeltaShowsACallerItself(t *testing.T) {
	h := start(t, nil)
	bundle, _ := h.authority.Bundle()
	versions := map[string]bool{}
	for name, names := range map[string][]string{"empty first request": nil, "wildcard": {"*"}, "by name": {podUID}} {
		t.Run(name, func(t *testing.T) {
			resp := exchange(t, h.delta(t, h.good(t)), subscribe(names...))
			w := workload(t, resp)
			r := resp.GetResources()[0]
			if r.GetName() != podUID || resp.GetTypeUrl() != wire.TypeURL || resp.GetNonce() == "" || len(resp.GetRemovedResources()) != 0 {
				t.Errorf("response %v", resp)
			}
			if !strings.HasPrefix(r.GetVersion(), fmt.Sprintf("%d-", bundle.Sequence())) {
				t.Errorf("version %q; the bundle's sequence is %d", r.GetVersion(), bundle.Sequence())
			}
			versions[r.GetVersion()] = true
			b := w.GetBundle()
			if w.GetSpiffeId() != cartURI || b.GetTrustDomain() != "cluster.local" || b.GetSequence() != bundle.Sequence() ||
				len(b.GetX509Authorities()) != 1 || !slices.Equal(b.GetX509Authorities()[0], bundle.Authorities()[0].Raw) || w.GetRenewAt() != nil {
				t.Errorf("workload %v", w)
			}
		})
	}
	if len(versions) != 1 {
		t.Errorf("the same content has versions %v", versions)
	}
}

// V26 for this protocol: what is another's is answered exactly like what does
// not exist.
func TestV26_OthersAreNotThere(t *testing.T) {
	h := start(t, nil)
	const other = "00000000-0000-4000-8000-000000000000"
	must(t, h.delta(t, bearer(t, "Bearer "+h.token(t, func(c *tokenissuer.Claims) { c.PodUID, c.ServiceAccount = other, "admin" }))).Send(subscribe()))
	stream := h.delta(t, h.good(t))
	resp := exchange(t, stream, subscribe(other, "nothing", cartURI))
	if len(resp.GetResources()) != 0 || !slices.Equal(resp.GetRemovedResources(), []string{other, "nothing", cartURI}) {
		t.Errorf("response %v", resp)
	}
	resp = exchange(t, stream, subscribe(podUID, other))
	if workload(t, resp).GetSpiffeId() != cartURI || !slices.Equal(resp.GetRemovedResources(), []string{other}) {
		t.Errorf("response %v", resp)
	}
}

func TestDeltaResumes(t *testing.T) {
	h := start(t, nil)
	version := exchange(t, h.delta(t, h.good(t)), subscribe()).GetResources()[0].GetVersion()

	// What the agent has is not sent again; what is not there any more is taken
	// away; so the first response is about that alone.
	stream := h.delta(t, h.good(t))
	req := subscribe()
	req.InitialResourceVersions = map[string]string{podUID: version, "gone": "1-x"}
	resp := exchange(t, stream, req)
	if len(resp.GetResources()) != 0 || !slices.Equal(resp.GetRemovedResources(), []string{"gone"}) {
		t.Errorf("response %v", resp)
	}
	// Naming it asks for it again, and dropping it under a wildcard too.
	if workload(t, exchange(t, stream, subscribe(podUID))).GetSpiffeId() != cartURI {
		t.Error("naming a resource again did not bring it")
	}
	drop := &discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResourceNamesUnsubscribe: []string{podUID}}
	if workload(t, exchange(t, stream, drop)).GetSpiffeId() != cartURI {
		t.Error("dropping a resource under a wildcard did not bring it again")
	}

	stream = h.delta(t, h.good(t))
	req = subscribe()
	req.InitialResourceVersions = map[string]string{podUID: "0-0000"}
	if workload(t, exchange(t, stream, req)).GetSpiffeId() != cartURI {
		t.Error("an old version was not replaced")
	}
}

func TestDeltaAckAndNack(t *testing.T) {
	h := start(t, nil)
	stream := h.delta(t, h.good(t))
	resp := exchange(t, stream, subscribe())
	answer := func(nonce string, detail *rpcstatus.Status, names ...string) *discovery.DeltaDiscoveryResponse {
		req := subscribe(names...)
		req.ResponseNonce, req.ErrorDetail = nonce, detail
		return exchange(t, stream, req)
	}
	// Each answer subscribes to something that is not there as well, so that the
	// response shows when it has been taken in, and that nothing is sent again.
	quiet := func(resp *discovery.DeltaDiscoveryResponse) {
		t.Helper()
		if len(resp.GetResources()) != 0 {
			t.Errorf("the resource was sent again: %v", resp)
		}
	}
	second := answer(resp.GetNonce(), nil, "x")
	quiet(second)
	third := answer(second.GetNonce(), &rpcstatus.Status{Code: 3, Message: "sequence 1 is lower than 2\n" + strings.Repeat("y", 500)}, "x")
	quiet(third)
	quiet(answer(resp.GetNonce(), nil, "x")) // answered already
	quiet(answer("made up", nil, "x"))
	for result, want := range map[string]float64{"ack": 1, "nack": 1, "stale": 2} {
		if got := h.metric(t, "meshca_ca_stream_acks_total", result); got != want {
			t.Errorf("%v %s; want %v", got, result, want)
		}
	}
	line := h.log.wait(t, "an agent refuses its resource")
	if line["spiffe_id"] != cartURI || !strings.HasPrefix(line["error"].(string), "sequence 1 is lower") || len(line["error"].(string)) > 300 ||
		line["acknowledged"] != resp.GetResources()[0].GetVersion() {
		t.Errorf("log line %v", line)
	}
	if n := h.metric(t, "meshca_ca_streams", ""); n != 1 {
		t.Errorf("%v streams; want 1", n)
	}
}

func TestDeltaRefusals(t *testing.T) {
	h := start(t, nil)
	past, err := tokenissuer.New(tokenissuer.Config{URL: h.tokens.URL(), Key: h.tokenKey, Now: pastClock(3610)})
	must(t, err)
	c := claims()
	justOver, err := past.Issue(c) // ended 10 s ago: good for a call, too old for a stream
	must(t, err)
	tests := map[string]struct {
		token string
		req   *discovery.DeltaDiscoveryRequest
		code  codes.Code
		text  string
	}{
		"no token":             {"", subscribe(), codes.Unauthenticated, "no token"},
		"token within leeway":  {justOver, subscribe(), codes.Unauthenticated, "the proof ended at"},
		"no type":              {h.token(t, nil), &discovery.DeltaDiscoveryRequest{}, codes.InvalidArgument, `type ""`},
		"Envoy's secrets":      {h.token(t, nil), &discovery.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"}, codes.InvalidArgument, "tls.v3.Secret"},
		"a message over 64KiB": {h.token(t, nil), subscribe(strings.Repeat("x", MaxMessage)), codes.ResourceExhausted, "larger than max"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			ctx := bearer(t)
			if tt.token != "" {
				ctx = bearer(t, "Bearer "+tt.token)
			}
			stream := h.delta(t, ctx)
			_ = stream.Send(tt.req)
			_, err := stream.Recv()
			if status.Code(err) != tt.code {
				t.Fatalf("%v; want %v", err, tt.code)
			}
			if tt.code == codes.ResourceExhausted { // gRPC has answered this one itself
				h.log.wait(t, tt.text, "refused")
				return
			}
			line := h.log.wait(t, referenceOf(t, err))
			if !strings.Contains(line["reason"].(string), tt.text) {
				t.Errorf("reason %q; want %q in it", line["reason"], tt.text)
			}
		})
	}
	t.Run("state of the world", func(t *testing.T) {
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(h.dial(t, nil)).StreamAggregatedResources(h.good(t))
		must(t, err)
		if _, err := stream.Recv(); status.Code(err) != codes.Unimplemented {
			t.Errorf("%v; want Unimplemented", err)
		}
	})
}

// A caller by certificate has no pod: its resource is named by its ID.
func TestDeltaByCertificate(t *testing.T) {
	h := start(t, func(s *settings) { s.byCert = []string{cartURI} })
	svid := h.svid(t)
	conn := h.dial(t, func(c *tls.Config) { c.Certificates = []tls.Certificate{*svid} })
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(bearer(t))
	must(t, err)
	resp := exchange(t, stream, subscribe(cartURI))
	if workload(t, resp); resp.GetResources()[0].GetName() != cartURI {
		t.Errorf("response %v", resp)
	}
}

func TestDeltaEndsWithTheAgent(t *testing.T) {
	h := start(t, nil)
	ctx, cancel := context.WithCancel(h.good(t))
	stream := h.delta(t, ctx)
	exchange(t, stream, subscribe())
	must(t, stream.CloseSend())
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after closing: %v", err)
	}
	stream = h.delta(t, ctx)
	exchange(t, stream, subscribe())
	cancel()
	h.log.wait(t, "canceled by the caller")
	if found, _ := h.log.find("refused"); len(found) != 0 {
		t.Errorf("an agent that left was logged as refused: %v", found)
	}
}
