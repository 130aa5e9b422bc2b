package ca_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
)

func TestT16_KeyIsRefusedBeforeAnythingIsRecorded(t *testing.T) {
	trail := &trail{}
	a, who := withTrail(t, trail)
	key, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	check(t, err)
	before := trail.count()
	_, err = a.Issue(t.Context(), who, key.Public(), 0)
	var refused *ca.KeyError
	if !errors.As(err, &refused) || refused.Kind != "ECDSA P-224" {
		t.Fatalf("error %v, want a KeyError", err)
	}
	if trail.count() != before {
		t.Error("a record was written")
	}
}

// trail is an audit trail in memory that can fail.
type trail struct {
	mu     sync.Mutex
	events []ca.Event
	fail   ca.Stage
	hook   func(ca.Event)
}

func (r *trail) Record(_ context.Context, e ca.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hook != nil {
		r.hook(e)
	}
	if e.Stage == r.fail {
		return errors.New("sink is gone")
	}
	r.events = append(r.events, e)
	return nil
}

func (r *trail) failAt(s ca.Stage) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fail = s
}

func (r *trail) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.events)
}

// since returns the records after the first n.
func (r *trail) since(n int) []ca.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events[n:])
}

// withTrail runs a second authority over a Kit's root, with a trail in memory.
func withTrail(t testing.TB, r *trail) (*ca.Authority, *caller.Caller) {
	t.Helper()
	k := catest.New(t)
	a, err := ca.New(ca.Config{TrustDomain: k.TrustDomain, Upstream: k.Upstream, Audit: r})
	check(t, err)
	_, changed := a.Bundle()
	start(t, a)
	<-changed
	return a, k.Caller(t, "shop", "cart")
}

// start runs an authority until the test ends.
func start(t testing.TB, a *ca.Authority) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = a.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
}

func TestEachSignatureIsRecordedTwice(t *testing.T) {
	r := &trail{}
	a, who := withTrail(t, r)
	n := r.count()
	pub := catest.NewKey(t).Public()
	issued, err := a.Issue(t.Context(), who, pub, 20*time.Minute)
	check(t, err)
	events := r.since(n)
	if len(events) != 2 || events[0].Stage != ca.Intent || events[1].Stage != ca.Done {
		t.Fatalf("records %+v, want intent and done", events)
	}
	for _, e := range events {
		if e.Kind != ca.KindSVID || e.SPIFFEID != cart || e.Caller != who || e.Lifetime != 20*time.Minute ||
			e.Serial != identity.SerialString(issued.Chain[0]) || !e.NotAfter.Equal(issued.Chain[0].NotAfter) ||
			e.Authority != hex.EncodeToString(issued.Chain[1].SubjectKeyId) || len(e.Key) != 64 || e.Time.IsZero() {
			t.Errorf("record %+v does not tell of serial %x", e, issued.Chain[0].SerialNumber)
		}
	}
	// The intermediate and its proof were recorded in the same way.
	var kinds []string
	for _, e := range r.since(0)[:4] {
		kinds = append(kinds, string(e.Kind)+" "+string(e.Stage))
	}
	if want := []string{"intermediate intent", "intermediate done", "proof intent", "proof done"}; !slices.Equal(kinds, want) {
		t.Errorf("first records %q, want %q", kinds, want)
	}
}

func TestV47_NoRecordNoCertificate(t *testing.T) {
	r := &trail{}
	a, who := withTrail(t, r)
	pub := catest.NewKey(t).Public()
	for _, stage := range []ca.Stage{ca.Intent, ca.Done} {
		r.failAt(stage)
		n := r.count()
		issued, err := a.Issue(t.Context(), who, pub, 0)
		var unaudited *ca.AuditError
		if !errors.As(err, &unaudited) || unaudited.Stage != stage || issued != nil {
			t.Errorf("sink failing at %s: %v, %v", stage, issued, err)
		}
		// A sink that takes no intent must see no signature after it.
		if got, want := len(r.since(n)), map[ca.Stage]int{ca.Intent: 0, ca.Done: 1}[stage]; got != want {
			t.Errorf("sink failing at %s: %d records were written, want %d", stage, got, want)
		}
		if chain, err := a.IssueServing(t.Context(), ca.ServingNames{DNS: []string{"a.test"}}, pub); err == nil || chain != nil {
			t.Errorf("sink failing at %s: a serving certificate left", stage)
		}
	}
	r.failAt("")
	_, err := a.Issue(t.Context(), who, pub, 0)
	check(t, err)
}

func TestIssueStopsForACallerWhoIsGone(t *testing.T) {
	r := &trail{}
	a, who := withTrail(t, r)
	n := r.count()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Issue(ctx, who, catest.NewKey(t).Public(), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if r.count() != n {
		t.Error("something was signed for nobody")
	}
}
