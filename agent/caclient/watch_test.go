package caclient

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/wire"
	"github.com/meshca/meshca/wire/meshcav1"
)

// collect is a Watch that takes everything and remembers it.
func collect(into *[]wire.Workload) *Watch {
	return &Watch{Token: token(canary), Apply: func(_ string, w wire.Workload) error { *into = append(*into, w); return nil }}
}

func TestWatchAcknowledgesAndResumesFromItsVersions(t *testing.T) {
	ca := newCA(t)
	var firsts []*discovery.DeltaDiscoveryRequest
	acked := make(chan error, 10)
	ca.OnStream = func(s *caclienttest.Stream) error {
		firsts = append(firsts, s.First)
		if len(firsts) > 1 {
			return nil
		}
		for _, nonce := range []string{"7-aa", "8-bb"} {
			if err := s.SendWorkload(nonce, ca.Workload(uint64(nonce[0]-'0'))); err != nil {
				return err
			}
			acked <- s.Answer(nonce)
		}
		return nil // in good order
	}
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	c := newClient(t, ca, n, "a:1")
	var got []wire.Workload
	var connected []bool
	w := collect(&got)
	w.Connected = func(is bool) { connected = append(connected, is) }
	for range 2 {
		if err := c.Watch(t.Context(), w); err != nil {
			t.Fatalf("a stream that ended in good order: %v", err)
		}
	}
	for range 2 {
		if err := <-acked; err != nil {
			t.Errorf("not acknowledged: %v", err)
		}
	}
	if len(got) != 2 || got[0].Bundle.Sequence() != 7 || got[1].Bundle.Sequence() != 8 || got[0].ID != ca.ID || !got[0].RenewAt.IsZero() {
		t.Errorf("got %+v", got)
	}
	if fmt.Sprint(connected) != "[true false true false]" {
		t.Errorf("connected: %v", connected)
	}
	first, second := firsts[0], firsts[1]
	if first.GetTypeUrl() != wire.TypeURL || fmt.Sprint(first.GetResourceNamesSubscribe()) != "[*]" || len(first.GetInitialResourceVersions()) != 0 {
		t.Errorf("first request: %v", first)
	}
	if v := second.GetInitialResourceVersions(); len(v) != 1 || v[caclienttest.Resource] != "8-bb" {
		t.Errorf("second stream resumes from %v", v)
	}
	if tokens := ca.Tokens(); len(tokens) != 2 || tokens[1] != canary {
		t.Errorf("tokens %q", tokens)
	}
}

func TestWatchRemovedResource(t *testing.T) {
	ca := newCA(t)
	streams := 0
	ca.OnStream = func(s *caclienttest.Stream) error {
		if streams++; streams == 2 {
			if len(s.First.GetInitialResourceVersions()) != 0 {
				return status.Error(codes.Internal, "the removed resource is claimed")
			}
			return nil
		}
		if err := errors.Join(s.SendWorkload("1", ca.Workload(1)), s.Answer("1")); err != nil {
			return err
		}
		err := s.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: wire.TypeURL, Nonce: "2", RemovedResources: []string{caclienttest.Resource}})
		return errors.Join(err, s.Answer("2"))
	}
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	c := newClient(t, ca, n, "a:1")
	var got []wire.Workload
	var removed []string
	w := collect(&got)
	w.Removed = func(name string) { removed = append(removed, name) }
	for range 2 {
		if err := c.Watch(t.Context(), w); err != nil {
			t.Fatal(err)
		}
	}
	if len(removed) != 1 || removed[0] != caclienttest.Resource {
		t.Errorf("removed %q", removed)
	}
}

// mustAny packs a message.
func mustAny(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// badWorkloads are the resources that are refused for what they are, whatever is
// held; by name, with what the NACK says.
func badWorkloads(t *testing.T, ca *caclienttest.CA) map[string]struct {
	content *anypb.Any
	says    string
} {
	type bad = struct {
		content *anypb.Any
		says    string
	}
	change := func(f func(*meshcav1.Workload)) *anypb.Any {
		w := ca.Workload(9)
		f(w)
		return mustAny(t, w)
	}
	leaf := ca.SVID(t, ca.ID).Leaf()
	return map[string]bad{
		"nothing":                  {nil, "no content"},
		"another type":             {mustAny(t, timestamppb.Now()), "it is of type"},
		"garbage":                  {&anypb.Any{TypeUrl: wire.TypeURL, Value: []byte{0xff}}, "cannot be decoded"},
		"no ID":                    {change(func(w *meshcav1.Workload) { w.SpiffeId = "" }), "SPIFFE ID"},
		"ID of another domain":     {change(func(w *meshcav1.Workload) { w.SpiffeId = "spiffe://evil/ns/a/sa/b" }), "no workload of trust domain"},
		"the domain's own ID":      {change(func(w *meshcav1.Workload) { w.SpiffeId = "spiffe://cluster.local" }), "no workload of trust domain"},
		"no bundle":                {change(func(w *meshcav1.Workload) { w.Bundle = nil }), `of trust domain "", not "cluster.local"`},
		"bundle of another domain": {change(func(w *meshcav1.Workload) { w.Bundle.TrustDomain = "evil.cluster.local" }), `of trust domain "evil.cluster.local", not "cluster.local"`},
		"no authorities":           {change(func(w *meshcav1.Workload) { w.Bundle.X509Authorities = nil }), "no authorities"},
		"corrupt authority":        {change(func(w *meshcav1.Workload) { w.Bundle.X509Authorities[0] = []byte("x") }), "authority 1"},
		"trailing bytes": {change(func(w *meshcav1.Workload) {
			w.Bundle.X509Authorities[0] = append(bytes.Clone(ca.Root.Certificate.Raw), 0)
		}), "authority 1"},
		"a leaf as authority": {change(func(w *meshcav1.Workload) { w.Bundle.X509Authorities[0] = leaf.Raw }), "is no CA certificate"},
		"a large authority":   {change(func(w *meshcav1.Workload) { w.Bundle.X509Authorities[0] = make([]byte, 17<<10) }), "at most 16384"},
		"many authorities":    {change(func(w *meshcav1.Workload) { w.Bundle.X509Authorities = make([][]byte, 65) }), "at most 64"},
		"impossible hint":     {change(func(w *meshcav1.Workload) { w.RenewAt = &timestamppb.Timestamp{Nanos: -1} }), "renew_at"},
	}
}

func TestF17_BadBundlesAreNackedAndTheNextCAIsAsked(t *testing.T) {
	for name, bad := range badWorkloads(t, newCA(t)) {
		t.Run(name, func(t *testing.T) {
			ca := newCA(t)
			nack := make(chan error, 1)
			ca.OnStream = func(s *caclienttest.Stream) error {
				err := s.Send(&discovery.DeltaDiscoveryResponse{
					TypeUrl: wire.TypeURL, Nonce: "n",
					Resources: []*discovery.Resource{{Name: caclienttest.Resource, Version: "1", Resource: bad.content}},
				})
				nack <- errors.Join(err, s.Answer("n"))
				return s.Drain()
			}
			n := caclienttest.NewNetwork(t)
			ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
			c := newClient(t, ca, n, "a:1", "b:1")
			var got []wire.Workload
			w := collect(&got)
			err := c.Watch(t.Context(), w)
			var refusal *NackError
			if !errors.As(err, &refusal) || refusal.Address != "a:1" {
				t.Errorf("got %v", err)
			}
			if err := <-nack; err == nil || !strings.Contains(err.Error(), bad.says) {
				t.Errorf("the CA was told %v; want %q", err, bad.says)
			}
			if len(got) != 0 || len(w.versions) != 0 {
				t.Errorf("taken over: %v, versions %v", got, w.versions)
			}
			if c.preference() != 1 {
				t.Error("the next round begins at the same CA")
			}
		})
	}
}

func TestF17_BundleOverTheLimitEndsTheStreamOnly(t *testing.T) {
	ca := newCA(t)
	ca.OnStream = func(s *caclienttest.Stream) error {
		w := ca.Workload(1)
		w.Bundle.X509Authorities[0] = make([]byte, 10<<20)
		return errors.Join(s.SendWorkload("1", w), s.Drain())
	}
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	var got []wire.Workload
	var refused *RefusedError
	if err := newClient(t, ca, n, "a:1").Watch(t.Context(), collect(&got)); !errors.As(err, &refused) || refused.Code != codes.ResourceExhausted || len(got) != 0 {
		t.Errorf("got %v, %d resources", err, len(got))
	}
}

// The only CA keeps its stream after a NACK: it may send something better.
func TestNackWithOneAddressKeepsTheStream(t *testing.T) {
	ca := newCA(t)
	ca.OnStream = func(s *caclienttest.Stream) error {
		if err := s.SendWorkload("1", ca.Workload(1)); err != nil {
			return err
		}
		if err := s.Answer("1"); err == nil || !strings.Contains(err.Error(), "do not like 1") {
			return status.Error(codes.Internal, fmt.Sprint("NACK: ", err))
		}
		return errors.Join(s.SendWorkload("2", ca.Workload(2)), s.Answer("2"))
	}
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	w := &Watch{Token: token(canary), Apply: func(_ string, w wire.Workload) error {
		if w.Bundle.Sequence() == 1 {
			return errors.New("do not like 1")
		}
		return nil
	}}
	if err := newClient(t, ca, n, "a:1").Watch(t.Context(), w); err != nil {
		t.Error(err)
	}
	if w.versions[caclienttest.Resource] != "2" {
		t.Errorf("versions %v", w.versions)
	}
}

func TestWatchRefusedByOneCAIsNotAskedOfAll(t *testing.T) {
	ca := newCA(t)
	ca.OnStream = func(*caclienttest.Stream) error { return status.Error(codes.Unauthenticated, "ref 1") }
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	var refused *RefusedError
	err := newClient(t, ca, n, "a:1", "b:1").Watch(t.Context(), collect(new([]wire.Workload)))
	if !errors.As(err, &refused) || refused.Token == "" || len(n.Dials()) != 1 {
		t.Errorf("got %v, dialled %q", err, n.Dials())
	}
}

// A peer that vanishes without a word is noticed by our own pings, 20 s of quiet
// and 10 s of waiting at most.
func TestF68_SilentDropIsFoundIn30s(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		n := caclienttest.NewNetwork(t)
		inner := n.Listen("inner:1")
		ca.Serve(inner, ca.TLS(serverName))
		var cut dropper
		cut.serve(n, "a:1", "inner:1")
		c := newClient(t, ca, n, "a:1")
		var got []wire.Workload
		ended := make(chan error, 1)
		go func() { ended <- c.Watch(t.Context(), collect(&got)) }()
		synctest.Wait()
		if len(got) != 1 {
			t.Fatalf("got %d resources", len(got))
		}
		time.Sleep(time.Hour) // pings keep it up
		synctest.Wait()
		select {
		case err := <-ended:
			t.Fatalf("ended while all was well: %v", err)
		default:
		}
		cut.now()
		began := time.Now()
		if err := <-ended; err == nil {
			t.Error("ended in good order?")
		}
		if took := time.Since(began); took > 30*time.Second {
			t.Errorf("noticed after %v", took)
		}
	})
}

func FuzzParseSigned(f *testing.F) {
	f.Add("", "")
	f.Add("-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n", "x")
	f.Fuzz(func(t *testing.T, leaf, roots string) {
		s, err := parseSigned([]string{leaf, roots})
		if err == nil && (len(s.Chain) != 1 || len(s.Roots) == 0) {
			t.Errorf("taken: %+v", s)
		}
	})
}

func FuzzDescribeToken(f *testing.F) {
	f.Add(canary)
	f.Add("e30.eyJhdWQiOlsidmF1bHQiXSwiZXhwIjoxNzAwMDAwMDAwfQ.c2ln")
	f.Add("e30.eyJhdWQiOiJhXG5iIiwiZXhwIjoxZTMwMH0.")
	f.Fuzz(func(t *testing.T, token string) {
		s := describeToken(token, time.Unix(1.7e9, 0))
		if strings.ContainsAny(s, "\n\r\x00") || len(s) > 2000 {
			t.Errorf("unfit for a log: %q", s)
		}
		if parts := strings.Split(token, "."); len(parts) == 3 && len(parts[2]) > 20 && strings.Contains(s, parts[2]) {
			t.Errorf("holds the signature: %q", s)
		}
	})
}
