package wire

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
)

// follows counts who is followed.
type follows map[string]int

func (f follows) follow(name string) func() {
	f[name]++
	return func() {
		if f[name]--; f[name] == 0 {
			delete(f, name)
		}
	}
}

func unsubscribe(names ...string) *discovery.DeltaDiscoveryRequest {
	return &discovery.DeltaDiscoveryRequest{TypeUrl: TypeURL, ResourceNamesUnsubscribe: names}
}

// drain looks at all that is queued, by what there is: versions by name.
func drain(s *Subscriptions, there map[string]string) (sent, removed []string) {
	for {
		name, _, ok := s.Next()
		if !ok {
			return sent, removed
		}
		var r *discovery.Resource
		if v := there[name]; v != "" {
			r = &discovery.Resource{Name: name, Version: v}
		}
		resp := s.Respond(name, r)
		for _, r := range resp.GetResources() {
			sent = append(sent, r.GetName()+"@"+r.GetVersion())
		}
		removed = append(removed, resp.GetRemovedResources()...)
	}
}

// A name is sent when it is there, removed once when it goes, and sent again when it
// comes back.
func TestSubscriptionsComeAndGo(t *testing.T) {
	f := follows{}
	s := NewSubscriptions(f.follow)
	expect := func(what string, there map[string]string, sent, removed []string) {
		t.Helper()
		gotSent, gotRemoved := drain(s, there)
		if !slices.Equal(gotSent, sent) || !slices.Equal(gotRemoved, removed) {
			t.Errorf("%s: sent %v and removed %v; want %v and %v", what, gotSent, gotRemoved, sent, removed)
		}
	}
	request := func(req *discovery.DeltaDiscoveryRequest) {
		t.Helper()
		if _, err := s.Request(req); err != nil {
			t.Fatal(err)
		}
	}
	first := subscribe("*", "a", "b")
	first.InitialResourceVersions = map[string]string{"a": "1", "z": "1"}
	request(first)
	if len(f) != 2 {
		t.Errorf("followed are %v; a wildcard subscribes to nothing", f)
	}
	if resp := s.Strangers(); !slices.Equal(resp.GetRemovedResources(), []string{"z"}) || s.Strangers() != nil {
		t.Errorf("what was had before and is not subscribed to: %v", resp)
	}
	expect("resuming", map[string]string{"a": "1"}, nil, []string{"b"})
	s.TouchAll()
	expect("nothing new", map[string]string{"a": "1"}, nil, nil)
	s.Touch("b")
	s.Touch("nobody")
	expect("it appears", map[string]string{"a": "1", "b": "1"}, []string{"b@1"}, nil)
	s.Touch("b")
	s.Touch("b")
	expect("it goes", map[string]string{"a": "1"}, nil, []string{"b"})
	request(subscribe("a"))
	expect("asked for again", map[string]string{"a": "1"}, []string{"a@1"}, nil)
	request(unsubscribe("a", "*", "nobody"))
	s.Touch("a")
	expect("dropped", map[string]string{"a": "2"}, nil, nil)
	s.Close()
	if len(f) != 0 {
		t.Errorf("after the end %v are followed", f)
	}
}

// Each answer is about one name, in whatever order they come.
func TestSubscriptionsVerdicts(t *testing.T) {
	s := NewSubscriptions(follows{}.follow)
	if _, err := s.Request(subscribe("a", "b")); err != nil {
		t.Fatal(err)
	}
	nonces := map[string]string{}
	send := func(name, version string) {
		resp := s.Respond(name, &discovery.Resource{Name: name, Version: version})
		nonces[name+version] = resp.GetNonce()
	}
	send("a", "1")
	send("b", "1")
	send("a", "2")
	for _, step := range []struct {
		nonce, problem string
		want           Verdict
	}{
		{nonces["b1"], "", Verdict{Answer: Acked, Name: "b", Version: "1", Acknowledged: "1"}},
		{nonces["a2"], "no", Verdict{Answer: Nacked, Name: "a", Version: "2", Detail: "no"}},
		{nonces["a1"], "", Verdict{Answer: Stale, Name: "a", Version: "1"}},
		{nonces["b1"], "", Verdict{Answer: Stale}},
		{"made up", "", Verdict{Answer: Stale}},
	} {
		req := &discovery.DeltaDiscoveryRequest{TypeUrl: TypeURL, ResponseNonce: step.nonce}
		if step.problem != "" {
			req.ErrorDetail = &rpcstatus.Status{Message: step.problem}
		}
		if v, err := s.Request(req); err != nil || *v != step.want {
			t.Errorf("answer to %s: %+v, %v; want %+v", step.nonce, v, err, step.want)
		}
	}
}

// What a client can make us keep is bounded, whatever it asks for and however
// little it answers.
func TestV12_SubscriptionsAreBounded(t *testing.T) {
	var limit *LimitError
	s := NewSubscriptions(follows{}.follow)
	for i := range MaxNames {
		if _, err := s.Request(subscribe(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Request(subscribe("0", "1")); err != nil {
		t.Errorf("names that are subscribed to already: %v", err)
	}
	if _, err := s.Request(subscribe("one more")); !errors.As(err, &limit) {
		t.Errorf("one name more: %v", err)
	}
	long := NewSubscriptions(follows{}.follow)
	if _, err := long.Request(subscribe(strings.Repeat("x", maxNameBytes+1))); !errors.As(err, &limit) {
		t.Errorf("a name of more bytes than all may have: %v", err)
	}
	for i := range 10 * MaxNames {
		name := fmt.Sprint(rand.N(MaxNames))
		s.Respond(name, &discovery.Resource{Name: name, Version: fmt.Sprint(i)})
		s.Touch(name)
		if _, err := s.Request(unsubscribe(name)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Request(subscribe(name)); err != nil {
			t.Fatal(err)
		}
		drain(s, nil)
	}
	if len(s.open) > 2*MaxNames || len(s.queue) != 0 || len(s.names) != MaxNames {
		t.Errorf("%d responses, %d names to look at and %d names are kept", len(s.open), len(s.queue), len(s.names))
	}
}
