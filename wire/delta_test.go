package wire

import (
	"fmt"
	"slices"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
)

const own = "7f9c1e2a-4f0e-4c3e-9d55-0a1b2c3d4e5f"

func subscribe(names ...string) *discovery.DeltaDiscoveryRequest {
	return &discovery.DeltaDiscoveryRequest{TypeUrl: TypeURL, ResourceNamesSubscribe: names}
}

func resource(version string) *discovery.Resource {
	return &discovery.Resource{Name: own, Version: version}
}

// What a client asks for does not grow what is kept about it.
func TestV12_StateIsBounded(t *testing.T) {
	d := NewDelta(own)
	names := make([]string, 20000)
	versions := map[string]string{}
	for i := range names {
		names[i] = fmt.Sprint(i)
		versions[names[i]] = "1-x"
	}
	for i := range 100 {
		req := subscribe(names...)
		req.InitialResourceVersions, req.ResourceNamesUnsubscribe = versions, names
		if _, err := d.Request(req); err != nil {
			t.Fatal(err)
		}
		resp := d.Next(resource("1"))
		if i > 0 && len(resp.GetRemovedResources()) != len(names) {
			t.Fatalf("%d names were answered; want %d", len(resp.GetRemovedResources()), len(names))
		}
	}
	if len(d.removed) != 0 || len(d.open) > maxOpen {
		t.Errorf("%d names and %d responses are kept", len(d.removed), len(d.open))
	}
}

// A client that resumes with what it has is sent what differs, and told what is
// not its own.
func TestDeltaResumes(t *testing.T) {
	for have, want := range map[string]bool{"1": false, "2": true} {
		d := NewDelta(own)
		req := subscribe("*")
		req.InitialResourceVersions = map[string]string{own: have, "other": "7"}
		if _, err := d.Request(req); err != nil {
			t.Fatal(err)
		}
		resp := d.Next(resource("1"))
		if (len(resp.GetResources()) == 1) != want || !slices.Equal(resp.GetRemovedResources(), []string{"other"}) {
			t.Errorf("having %s: %v", have, resp)
		}
	}
}

func TestDeltaVerdicts(t *testing.T) {
	d := NewDelta(own)
	answer := func(nonce, problem string) Verdict {
		t.Helper()
		req := &discovery.DeltaDiscoveryRequest{TypeUrl: TypeURL, ResponseNonce: nonce}
		if problem != "" {
			req.ErrorDetail = &rpcstatus.Status{Message: problem}
		}
		v, err := d.Request(req)
		if err != nil || v == nil {
			t.Fatalf("%v, %v", v, err)
		}
		return *v
	}
	if v, err := d.Request(subscribe()); v != nil || err != nil {
		t.Fatalf("%v, %v", v, err)
	}
	first := d.Next(resource("1")).GetNonce()
	if got, want := answer(first, ""), (Verdict{Answer: Acked, Name: own, Version: "1", Acknowledged: "1"}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	second := d.Next(resource("2")).GetNonce()
	if got, want := answer(second, "no"), (Verdict{Answer: Nacked, Name: own, Version: "2", Acknowledged: "1", Detail: "no"}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got, want := answer(first, ""), (Verdict{Answer: Stale, Acknowledged: "1"}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if resp := d.Next(resource("2")); resp != nil {
		t.Errorf("what was refused is sent again: %v", resp)
	}
	if resp := d.Next(resource("3")); len(resp.GetResources()) != 1 {
		t.Errorf("the next change: %v", resp)
	}
}

func FuzzDelta(f *testing.F) {
	for _, req := range []*discovery.DeltaDiscoveryRequest{
		subscribe(), subscribe("*", own, "x"),
		{TypeUrl: TypeURL, ResourceNamesUnsubscribe: []string{"*", own}, ResponseNonce: "1"},
		{TypeUrl: TypeURL, InitialResourceVersions: map[string]string{own: "1-x", "y": ""}, ResponseNonce: "1", ErrorDetail: &rpcstatus.Status{Message: "no"}},
	} {
		b, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, b)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		d := NewDelta(own)
		for _, b := range [][]byte{first, second} {
			req := &discovery.DeltaDiscoveryRequest{}
			if proto.Unmarshal(b, req) != nil {
				return
			}
			if _, err := d.Request(req); err != nil {
				return
			}
			resp := d.Next(resource("1"))
			for _, r := range resp.GetResources() {
				if r.GetName() != own {
					t.Errorf("sent %q", r.GetName())
				}
			}
			if slices.Contains(resp.GetRemovedResources(), own) {
				t.Error("the client's own resource was taken away")
			}
		}
	})
}
