package sds

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/wire"
)

type adsStream struct {
	t testing.TB
	discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
}

// ads opens a stream as a proxy does.
func (k *kit) ads(ctx context.Context, req *discovery.DeltaDiscoveryRequest) adsStream {
	k.t.Helper()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(k.conn).DeltaAggregatedResources(ctx)
	if err != nil {
		k.t.Fatal(err)
	}
	if err := stream.Send(req); err != nil {
		k.t.Fatal(err)
	}
	return adsStream{k.t, stream}
}

func everything() *discovery.DeltaDiscoveryRequest {
	return &discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResourceNamesSubscribe: []string{"*"}}
}

// next returns what the stream says next, and its nonce.
func (s adsStream) next() (wire.Workload, string) {
	s.t.Helper()
	resp, err := s.Recv()
	if err != nil {
		s.t.Fatal(err)
	}
	if len(resp.GetResources()) != 1 || len(resp.GetRemovedResources()) != 0 {
		s.t.Fatalf("response %v", resp)
	}
	r := resp.GetResources()[0]
	w, err := wire.Parse(identitytest.TrustDomain(s.t, "example.org"), r.GetResource())
	if err != nil {
		s.t.Fatal(err)
	}
	if r.GetName() != cartID {
		s.t.Errorf("it is called %q", r.GetName())
	}
	return w, resp.GetNonce()
}

func (s adsStream) answer(nonce, problem string) {
	s.t.Helper()
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResponseNonce: nonce}
	if problem != "" {
		req.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: problem}
	}
	if err := s.Send(req); err != nil {
		s.t.Fatal(err)
	}
}

func resolved(version uint64, mode policy.Mode) *policy.Resolved {
	return &policy.Resolved{Version: version, Result: policy.Decided(mode, policy.Source{Level: policy.LevelDefault}, policy.Ref{}, nil)}
}

// A proxy is told of the policy once there is an identity, of each version after
// that, and of none that is not there; renewals of the certificate are not its
// affair here, and the end of the certificate does not take the policy away.
func TestT10_ProxyIsToldThePolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		stream := k.ads(inTime(t), everything()) // waits
		s := State{SVID: k.ca.SVID(t, mustID(t, cartID)), Bundle: newBundle(t, k.ca, 3)}
		k.feed.Publish(s)
		w, nonce := stream.next()
		if w.Policy != nil || w.Bundle.Sequence() != 3 || w.ID.String() != cartID {
			t.Errorf("before there is a policy: %+v", w)
		}
		stream.answer(nonce, "")

		s.Policy = resolved(7, policy.Strict)
		k.feed.Publish(s)
		if w, nonce = stream.next(); w.Policy == nil || w.Policy.Version != 7 || w.Policy.Mode != policy.Strict {
			t.Errorf("the first policy: %+v", w.Policy)
		}
		stream.answer(nonce, "no, because")

		s.SVID = k.ca.SVID(t, mustID(t, cartID)) // renewed, which is no news here
		k.feed.Publish(s)
		s.Policy = resolved(8, policy.Strict)
		k.feed.Publish(s)
		if w, _ = stream.next(); w.Policy.Version != 8 {
			t.Errorf("the next policy: %+v", w.Policy)
		}

		time.Sleep(2 * time.Hour) // the certificate has ended
		k.feed.Publish(s)
		s.Policy = resolved(9, policy.Permissive)
		k.feed.Publish(s)
		if w, _ = stream.next(); w.Policy.Version != 9 {
			t.Errorf("after the certificate has ended: %+v", w.Policy)
		}
		if n := k.metric("meshca_sds_responses_total", "workload", "rejected"); n != 1 {
			t.Errorf("%v refusals counted", n)
		}
	})
}

// A proxy that comes back with what it has is sent what differs; each stream
// starts with the newest.
func TestProxyComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))
		svid, bundle := ca.SVID(t, mustID(t, cartID)), newBundle(t, ca, 1)
		have := ""
		for _, tt := range []struct {
			policy *policy.Resolved // of an agent that has just started
			sent   bool
		}{
			{resolved(7, policy.Permissive), true},
			{resolved(7, policy.Permissive), false},
			{resolved(8, policy.Strict), true}, // the first state of that process too
		} {
			k := start(t)
			k.feed.Publish(State{SVID: svid, Bundle: bundle, Policy: tt.policy})
			req := everything()
			if have != "" {
				req.InitialResourceVersions = map[string]string{cartID: have, "gone": "1"}
			}
			stream := k.ads(inTime(t), req)
			resp, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if sent := len(resp.GetResources()) == 1; sent != tt.sent {
				t.Errorf("having %q of version %d: sent %v", have, tt.policy.Version, sent)
			}
			for _, r := range resp.GetResources() {
				have = r.GetVersion()
			}
		}
	})
}

func TestAggregatedStreamRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.feed.Publish(State{SVID: k.ca.SVID(t, mustID(t, cartID)), Bundle: newBundle(t, k.ca, 1)})
		stream := k.ads(inTime(t), &discovery.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: []string{"default"}})
		if resp, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("secrets over ADS: %v, %v", resp, err)
		}
		all, err := discovery.NewAggregatedDiscoveryServiceClient(k.conn).StreamAggregatedResources(inTime(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := all.Recv(); status.Code(err) != codes.Unimplemented {
			t.Errorf("state of the world: %v", err)
		}
		// V26: another workload's name is answered as one that nobody has.
		others := k.ads(inTime(t), &discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResourceNamesSubscribe: []string{payID, "x"}})
		resp, err := others.Recv()
		if err != nil || len(resp.GetResources()) != 0 || len(resp.GetRemovedResources()) != 2 {
			t.Errorf("%v, %v", resp, err)
		}
	})
}
