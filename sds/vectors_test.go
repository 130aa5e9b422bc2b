package sds

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/meshca/meshca/identity"
)

// A federated domain that is gone is gone for who asked for it by name, said
// once, and for who asked for all.
func TestV26_FederatedDomainVanishes(t *testing.T) {
	m := newMaterial(t)
	s := m.state()
	s.Federated = []*identity.Bundle{newBundle(t, m.partner, 4)}
	v := mustView(t, emptyView(), s)
	var d delta
	d.take(t, subscribe("ALL", "ROOTCA", "spiffe://partner.test"))
	sent, removed := deltaNames(&d, v)
	expect(t, "delta", sent, "ALL", "ROOTCA", "spiffe://partner.test")
	expect(t, "delta, removed", removed)
	var x sotw
	x.take(t, sotwRequest("", "ALL", "spiffe://partner.test"))
	expect(t, "state of the world", sotwNames(&x, v), "ALL", "spiffe://partner.test")

	v = mustView(t, v, m.state())
	sent, removed = deltaNames(&d, v)
	expect(t, "delta, afterwards", sent, "ALL")
	expect(t, "delta, afterwards, removed", removed, "spiffe://partner.test")
	if resp, _ := d.respond(v); resp != nil {
		t.Errorf("it was said twice: %v", resp)
	}
	expect(t, "state of the world, afterwards", sotwNames(&x, v), "ALL")
	if domains := validatorOf(t, secretOf(t, v, "ALL")); len(domains) != 1 || domains["example.org"] == nil {
		t.Errorf("ALL still holds %d domains", len(domains))
	}

	s.Federated = []*identity.Bundle{newBundle(t, m.partner, 4)} // and is back
	sent, removed = deltaNames(&d, mustView(t, v, s))
	expect(t, "delta, back", sent, "ALL", "spiffe://partner.test")
	expect(t, "delta, back, removed", removed)
}

// What a client says of the time before its stream decides nothing: neither a
// version nor a nonce nor an error of an earlier stream keeps anything from it.
func TestVersionsOfEarlierStreamsAreNotBelieved(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	for _, version := range []string{"1", "18446744073709551615", "-1", "x"} {
		var x sotw
		r := sotwRequest("1", "default", "ROOTCA")
		r.VersionInfo, r.ErrorDetail = version, &rpcstatus.Status{Code: 13, Message: "of an earlier stream"}
		if out := x.take(t, r); out.result != "" {
			t.Errorf("version %q: a first request counted as %+v", version, out)
		}
		expect(t, "state of the world, version "+version, sotwNames(&x, v), "ROOTCA", "default")
		again := sotwRequest("1", "default", "ROOTCA")
		again.VersionInfo = version
		x.take(t, again)
		expect(t, "state of the world, the ACK", sotwNames(&x, v))

		var d delta
		first := subscribe("default", "ROOTCA")
		first.InitialResourceVersions = map[string]string{"default": version, "ROOTCA": version, "spiffe://other.test": version}
		d.take(t, first)
		sent, removed := deltaNames(&d, v)
		expect(t, "delta, version "+version, sent, "ROOTCA", "default")
		expect(t, "delta, removed", removed)
	}
}

// One name many times is one name: in an answer, and in what is counted.
func TestDuplicateNamesAreOne(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	names := make([]string, 10*maxNames)
	for i := range names {
		names[i] = "default"
	}
	var x sotw
	x.take(t, sotwRequest("", names...))
	expect(t, "state of the world", sotwNames(&x, v), "default")
	var d delta
	d.take(t, subscribe(names...))
	sent, _ := deltaNames(&d, v)
	expect(t, "delta", sent, "default")
	d.take(t, &discovery.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: names})
	if len(d.held) != 0 || d.bytes != 0 {
		t.Errorf("%d names and %d bytes are held", len(d.held), d.bytes)
	}
	both := subscribe("default") // leaves and comes back in one request
	both.ResourceNamesUnsubscribe = []string{"default"}
	d.take(t, both)
	sent, _ = deltaNames(&d, v)
	expect(t, "delta, both in one", sent, "default")
}

// Subscribing and unsubscribing leaves nothing behind, and is no way around the
// bound on names.
func TestV12_SubscriptionChurn(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	var d delta
	for i := range 20_000 {
		name := fmt.Sprint("name-", i)
		if i%3 == 0 {
			name = "default"
		}
		d.take(t, subscribe(name))
		d.respond(v)
		d.take(t, &discovery.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{name}})
		if resp, _ := d.respond(v); resp != nil {
			t.Fatalf("an unsubscription was answered: %v", resp)
		}
	}
	if len(d.held) != 0 || d.bytes != 0 || len(d.waiting) > maxOutstanding {
		t.Errorf("%d names, %d bytes and %d responses are held", len(d.held), d.bytes, len(d.waiting))
	}
	var x sotw
	for i := range 2000 { // each request is the whole
		x.take(t, sotwRequest("", fmt.Sprint("name-", i), "default"))
		x.respond(v)
	}
	if len(x.held) != 2 || len(x.waiting) > maxOutstanding {
		t.Errorf("%d names and %d responses are held", len(x.held), len(x.waiting))
	}
}

// Wherever in its exchange a stream breaks off, the next one gets everything,
// and nothing of the first is left.
func TestL5_StreamsResetAtEachMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t, func(c *Config) { c.Log = discard() })
		s := k.ready()
		renew := func() {
			s.SVID = k.svid()
			k.feed.Publish(s)
		}
		problem := &rpcstatus.Status{Code: 13, Message: "no"}
		for steps := range 6 {
			ctx, cancel := context.WithCancel(inTime(t))
			x, d, w := k.sotw(ctx), k.delta(ctx), k.fetchSVID(ctx)
			nack := sotwRequest("2", "default", "ROOTCA")
			nack.ErrorDetail = problem
			for _, step := range []func(){
				func() {
					sendSotW(t, x, sotwRequest("", "default", "ROOTCA"))
					must(t, d.Send(subscribe("default", "ROOTCA", "nope")))
				},
				func() { recv(t, x); recv(t, d); recv(t, w) },
				func() {
					sendSotW(t, x, sotwRequest("1", "default", "ROOTCA"))
					must(t, d.Send(&discovery.DeltaDiscoveryRequest{ResponseNonce: "1"}))
				},
				func() { renew(); recv(t, x); recv(t, d); recv(t, w) },
				func() {
					sendSotW(t, x, nack)
					must(t, d.Send(&discovery.DeltaDiscoveryRequest{ResponseNonce: "2", ErrorDetail: problem}))
				},
			}[:steps] {
				step()
			}
			cancel()
			synctest.Wait()
			for _, kind := range []string{"sds_sotw", "sds_delta", "x509_svid"} {
				if n := k.metric("meshca_sds_streams", kind); n != 0 {
					t.Errorf("after %d steps %v streams of kind %s are left", steps, n, kind)
				}
			}
			ctx, cancel = context.WithCancel(inTime(t))
			x, d, w = k.sotw(ctx), k.delta(ctx), k.fetchSVID(ctx)
			sendSotW(t, x, sotwRequest("2", "default", "ROOTCA"))
			must(t, d.Send(subscribe("default", "ROOTCA")))
			if n, m := len(recv(t, x).GetResources()), len(recv(t, d).GetResources()); n != 2 || m != 2 {
				t.Errorf("after %d steps a new stream gets %d and %d secrets", steps, n, m)
			}
			if got := recv(t, w).GetSvids(); len(got) != 1 {
				t.Errorf("after %d steps a new call gets %d SVIDs", steps, len(got))
			}
			cancel()
			synctest.Wait()
		}
		if n := len(k.server.Consumers()); n != 0 {
			t.Errorf("%d records are left", n)
		}
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
