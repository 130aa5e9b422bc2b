package sds

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func sotwRequest(nonce string, names ...string) *discovery.DiscoveryRequest {
	return &discovery.DiscoveryRequest{TypeUrl: secretType, ResponseNonce: nonce, ResourceNames: names}
}

func subscribe(names ...string) *discovery.DeltaDiscoveryRequest {
	return &discovery.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: names}
}

func (x *sotw) take(t testing.TB, r *discovery.DiscoveryRequest) outcome {
	t.Helper()
	out, err := x.request(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (x *delta) take(t testing.TB, r *discovery.DeltaDiscoveryRequest) outcome {
	t.Helper()
	out, err := x.request(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// sotwNames returns the names of the secrets that x sends for v.
func sotwNames(x *sotw, v *view) []string {
	_, d := x.respond(v)
	return d.names
}

func deltaNames(x *delta, v *view) (sent, removed []string) {
	resp, d := x.respond(v)
	return d.names, resp.GetRemovedResources()
}

func expect(t testing.TB, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

// Another workload's names, and names that nobody has, are left out or
// answered as removed; both alike, and the known names are not held up.
func TestV26_OnlyTheOwnNames(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	names := []string{payID, "spiffe://partner.test", "kubernetes://tls", "file-root:system", "", cartID}

	var x sotw
	x.take(t, sotwRequest("", names...))
	expect(t, "state of the world", sotwNames(&x, v), cartID)

	var d delta
	d.take(t, subscribe(names...))
	sent, removed := deltaNames(&d, v)
	expect(t, "delta", sent, cartID)
	expect(t, "delta, removed", removed, "", "file-root:system", "kubernetes://tls", payID, "spiffe://partner.test")
	if resp, _ := d.respond(v); resp != nil {
		t.Errorf("the same was said twice: %v", resp)
	}
}

func TestWildcardIsNothing(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	for _, names := range [][]string{nil, {"*"}} {
		var x sotw
		x.take(t, sotwRequest("", names...))
		expect(t, "state of the world", sotwNames(&x, v))
		var d delta
		d.take(t, subscribe(names...))
		if resp, _ := d.respond(v); resp != nil {
			t.Errorf("delta wildcard %q was answered: %v", names, resp)
		}
	}
}

func TestNamesWaitForWhatDecidesThem(t *testing.T) {
	m := newMaterial(t)
	var d delta
	d.take(t, subscribe("default", "ROOTCA", "ALL", cartID, payID, "spiffe://example.org", "spiffe://other.test", "nope"))
	v := emptyView()
	sent, removed := deltaNames(&d, v)
	expect(t, "before anything is known", sent)
	expect(t, "before anything is known, removed", removed, "nope")

	v = mustView(t, v, State{Bundle: m.bundle})
	sent, removed = deltaNames(&d, v)
	expect(t, "with a bundle", sent, "ALL", "ROOTCA", "spiffe://example.org")
	expect(t, "with a bundle, removed", removed, "spiffe://other.test")

	sent, removed = deltaNames(&d, mustView(t, v, m.state()))
	expect(t, "with an SVID", sent, "default", cartID)
	expect(t, "with an SVID, removed", removed, payID)
}

func TestIDChanges(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	var d delta
	d.take(t, subscribe("default", cartID, payID))
	d.respond(v)
	var x sotw
	x.take(t, sotwRequest("", "default", cartID, payID))
	x.respond(v)

	s := m.state()
	s.SVID = m.ca.SVID(t, mustID(t, payID))
	v = mustView(t, v, s)
	sent, removed := deltaNames(&d, v)
	expect(t, "delta", sent, "default", payID)
	expect(t, "delta, removed", removed, cartID)
	expect(t, "state of the world", sotwNames(&x, v), "default", payID)

	v = mustView(t, v, m.state())
	sent, removed = deltaNames(&d, v)
	expect(t, "delta, back", sent, "default", cartID)
	expect(t, "delta, back, removed", removed, payID)
	expect(t, "state of the world, back", sotwNames(&x, v), "default", cartID)
}

func TestSotWAnswersOnlyWhatIsNew(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	var x sotw
	x.take(t, sotwRequest("", "default", "default", "ROOTCA"))
	resp, d := x.respond(v)
	expect(t, "duplicate names", d.names, "ROOTCA", "default")
	if resp.GetNonce() != "1" || resp.GetVersionInfo() != "1" || resp.GetTypeUrl() != secretType {
		t.Errorf("nonce %q, version %q, type %q", resp.GetNonce(), resp.GetVersionInfo(), resp.GetTypeUrl())
	}
	if out := x.take(t, sotwRequest("1", "default", "ROOTCA")); out.result != resultAcknowledged || out.sequence != 1 {
		t.Errorf("ACK taken as %+v", out)
	}
	expect(t, "after the ACK", sotwNames(&x, v))

	if out := x.take(t, sotwRequest("1", "default", "ROOTCA", "ALL")); out.result != "" {
		t.Errorf("a changed subscription counted as %+v", out)
	}
	expect(t, "one name more", sotwNames(&x, v), "ALL")
	x.take(t, sotwRequest("2", "ALL"))
	expect(t, "names fewer", sotwNames(&x, v))
	x.take(t, sotwRequest("2", "ALL", "default"))
	expect(t, "a name back", sotwNames(&x, v), "default")
	x.take(t, sotwRequest("3"))
	expect(t, "no name left", sotwNames(&x, mustView(t, v, State{SVID: m.ca.SVID(t, mustID(t, cartID)), Bundle: m.bundle})))
}

func TestSotWStaleNonceIsIgnored(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	var x sotw
	x.take(t, sotwRequest("77", "default")) // of an earlier stream
	expect(t, "a first request with a nonce", sotwNames(&x, v), "default")
	v = mustView(t, v, State{SVID: m.ca.SVID(t, mustID(t, cartID)), Bundle: m.bundle})
	expect(t, "a renewal before the ACK", sotwNames(&x, v), "default")

	// The verdict on the response before the last counts, once; its names do not.
	for _, want := range []result{resultAcknowledged, resultStale} {
		if out := x.take(t, sotwRequest("1", "ROOTCA")); out.result != want {
			t.Errorf("an answer to the response before the last counted as %+v, want %s", out, want)
		}
	}
	expect(t, "names of a stale request", sotwNames(&x, v))
	if out := x.take(t, sotwRequest("2", "default")); out.result != resultAcknowledged {
		t.Errorf("the answer to the last response counted as %+v", out)
	}
}

func TestRejectedIsNotSentAgain(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	problem := &rpcstatus.Status{Code: 13, Message: "bad certificate"}
	var x sotw
	x.take(t, sotwRequest("", "default"))
	x.respond(v)
	nack := sotwRequest("1", "default")
	nack.ErrorDetail = problem
	if out := x.take(t, nack); out.result != resultRejected || out.detail.GetMessage() != "bad certificate" {
		t.Errorf("NACK taken as %+v", out)
	}
	expect(t, "state of the world, after a NACK", sotwNames(&x, v))

	var d delta
	d.take(t, subscribe("default"))
	d.respond(v)
	if out := d.take(t, &discovery.DeltaDiscoveryRequest{ResponseNonce: "1", ErrorDetail: problem}); out.result != resultRejected {
		t.Errorf("NACK taken as %+v", out)
	}
	sent, _ := deltaNames(&d, v)
	expect(t, "delta, after a NACK", sent)

	next := mustView(t, v, State{SVID: m.ca.SVID(t, mustID(t, cartID)), Bundle: m.bundle})
	sent, _ = deltaNames(&d, next)
	expect(t, "delta, the next change", sent, "default")
	expect(t, "state of the world, the next change", sotwNames(&x, next), "default")
}

func TestDeltaSubscriptions(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	var d delta
	first := subscribe("default", "ROOTCA")
	// An earlier process of the agent used the same numbers for other content.
	first.InitialResourceVersions = map[string]string{"default": "1", "ROOTCA": "1"}
	d.take(t, first)
	sent, _ := deltaNames(&d, v)
	expect(t, "with initial_resource_versions", sent, "ROOTCA", "default")

	if out := d.take(t, &discovery.DeltaDiscoveryRequest{ResponseNonce: "1"}); out.result != resultAcknowledged || out.sequence != 1 {
		t.Errorf("ACK taken as %+v", out)
	}
	if out := d.take(t, &discovery.DeltaDiscoveryRequest{ResponseNonce: "1"}); out.result != resultStale {
		t.Errorf("a second ACK taken as %+v", out)
	}
	d.take(t, subscribe("default"))
	sent, _ = deltaNames(&d, v)
	expect(t, "subscribed again", sent, "default")

	d.take(t, &discovery.DeltaDiscoveryRequest{ResponseNonce: "99", ResourceNamesUnsubscribe: []string{"default", "never there"}})
	v = mustView(t, v, State{SVID: m.ca.SVID(t, mustID(t, cartID)), Bundle: m.bundle})
	sent, _ = deltaNames(&d, v)
	expect(t, "unsubscribed, under a stale nonce", sent)
	if d.bytes != len("ROOTCA") {
		t.Errorf("%d bytes of names are counted", d.bytes)
	}
}

func TestSubscriptionsAreBounded(t *testing.T) {
	many := make([]string, 10_000)
	for i := range many {
		many[i] = fmt.Sprint("name-", i)
	}
	long := []string{strings.Repeat("x", maxNameBytes), "y"}
	for name, names := range map[string][]string{"10000 names": many, "64 KiB of names": long} {
		if _, err := new(sotw).request(sotwRequest("", names...)); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("state of the world, %s: %v", name, err)
		}
		var d delta
		var err error
		for chunk := range slices.Chunk(names, 500) { // over many messages
			if _, err = d.request(subscribe(chunk...)); err != nil {
				break
			}
		}
		if status.Code(err) != codes.ResourceExhausted || len(d.held) > maxNames+1 {
			t.Errorf("delta, %s: %v with %d names", name, err, len(d.held))
		}
	}
	var d delta
	for range 10 * maxOutstanding { // a client that asks again and never answers
		d.take(t, subscribe("nope"))
		d.respond(emptyView())
	}
	if len(d.waiting) != maxOutstanding {
		t.Errorf("%d responses are remembered", len(d.waiting))
	}
}

func TestOtherTypesAreRefused(t *testing.T) {
	const other = "type.googleapis.com/envoy.config.listener.v3.Listener"
	if _, err := new(sotw).request(&discovery.DiscoveryRequest{TypeUrl: other}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("state of the world: %v", err)
	}
	if _, err := new(delta).request(&discovery.DeltaDiscoveryRequest{TypeUrl: other}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("delta: %v", err)
	}
}

// fuzzViews are the views that a fuzzed conversation goes through.
func fuzzViews(f *testing.F) []*view {
	m := newMaterial(f)
	views := []*view{emptyView()}
	other := m.state()
	other.SVID = m.ca.SVID(f, mustID(f, payID))
	for _, s := range []State{{Bundle: m.bundle}, m.state(), {SVID: m.svid}, other} {
		views = append(views, mustView(f, views[len(views)-1], s))
	}
	return views
}

// split cuts fuzzed bytes into messages: one byte of length, then that many.
func split(data []byte) (messages [][]byte) {
	for len(data) > 0 && len(messages) < 32 {
		n := min(int(data[0]), len(data)-1)
		messages = append(messages, data[1:1+n])
		data = data[1+n:]
	}
	return messages
}

func seed(f *testing.F, messages ...proto.Message) {
	f.Helper()
	var data []byte
	for _, m := range messages {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		data = append(append(data, byte(len(raw))), raw...)
	}
	f.Add(data)
}

func FuzzStateOfTheWorld(f *testing.F) {
	views := fuzzViews(f)
	seed(f, sotwRequest("", "default"), sotwRequest("1", "default", "ROOTCA"), sotwRequest("9", "ALL"))
	seed(f, sotwRequest("", cartID, payID, "*", ""), &discovery.DiscoveryRequest{ResponseNonce: "1", ErrorDetail: &rpcstatus.Status{Code: 3}})
	f.Fuzz(func(t *testing.T, data []byte) {
		var x sotw
		for i, raw := range split(data) {
			var r discovery.DiscoveryRequest
			if proto.Unmarshal(raw, &r) != nil {
				continue
			}
			if _, err := x.request(&r); err != nil {
				return
			}
			v := views[i%len(views)]
			resp, _ := x.respond(v)
			for _, res := range resp.GetResources() {
				checkSecret(t, v, x.held, res.GetValue())
			}
			if again, _ := x.respond(v); again != nil {
				t.Fatal("the same view was sent twice")
			}
		}
	})
}

func FuzzDelta(f *testing.F) {
	views := fuzzViews(f)
	seed(f, subscribe("default", "nope"), &discovery.DeltaDiscoveryRequest{ResponseNonce: "1"}, subscribe("ALL", cartID))
	seed(f, subscribe(payID), &discovery.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{payID}, ResourceNamesSubscribe: []string{payID}})
	f.Fuzz(func(t *testing.T, data []byte) {
		var x delta
		for i, raw := range split(data) {
			var r discovery.DeltaDiscoveryRequest
			if proto.Unmarshal(raw, &r) != nil {
				continue
			}
			if _, err := x.request(&r); err != nil {
				return
			}
			v := views[i%len(views)]
			resp, _ := x.respond(v)
			for _, res := range resp.GetResources() {
				checkSecret(t, v, x.held, res.GetResource().GetValue())
			}
			for _, name := range resp.GetRemovedResources() {
				if v.resources[name] != nil {
					t.Fatalf("%q is there and was removed", name)
				}
			}
			if again, _ := x.respond(v); again != nil {
				t.Fatal("the same view was sent twice")
			}
			var bytes int
			for name := range x.held {
				bytes += len(name)
			}
			if bytes != x.bytes {
				t.Fatalf("%d bytes of names are counted, there are %d", x.bytes, bytes)
			}
		}
	})
}

// checkSecret makes sure that a secret was asked for by its name, and is of
// this view.
func checkSecret(t *testing.T, v *view, held map[string]uint64, raw []byte) {
	t.Helper()
	for name, r := range v.resources {
		if string(r.wire.GetResource().GetValue()) == string(raw) {
			if _, asked := held[name]; !asked {
				t.Fatalf("%q was sent to somebody who did not ask for it", name)
			}
			return
		}
	}
	t.Fatal("a secret that the view does not hold was sent")
}
