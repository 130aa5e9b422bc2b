package ca_test

import (
	"context"
	"crypto"
	"errors"
	"io"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
)

// These tests run in synctest bubbles: time.Sleep moves a clock that all
// goroutines share, and takes no time.

// short are settings under which half of an intermediate's life is 10 min.
func short() []catest.Option {
	return []catest.Option{
		catest.WithLeaf(ca.LeafConfig{Ceiling: 10 * time.Minute}), catest.WithIntermediateLifetime(20 * time.Minute),
	}
}

// tap stands between an authority and its upstream.
type tap struct {
	ca.Upstream
	down  atomic.Bool // answer with an error
	calls atomic.Int32
}

func (u *tap) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	u.calls.Add(1)
	if u.down.Load() {
		return nil, errors.New("connection refused")
	}
	return u.Upstream.SignIntermediate(ctx, req)
}

func (u *tap) option() catest.Option {
	return catest.WithUpstream(func(real ca.Upstream) ca.Upstream { u.Upstream = real; return u })
}

func TestIntermediateIsReplacedAtHalfOfItsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up tap
		k := catest.New(t, append(short(), up.option())...)
		first := k.Authority.Status()
		if d := time.Until(first.RenewAt); d != 10*time.Minute {
			t.Fatalf("renewal in %v", d)
		}
		old := k.SVID(t, "shop", "cart", 0)
		time.Sleep(10*time.Minute - time.Second)
		if s := k.Authority.Status(); !cmp.Equal(s, first) || up.calls.Load() != 1 {
			t.Errorf("before half of its life: %+v, was %+v", s, first)
		}
		time.Sleep(time.Second + time.Millisecond)
		synctest.Wait()
		if s := k.Authority.Status(); s.Authority == first.Authority || up.calls.Load() != 2 {
			t.Errorf("after half of its life: still %+v", s)
		}
		fresh := k.SVID(t, "shop", "cart", 0)
		for name, svid := range map[string]*identity.SVID{"old": old, "new": fresh} {
			now := time.Now()
			if name == "old" {
				now = now.Add(-time.Minute) // it was of 10 min
			}
			if _, err := identity.Verify(svid.Certificates(), identity.Client, k.Authority.Bundles(), now); err != nil {
				t.Errorf("%s SVID: %v", name, err)
			}
		}
		if fresh.Certificates()[1].Equal(old.Certificates()[1]) {
			t.Error("both were signed by one intermediate")
		}
	})
}

// The upstream is away: signing goes on, readiness stays, trouble shows; and
// when it is back the next attempt is at most five minutes off.
// changer is a tap that says when its answer has changed.
type changer struct {
	tap
	mu      sync.Mutex
	channel chan struct{}
	asked   func() // called by each request
}

func (u *changer) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	if u.asked != nil {
		u.asked()
	}
	return u.tap.SignIntermediate(ctx, req)
}

func (u *changer) Changed() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.channel
}

func (u *changer) change() {
	u.mu.Lock()
	defer u.mu.Unlock()
	close(u.channel)
	u.channel = make(chan struct{})
}

func TestUpstreamThatHasChangedIsAskedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &changer{channel: make(chan struct{})}
		k := catest.New(t, append(short(), catest.WithUpstream(func(real ca.Upstream) ca.Upstream { up.Upstream = real; return up }))...)
		expect := func(calls int32, when string) {
			t.Helper()
			synctest.Wait()
			if n := up.calls.Load(); n != calls {
				t.Errorf("%s: asked %d times, want %d", when, n, calls)
			}
		}
		first := k.Authority.Status()
		time.Sleep(time.Minute)
		expect(1, "unchanged")
		up.change()
		expect(2, "changed")
		if k.Authority.Status().Authority == first.Authority {
			t.Error("the old intermediate is in force")
		}
		// A change that cannot be followed is tried again without another one, and a
		// change ends the pause in between.
		up.down.Store(true)
		up.change()
		expect(3, "changed, and away")
		up.change()
		expect(4, "changed while it waits")
		up.down.Store(false)
		time.Sleep(11 * time.Second) // the longest second pause
		expect(5, "back")
		// One more, while the upstream is asked.
		up.asked = sync.OnceFunc(up.change)
		up.change()
		expect(7, "changed meanwhile")
		time.Sleep(5 * time.Minute)
		expect(7, "unchanged")
	})
}

func TestT18_UpstreamAwayIsNoOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up tap
		k := catest.New(t, append(short(), up.option())...)
		end := k.Authority.Status().SignsUntil
		up.down.Store(true)
		time.Sleep(14 * time.Minute) // 4 after the first attempt, 6 before the end
		check(t, k.Authority.Ready())
		issued := issue(t, k, catest.NewKey(t).Public(), 0)
		if got := issued.Chain[0].NotAfter; !got.Equal(end) {
			t.Errorf("the leaf ends at %v, want its issuer's end %v", got, end)
		}
		s := k.Authority.Status()
		if s.UpstreamErr == nil || !strings.Contains(s.UpstreamErr.Error(), "connection refused") || time.Since(s.UpstreamSince) < 3*time.Minute {
			t.Errorf("status %+v does not tell of the upstream", s)
		}
		if !s.SignsUntil.Equal(end) {
			t.Errorf("signs until %v, want %v", s.SignsUntil, end)
		}
		calls := up.calls.Load()
		if calls < 3 || calls > 100 {
			t.Errorf("%d attempts in 4 min", calls)
		}
		up.down.Store(false)
		time.Sleep(5*time.Minute + time.Second)
		if s := k.Authority.Status(); s.UpstreamErr != nil || !s.SignsUntil.After(end) {
			t.Errorf("5 min after its return: %+v", s)
		}
	})
}

// F20: to the end, never beyond it, with the reason; and it heals by itself.
func TestF20_NothingIsSignedPastTheIssuer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up tap
		k := catest.New(t, append(short(), up.option())...)
		up.down.Store(true)
		time.Sleep(20*time.Minute - 151*time.Second) // lifetime/4 of 10 min is 150 s
		issue(t, k, catest.NewKey(t).Public(), 0)
		check(t, k.Authority.Ready())
		time.Sleep(2 * time.Second)
		who := k.Caller(t, "shop", "cart")
		_, err := k.Authority.Issue(t.Context(), who, catest.NewKey(t).Public(), 0)
		var short *ca.LifetimeError
		if !errors.As(err, &short) || short.Left != 149*time.Second || short.Least != 150*time.Second {
			t.Errorf("issuing with 149 s left: %v", err)
		}
		var notReady *ca.NotReadyError
		if err := k.Authority.Ready(); !errors.As(err, &notReady) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("Ready says %v, want the upstream's error", err)
		}
		// One that is shorter still fits.
		issued, err := k.Authority.Issue(t.Context(), who, catest.NewKey(t).Public(), 5*time.Minute)
		check(t, err)
		if issued.Chain[0].NotAfter.After(issued.Chain[1].NotAfter) {
			t.Error("the leaf outlives its issuer")
		}
		time.Sleep(time.Hour)
		if _, err := k.Authority.Issue(t.Context(), k.Caller(t, "shop", "cart"), catest.NewKey(t).Public(), 0); !errors.As(err, &short) {
			t.Errorf("issuing after the end: %v", err)
		}
		up.down.Store(false)
		time.Sleep(5*time.Minute + time.Second)
		check(t, k.Authority.Ready())
		issue(t, k, catest.NewKey(t).Public(), 0)
	})
}

func TestF71_StartWithoutUpstreamIsNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up tap
		up.down.Store(true)
		k := catest.New(t, up.option(), catest.WithoutWaiting())
		err := k.Authority.Ready()
		synctest.Wait()
		var notReady *ca.NotReadyError
		if !errors.As(err, &notReady) {
			t.Errorf("before the first attempt: %v", err)
		}
		if err := k.Authority.Ready(); !errors.As(err, &notReady) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("after it: %v", err)
		}
		who := k.Caller(t, "shop", "cart")
		if _, err := k.Authority.Issue(t.Context(), who, catest.NewKey(t).Public(), 0); !errors.As(err, &notReady) {
			t.Errorf("issuing: %v", err)
		}
		up.down.Store(false)
		time.Sleep(6 * time.Second)
		check(t, k.Authority.Ready())
	})
}

// slowKey blocks or fails when told to.
type slowKey struct {
	crypto.Signer
	gate atomic.Pointer[chan struct{}]
	err  atomic.Pointer[error]
}

func (s *slowKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if g := s.gate.Load(); g != nil {
		<-*g
	}
	if err := s.err.Load(); err != nil {
		return nil, *err
	}
	return s.Signer.Sign(r, digest, opts)
}

// withKey runs an authority whose intermediate has the given key.
func withKey(t *testing.T, key crypto.Signer, r *trail) (*ca.Authority, *catest.Kit) {
	t.Helper()
	k := catest.New(t)
	a, err := ca.New(ca.Config{TrustDomain: k.TrustDomain, Upstream: k.Upstream, Audit: r})
	check(t, err)
	a.SetNewKey(func() (crypto.Signer, error) { return key, nil })
	start(t, a)
	synctest.Wait()
	check(t, a.Ready())
	return a, k
}

func TestF16_T18_ReadinessNeverWaitsForTheSigner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := &slowKey{Signer: catest.NewKey(t)}
		a, _ := withKey(t, key, &trail{})
		gate := make(chan struct{})
		key.gate.Store(&gate)
		time.Sleep(30*time.Second + 2*time.Second) // the next proof hangs
		asked := time.Now()
		err := a.Ready()
		if waited := time.Since(asked); waited != 0 {
			t.Errorf("Ready waited %v", waited)
		}
		if err == nil || !strings.Contains(err.Error(), "signing has been blocked for 2s") {
			t.Errorf("Ready says %v", err)
		}
		time.Sleep(30 * time.Second)
		if err := a.Ready(); err == nil {
			t.Error("ready while the signer hangs")
		}
		key.gate.Store(nil)
		close(gate)
		synctest.Wait()
		check(t, a.Ready())
	})
}

func TestT18_FailingProofShowsAndHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &trail{}
		key := &slowKey{Signer: catest.NewKey(t)}
		a, k := withKey(t, key, r)
		broken := errors.New("token was pulled")
		key.err.Store(&broken)
		n := r.count()
		if _, err := a.Issue(t.Context(), k.Caller(t, "shop", "cart"), catest.NewKey(t).Public(), 0); !errors.Is(err, broken) {
			t.Errorf("issuing: %v", err)
		}
		if events := r.since(n); len(events) != 2 || events[1].Stage != ca.Failed || !errors.Is(events[1].Err, broken) {
			t.Errorf("records %+v, want intent and failed", events)
		}
		time.Sleep(31 * time.Second)
		if err := a.Ready(); !errors.Is(err, broken) {
			t.Errorf("Ready says %v, want the failure of the proof", err)
		}
		key.err.Store(nil)
		time.Sleep(3 * time.Second)
		check(t, a.Ready())
		r.failAt(ca.Intent)
		time.Sleep(31 * time.Second)
		var unaudited *ca.AuditError
		if err := a.Ready(); !errors.As(err, &unaudited) {
			t.Errorf("with a dead audit trail Ready says %v", err)
		}
	})
}

// An intermediate is not used before a throwaway SVID of its has been believed.
func TestIntermediateIsProvedBeforeUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := catest.New(t)
		a, err := ca.New(ca.Config{TrustDomain: k.TrustDomain, Upstream: k.Upstream, Audit: &trail{}})
		check(t, err)
		broken := errors.New("cannot sign")
		key := &slowKey{Signer: catest.NewKey(t)}
		var signed atomic.Int32
		a.SetNewKey(func() (crypto.Signer, error) { return countingKey{key, &signed, broken}, nil })
		start(t, a)
		synctest.Wait()
		if err := a.Ready(); !errors.Is(err, broken) {
			t.Errorf("Ready says %v", err)
		}
		if b, _ := a.Bundle(); b != nil {
			t.Error("a bundle is out before the intermediate is proved")
		}
	})
}

// countingKey signs once, for the CSR, and then fails.
type countingKey struct {
	crypto.Signer
	n   *atomic.Int32
	err error
}

func (c countingKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if c.n.Add(1)%2 == 0 {
		return nil, c.err
	}
	return c.Signer.Sign(r, digest, opts)
}

// The wall clock jumps while timers stand still: deadlines are seen all the same.
func TestF51_DeadlinesFollowTheWallClock(t *testing.T) {
	for _, tt := range []struct {
		name  string
		jump  time.Duration
		works bool // at once
		heals bool // by a new intermediate
	}{
		{"back by 2 min", -2 * time.Minute, true, true},
		{"back by 3 min, before the root", -3 * time.Minute, false, false},
		{"ahead by 2 min", 2 * time.Minute, true, true},
		{"ahead by an hour, past the intermediate", time.Hour, false, true},
		{"ahead by 11 years, past the root", 11 * 365 * 24 * time.Hour, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var offset atomic.Int64
				now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
				k := catest.New(t, append(short(), catest.WithClock(now))...)
				offset.Store(int64(tt.jump))
				err := k.Authority.Ready()
				if (err == nil) != tt.works {
					t.Errorf("after the jump: %v", err)
				}
				time.Sleep(31 * time.Second)
				if tt.jump == time.Hour {
					time.Sleep(5 * time.Minute)
				}
				err = k.Authority.Ready()
				if (err == nil) != tt.heals {
					t.Errorf("half a minute later: %v", err)
				}
				if err == nil {
					leaf := issue(t, k, catest.NewKey(t).Public(), 0).Chain[0]
					if leaf.NotAfter.Before(now()) || leaf.NotBefore.After(now()) {
						t.Errorf("the leaf holds from %v to %v, and it is %v", leaf.NotBefore, leaf.NotAfter, now())
					}
				}
			})
		})
	}
}

func TestConfigIsChecked(t *testing.T) {
	k := catest.New(t)
	good := ca.Config{TrustDomain: k.TrustDomain, Upstream: k.Upstream, Audit: &trail{}}
	for name, change := range map[string]func(*ca.Config){
		"no trust domain":                    func(c *ca.Config) { c.TrustDomain = identity.TrustDomain{} },
		"no upstream":                        func(c *ca.Config) { c.Upstream = nil },
		"no audit":                           func(c *ca.Config) { c.Audit = nil },
		"leaf floor":                         func(c *ca.Config) { c.Leaf.Floor = time.Second },
		"intermediate shorter than 2 leaves": func(c *ca.Config) { c.IntermediateLifetime = 48*time.Hour - time.Second },
	} {
		c := good
		change(&c)
		if _, err := ca.New(c); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	good.IntermediateLifetime = 48 * time.Hour
	_, err := ca.New(good)
	check(t, err)
}

func TestMetricsTellOfSigning(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	k := catest.New(t, catest.WithMetrics(reg), catest.WithLog(slog.New(slog.DiscardHandler)))
	issue(t, k, catest.NewKey(t).Public(), 0)
	_, err := k.Authority.Issue(t.Context(), k.Caller(t, "shop", "cart"), "no key", 0)
	var refused *ca.KeyError
	if !errors.As(err, &refused) {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	check(t, err)
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	end := float64(k.Authority.Status().SignsUntil.Unix())
	want := map[string]float64{
		"meshca_ca_signatures_total svid ok": 1, "meshca_ca_signatures_total svid refused": 1, "meshca_ca_signatures_total svid failed": 0,
		"meshca_ca_signatures_total serving ok": 0, "meshca_ca_signatures_total serving refused": 0, "meshca_ca_signatures_total serving failed": 0,
		"meshca_ca_signatures_total proof ok": 0, "meshca_ca_signatures_total proof refused": 0, "meshca_ca_signatures_total proof failed": 0,
		"meshca_ca_intermediates_total ok": 1, "meshca_ca_intermediates_total failed": 0,
		"meshca_ca_intermediate_end_timestamp_seconds": end, "meshca_ca_bundle_sequence": 1, "meshca_ca_ready": 1,
	}
	if !maps.Equal(got, want) {
		t.Errorf("metrics %v, want %v", got, want)
	}
}
