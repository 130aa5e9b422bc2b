package server

import (
	"sync"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/wire"
	"github.com/meshca/meshca/wire/meshcav1"
)

// policies are a Policies that a test changes.
type policies struct {
	mu      sync.Mutex
	now     *policy.Resolved
	changed chan struct{}
	asked   []string // IDs
}

func (p *policies) Policy(of Subject) (*policy.Resolved, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, of.ID.String())
	return p.now, p.changed
}

func (p *policies) set(r *policy.Resolved) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now = r
	close(p.changed)
	p.changed = make(chan struct{})
}

// A policy is sent when it is known, for the caller that was authenticated, and
// again with each version; while it is not known, the bundle comes without.
func TestT10_PolicyIsSentWhenKnown(t *testing.T) {
	p := &policies{changed: make(chan struct{})}
	h := start(t, func(s *settings) { s.server.Policies = p })
	stream := h.delta(t, h.good(t))
	if w := workload(t, exchange(t, stream, subscribe())); w.GetPolicy() != nil {
		t.Errorf("not known, and sent: %v", w.GetPolicy())
	}
	strict := policy.Decided(policy.Strict, policy.Source{Level: policy.LevelMesh, Policy: policy.Ref{Namespace: "meshca-system", Name: "default"}}, policy.Ref{}, nil)
	versions := map[string]bool{}
	for _, number := range []uint64{7, 8} { // the second says the same
		p.set(&policy.Resolved{Version: number, Result: strict})
		resp, err := stream.Recv()
		must(t, err)
		w := workload(t, resp)
		if got := w.GetPolicy(); got.GetVersion() != number || got.GetMode() != meshcav1.Mode_MODE_STRICT || got.GetSource().GetNamespace() != "meshca-system" {
			t.Errorf("version %d: %v", number, got)
		}
		versions[resp.GetResources()[0].GetVersion()] = true
	}
	if len(versions) != 2 {
		t.Errorf("xDS versions %v; two policy versions are two contents", versions)
	}
	for _, id := range p.asked {
		if id != cartURI {
			t.Errorf("the policy of %s was looked up", id)
		}
	}
	// A type that is not served ends the stream.
	must(t, stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/" + wire.TypeURL}))
	if _, err := stream.Recv(); err == nil {
		t.Error("another type did not end the stream")
	}
}

// However many policies are pushed, the answers to them do not use up what the
// agent may ask for.
func TestAnswersToPoliciesAreFree(t *testing.T) {
	p := &policies{changed: make(chan struct{})}
	h := start(t, func(s *settings) { s.server.Policies = p })
	stream := h.delta(t, h.good(t))
	resp := exchange(t, stream, subscribe())
	for i := range 5 * requestsBurst {
		p.set(&policy.Resolved{Version: uint64(i + 1), Result: policy.Decided(policy.Strict, policy.Source{Level: policy.LevelMesh}, policy.Ref{}, nil)})
		must(t, stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResponseNonce: resp.GetNonce()}))
		var err error
		if resp, err = stream.Recv(); err != nil {
			t.Fatalf("after %d policies: %v", i, err)
		}
	}
}
