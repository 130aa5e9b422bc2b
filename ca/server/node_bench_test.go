package server

import (
	"context"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/wire"
)

// everybody lives.
type everybody struct{}

func (everybody) Live(string, string) (string, string, bool) { return "shop", "cart", true }

func (everybody) Follow(string, func()) (stop func()) { return func() {} }

// sink is a stream that takes all responses and counts them.
type sink struct {
	deltaServer
	ctx  context.Context
	sent int
}

func (s *sink) Context() context.Context { return s.ctx }

func (s *sink) Send(*discovery.DeltaDiscoveryResponse) error { s.sent++; return nil }

// BenchmarkNodeStream is what a node of 250 pods costs: when nothing has changed, as
// every 30 s; when the policy of all has; and for one answer.
func BenchmarkNodeStream(b *testing.B) {
	const pods = 250
	setUp := func(b *testing.B) (*nodeStream, *sink, *policies) {
		p := &policies{changed: make(chan struct{}), now: &policy.Resolved{Version: 1, Result: policy.Decided(policy.Strict, policy.Source{Level: policy.LevelMesh}, policy.Ref{}, nil)}}
		h := start(b, func(s *settings) { s.server.Policies, s.server.Pods = p, everybody{} })
		who, err := h.server.authenticator.Authenticate(b.Context(), credentialsFor(b, h))
		must(b, err)
		out := &sink{ctx: b.Context()}
		n := newNodeStream(&adsService{s: h.server}, out, who)
		b.Cleanup(n.close)
		names := make([]string, pods)
		for i := range names {
			names[i] = uidOf(i)
		}
		_, err = n.subs.Request(subscribe(names...))
		must(b, err)
		_, err = n.push(nil)
		must(b, err)
		if out.sent != pods {
			b.Fatalf("%d responses; want %d", out.sent, pods)
		}
		return n, out, p
	}
	b.Run("nothing changed", func(b *testing.B) {
		n, out, _ := setUp(b)
		for b.Loop() {
			n.subs.TouchAll()
			_, err := n.push(nil)
			must(b, err)
		}
		if out.sent != pods {
			b.Errorf("%d responses were sent", out.sent)
		}
	})
	b.Run("all policies changed", func(b *testing.B) {
		n, _, p := setUp(b)
		for version := uint64(2); b.Loop(); version++ {
			p.mu.Lock()
			p.now = &policy.Resolved{Version: version, Result: p.now.Result}
			p.mu.Unlock()
			n.subs.TouchAll()
			_, err := n.push(nil)
			must(b, err)
		}
	})
	b.Run("an answer", func(b *testing.B) {
		n, _, _ := setUp(b)
		ack := &discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResponseNonce: "1"}
		for b.Loop() {
			_, err := n.subs.Request(ack)
			must(b, err)
		}
	})
}
