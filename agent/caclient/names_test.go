package caclient

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
	istioca "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/wire"
)

// nodeRig is a Watch of several names at a CA whose streams the test speaks
// itself, in a bubble.
type nodeRig struct {
	t       *testing.T
	ca      *caclienttest.CA
	names   Names
	watch   *Watch
	streams chan *caclienttest.Stream
	applied []string // name and version, as taken
	ignored []string
	removed []string
	refuse  map[string]error // by name
}

func newNodeRig(t *testing.T, addresses ...string) (*nodeRig, *Client) {
	r := &nodeRig{t: t, ca: newCA(t), streams: make(chan *caclienttest.Stream, 10), refuse: map[string]error{}}
	r.ca.OnStream = func(s *caclienttest.Stream) error {
		r.streams <- s
		<-s.Context().Done()
		return nil
	}
	r.watch = &Watch{
		Names: &r.names, Token: token(canary),
		Apply: func(name string, w wire.Workload) error {
			if err := r.refuse[name]; err != nil {
				return err
			}
			r.applied = append(r.applied, fmt.Sprintf("%s@%d", name, w.Bundle.Sequence()))
			return nil
		},
		Ignored: func(name string) { r.ignored = append(r.ignored, name) },
		Removed: func(name string) { r.removed = append(r.removed, name) },
	}
	n := caclienttest.NewNetwork(t)
	for _, a := range addresses {
		r.ca.Serve(n.Listen(a), r.ca.TLS(serverName))
	}
	return r, newClient(t, r.ca, n, addresses...)
}

// follow runs one Watch in the background; stop ends it.
func (r *nodeRig) follow(c *Client) (stop func() error) {
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Watch(ctx, r.watch) }()
	return func() error { cancel(); return <-done }
}

// send sends the workload with the given sequence under each of the names.
func (r *nodeRig) send(s *caclienttest.Stream, nonce string, sequence uint64, names ...string) {
	r.t.Helper()
	content, err := anypb.New(r.ca.Workload(sequence))
	if err != nil {
		r.t.Fatal(err)
	}
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: wire.TypeURL, Nonce: nonce}
	for _, name := range names {
		resp.Resources = append(resp.Resources, &discovery.Resource{Name: name, Version: fmt.Sprint(sequence), Resource: content})
	}
	if err := s.Send(resp); err != nil {
		r.t.Fatal(err)
	}
}

func (r *nodeRig) want(what string, got []string, want ...string) {
	r.t.Helper()
	if !slices.Equal(got, want) {
		r.t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// Names come and go on the open stream, and what one stream brought need not be
// sent again on the next.
func TestNamesChangeWhileTheStreamIsOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := newNodeRig(t, "a:1")
		r.names.Add("one")
		stop := r.follow(c)
		s := <-r.streams
		r.want("first request", s.First.GetResourceNamesSubscribe(), "one")
		r.send(s, "n1", 1, "one")
		if err := s.Answer("n1"); err != nil {
			t.Error(err)
		}
		r.names.Add("two")
		r.names.Add("three")
		change, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		r.want("subscribed", change.GetResourceNamesSubscribe(), "three", "two")
		r.want("unsubscribed", change.GetResourceNamesUnsubscribe())
		if change.GetResponseNonce() != "" {
			t.Error("it answers a response")
		}
		r.send(s, "n2", 1, "two", "three")
		if err := s.Answer("n2"); err != nil {
			t.Error(err)
		}
		r.names.Remove("one")
		change, err = s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		r.want("subscribed", change.GetResourceNamesSubscribe())
		r.want("unsubscribed", change.GetResourceNamesUnsubscribe(), "one")

		// It came before the CA had read that.
		r.send(s, "n3", 2, "one")
		if err := s.Answer("n3"); err != nil {
			t.Error("what nobody asked for is no reason for a NACK:", err)
		}
		r.want("applied", r.applied, "one@1", "two@1", "three@1")
		r.want("ignored", r.ignored, "one")

		// Gone and there again: whoever added it has nothing yet.
		r.names.Remove("two")
		r.names.Add("two")
		if change, err = s.Recv(); err != nil {
			t.Fatal(err)
		}
		r.want("subscribed again", change.GetResourceNamesSubscribe(), "two")
		if err := stop(); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}

		r.names.Add("four")
		stop = r.follow(c)
		s = <-r.streams
		r.want("second stream", s.First.GetResourceNamesSubscribe(), "four", "three", "two")
		if v := s.First.GetInitialResourceVersions(); len(v) != 1 || v["three"] != "1" {
			t.Errorf("it resumes from %v", v)
		}
		_ = stop()
	})
}

// An empty first request would mean the wildcard.
func TestNoNamesOpenNoStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := newNodeRig(t, "a:1")
		if err := c.Watch(t.Context(), r.watch); !errors.Is(err, errNoNames) {
			t.Errorf("got %v", err)
		}
		if len(r.streams) != 0 {
			t.Error("a stream was opened")
		}
	})
}

// One workload's bad resource is refused and named; the others of the same
// response are taken, and the stream stays, though there is another CA.
func TestBadResourceKeepsNoOtherOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := newNodeRig(t, "a:1", "b:1")
		for _, name := range []string{"bad", "good", "new"} {
			r.names.Add(name)
		}
		r.refuse["bad"] = errors.New("do not like it")
		stop := r.follow(c)
		s := <-r.streams
		r.send(s, "n1", 1, "bad")
		if err := s.Answer("n1"); err == nil || !strings.Contains(err.Error(), `"bad": do not like it`) {
			t.Errorf("the CA was told %v", err)
		}
		r.send(s, "n2", 1, "bad", "good")
		if err := s.Answer("n2"); err == nil || strings.Contains(err.Error(), "good") {
			t.Errorf("the CA was told %v", err)
		}
		if err := s.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: wire.TypeURL, Nonce: "n3", RemovedResources: []string{"new"}}); err != nil {
			t.Fatal(err)
		}
		if err := s.Answer("n3"); err != nil {
			t.Error(err)
		}
		r.want("removed", r.removed, "new")
		r.send(s, "n4", 2, "new") // the CA has heard of it meanwhile
		if err := s.Answer("n4"); err != nil {
			t.Error(err)
		}
		r.want("applied", r.applied, "good@1", "new@2")
		_ = stop()
	})
}

// A CA of which nothing is good, since it is behind, is left for another one.
func TestF69_CAThatIsBehindAboutAllNamesIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := newNodeRig(t, "a:1", "b:1")
		r.names.Add("one")
		r.names.Add("two")
		r.names.Add("unknown")
		r.refuse["one"], r.refuse["two"] = errors.New("old"), errors.New("old")
		ended := make(chan error, 1)
		go func() { ended <- c.Watch(t.Context(), r.watch) }()
		s := <-r.streams
		if err := s.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: wire.TypeURL, Nonce: "n0", RemovedResources: []string{"unknown"}}); err != nil {
			t.Fatal(err)
		}
		r.send(s, "n1", 1, "one")
		synctest.Wait()
		if len(ended) != 0 {
			t.Fatal("left before all has been judged")
		}
		r.send(s, "n2", 1, "two")
		var nack *NackError
		if err := <-ended; !errors.As(err, &nack) || c.preference() != 1 {
			t.Errorf("ended with %v, next is %d", err, c.preference())
		}
	})
}

// 900 pods at once are told in requests that the CA reads, at a pace that it
// takes.
func TestManyNamesAreToldInPortions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := newNodeRig(t, "a:1")
		want := map[string]bool{}
		for i := range 900 {
			name := fmt.Sprintf("7f9c1e2a-4f0e-4c3e-9d55-%012d", i)
			want[name] = true
			r.names.Add(name)
		}
		stop := r.follow(c)
		s := <-r.streams
		began, req, requests := time.Now(), s.First, 0
		for {
			requests++
			for _, name := range req.GetResourceNamesSubscribe() {
				delete(want, name)
			}
			if len(want) == 0 {
				break
			}
			var err error
			if req, err = s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); requests != 3 || took != 2*subscribeInterval {
			t.Errorf("%d requests in %v", requests, took)
		}
		for i := range 100 {
			r.names.Add(fmt.Sprint(i))
			time.Sleep(10 * time.Millisecond)
		}
		_ = stop()
		for requests = 0; ; requests++ {
			if _, err := s.Recv(); err != nil {
				break
			}
		}
		if requests > 6 {
			t.Errorf("%d requests in a second", requests)
		}
	})
}

// What is not subscribed to by name is nobody's, whoever is in it.
func TestNamesTakeNoOthersResource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := newNodeRig(t, "a:1")
		r.ca.ID = identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/admin")
		r.names.Add("one")
		stop := r.follow(c)
		s := <-r.streams
		r.send(s, "n1", 1, "One", "one ", "*", "")
		if err := s.Answer("n1"); err != nil {
			t.Error(err)
		}
		_ = stop()
		r.want("applied", r.applied)
		if len(r.watch.versions) != 0 {
			t.Errorf("versions %v", r.watch.versions)
		}
	})
}

func TestReadClaims(t *testing.T) {
	for name, tt := range map[string]struct{ token, says string }{
		"no JWT":    {"secret", "not a JWT"},
		"long":      {strings.Repeat("a", 9<<10) + ".e30.e30", "not a JWT"},
		"no base64": {"e30.!secret.e30", "cannot be read"},
		"no JSON":   {"e30.c2VjcmV0.e30", "cannot be read"},
	} {
		if _, err := ReadClaims(tt.token); err == nil || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// One workload's call that is not answered in time ends neither another's, which
// is in flight on the same connection, nor the stream.
func TestSharedClientsCallersDoNotEndEachOthersCalls(t *testing.T) {
	for _, shared := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			r, c := newNodeRig(t, "a:1")
			c.conf.Shared = shared
			r.ca.OnSign = func(token string, req *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
				if token == "slow" {
					time.Sleep(time.Minute)
				}
				time.Sleep(4 * time.Second)
				return r.ca.Sign(req)
			}
			r.names.Add("one")
			stop := r.follow(c)
			s := <-r.streams
			sign := func(who string) <-chan error {
				done := make(chan error, 1)
				req := request(t)
				req.Token = token(who)
				go func() { done <- c.Sign(t.Context(), req) }()
				return done
			}
			slow := sign("slow")
			time.Sleep(3 * time.Second)
			quick := sign("quick")
			if err := <-slow; !isTimeout(err) {
				t.Errorf("the slow one: %v", err)
			}
			err := <-quick
			asked := len(slices.DeleteFunc(r.ca.Tokens(), func(token string) bool { return token != "quick" }))
			if err != nil || (asked == 1) != shared {
				t.Errorf("shared %v: the other one: %v, asked %d times", shared, err, asked)
			}
			if ended := s.Context().Err() != nil; ended == shared {
				t.Errorf("shared %v: the stream has ended: %v", shared, ended)
			}
			_ = stop()
			time.Sleep(time.Minute) // until the CA has done with the slow one
		})
	}
}
