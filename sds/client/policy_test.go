package client

import (
	"context"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/sds"
	"github.com/meshca/meshca/wire"
)

func resolved(version uint64, mode policy.Mode) *policy.Resolved {
	return &policy.Resolved{Version: version, Result: policy.Decided(mode, policy.Source{Level: policy.LevelDefault}, policy.Ref{}, nil)}
}

// publishPolicy publishes an identity and a policy, which may be nil.
func (a *agent) publishPolicy(p *policy.Resolved) {
	a.t.Helper()
	a.feed.Publish(sds.State{SVID: a.ca.SVID(a.t, identitytest.ID(a.t, cartID)), Bundle: a.ca.Bundle(), Policy: p})
}

func runPolicy(t *testing.T, path string) *PolicySource {
	t.Helper()
	s, err := NewPolicy(Config{Socket: path, Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

// awaits waits until what the source says satisfies is.
func (s *PolicySource) awaits(t *testing.T, what string, is func(policy.Resolved, error) bool) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		changed := s.Changed()
		p, err := s.Policy()
		if is(p, err) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("never %s; the last: %+v, %v", what, p, err)
		}
	}
}

func inForce(mode policy.Mode) func(policy.Resolved, error) bool {
	return func(p policy.Resolved, err error) bool { return err == nil && p.Mode == mode }
}

// A policy is taken when there is one, and stays whatever happens to the agent;
// an agent that has restarted and knows an older one, or none yet, changes nothing.
func TestT10_F43_PolicyStaysThroughRestarts(t *testing.T) {
	a := newAgent(t)
	s := runPolicy(t, a.path)
	if _, err := s.Policy(); err == nil {
		t.Fatal("a policy from nowhere")
	}
	a.start()
	a.publishPolicy(nil)
	s.awaits(t, "told that there is none", func(_ policy.Resolved, err error) bool {
		return err != nil && strings.Contains(err.Error(), "the agent has none")
	})
	a.publishPolicy(resolved(7, policy.Strict))
	s.awaits(t, "STRICT", inForce(policy.Strict))

	a.stop()
	a.start()
	a.publishPolicy(nil)
	a.publishPolicy(resolved(6, policy.Permissive))
	a.publishPolicy(resolved(7, policy.Permissive))
	older := resolved(9, policy.Permissive) // in nothing but the labels
	older.WorkloadVersion = 50
	newest := resolved(8, policy.Disable)
	newest.WorkloadVersion = 51
	a.publishPolicy(newest) // the first that may follow
	for {
		changed := s.Changed()
		p, err := s.Policy()
		if err != nil || p.Mode == policy.Permissive {
			t.Fatalf("an older policy is in force: %+v, %v", p, err)
		}
		if p.Mode == policy.Disable && p.WorkloadVersion == 51 {
			break
		}
		<-changed
	}
	// Of two numbers the higher one does not make up for the lower.
	a.publishPolicy(older)
	last := resolved(9, policy.Strict)
	last.WorkloadVersion = 51
	a.publishPolicy(last)
	for {
		changed := s.Changed()
		p, err := s.Policy()
		if err != nil || p.Mode == policy.Permissive {
			t.Fatalf("a policy for older labels is in force: %+v, %v", p, err)
		}
		if p.Mode == policy.Strict {
			break
		}
		<-changed
	}
}

func response(t *testing.T, w wire.Workload) *discovery.DeltaDiscoveryResponse {
	t.Helper()
	content, _, err := w.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return &discovery.DeltaDiscoveryResponse{TypeUrl: wire.TypeURL, Resources: []*discovery.Resource{{Name: w.ID.String(), Resource: content}}}
}

func TestT10_PolicyThatIsRefusedChangesNothing(t *testing.T) {
	ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))
	good := func(p *policy.Resolved) *discovery.DeltaDiscoveryResponse {
		return response(t, wire.Workload{ID: identitytest.ID(t, cartID), Bundle: ca.Bundle(), Policy: p})
	}
	s, err := NewPolicy(Config{Socket: "x", Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.accept(good(resolved(7, policy.Strict))); err != nil {
		t.Fatal(err)
	}
	unchanged := s.Changed()
	for name, tt := range map[string]struct {
		change func(*discovery.DeltaDiscoveryResponse)
		want   string
	}{
		"another type":    {func(r *discovery.DeltaDiscoveryResponse) { r.TypeUrl = "x" }, "is of type"},
		"two workloads":   {func(r *discovery.DeltaDiscoveryResponse) { r.Resources = append(r.Resources, r.Resources[0]) }, "2 workloads"},
		"a name of no ID": {func(r *discovery.DeltaDiscoveryResponse) { r.Resources[0].Name = "cart" }, "name"},
		"another's":       {func(r *discovery.DeltaDiscoveryResponse) { r.Resources[0].Name += "x" }, "is about"},
		"no content":      {func(r *discovery.DeltaDiscoveryResponse) { r.Resources[0].Resource = nil }, "no content"},
		"garbage": {func(r *discovery.DeltaDiscoveryResponse) {
			r.Resources[0].Resource = &anypb.Any{TypeUrl: wire.TypeURL, Value: []byte{0xff}}
		}, "decoded"},
		"an older version": {func(r *discovery.DeltaDiscoveryResponse) {
			proto.Merge(emptied(r), good(resolved(6, policy.Permissive)))
		}, "in use already"},
	} {
		r := good(resolved(8, policy.Permissive))
		tt.change(r)
		if err := s.accept(r); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	// What is the same, and what goes, is no news either.
	for _, r := range []*discovery.DeltaDiscoveryResponse{
		good(resolved(9, policy.Strict)), good(nil), {TypeUrl: wire.TypeURL, RemovedResources: []string{cartID}},
	} {
		if err := s.accept(r); err != nil {
			t.Error(err)
		}
	}
	select {
	case <-unchanged:
		t.Error("a change was announced")
	default:
	}
	if p, err := s.Policy(); err != nil || p.Version != 9 || p.Mode != policy.Strict {
		t.Errorf("%+v, %v", p, err)
	}
}

// emptied empties a message, to be filled with another.
func emptied(r *discovery.DeltaDiscoveryResponse) *discovery.DeltaDiscoveryResponse {
	r.Reset()
	return r
}
