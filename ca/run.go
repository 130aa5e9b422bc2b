package ca

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// tick bounds how long a deadline can go unseen when the wall clock jumps:
	// each is judged anew at least this often, never by one long timer.
	tick = 30 * time.Second

	upstreamTimeout = 30 * time.Second
	firstBackoff    = 5 * time.Second
	longestBackoff  = 5 * time.Minute
	shortestWait    = 500 * time.Millisecond

	// proofTimeout is how long a proof may take before the authority calls
	// itself unable to sign, and retryProof how soon a failed one is repeated.
	proofTimeout = time.Second
	retryProof   = 2 * time.Second
)

// trouble is the upstream failing.
type trouble struct {
	err      error
	since    time.Time
	failures int
	retryAt  time.Time
}

// proofState is what the last proof said. A proof that is under way is known by
// its beginning, so that asking never waits for it.
type proofState struct {
	began  atomic.Pointer[time.Time] // nil if none is under way
	failed atomic.Pointer[error]     // nil if the last one, or a new issuer's first, succeeded
}

// Run has an intermediate signed, proves and activates it, and a new one at half
// of its life, or at once when the upstream is a [Changer] and says so. When the
// upstream fails it tries again with growing, fully
// jittered pauses and the authority signs on with the intermediate it has. Run
// blocks until ctx is done and then returns nil. It must be called once.
func (a *Authority) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { a.proveOn(ctx) })
	defer wg.Wait()
	if a.changes, _ = a.upstream.(Changer); a.changes != nil {
		a.changed = a.changes.Changed()
	}
	if a.roots != nil {
		_, a.rooted = a.roots.Bundle()
	}
	for {
		if a.due() {
			a.renew(ctx)
		}
		if !a.rest(ctx, a.untilDue()) {
			return nil
		}
	}
}

// rest waits for d, or until the upstream would answer otherwise than it did for the
// intermediate in force, or the bundle has become another one, and reports whether
// ctx is still good.
func (a *Authority) rest(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
	case <-a.rooted:
		a.rebundle()
	case <-a.changed:
		// The channel of the next change first: one that comes while the upstream is
		// asked must not be missed. A pause after a failure is over, too: what failed
		// was another question.
		a.changed = a.changes.Changed()
		a.stale = true
		if t := a.trouble.Load(); t != nil {
			again := *t
			again.retryAt = a.now()
			a.trouble.Store(&again)
		}
	}
	return true
}

// rebundle puts the bundle into force that another replica, or time, has made of the
// roots. The upstream has no part in it and may be away.
func (a *Authority) rebundle() {
	b, next := a.roots.Bundle()
	a.rooted = next
	old := a.active.Load()
	if b == nil || old == nil {
		return // the first intermediate brings it
	}
	b, err := b.Bundle(a.td)
	if err == nil {
		b, err = a.succeeding(b)
	}
	if err != nil {
		a.log.Error("the roots that were agreed on are not taken", "error", err)
		return
	}
	if b == old.bundle {
		return
	}
	is := *old
	is.bundle = b
	a.activate(&is)
	a.log.Info("new bundle in force", "bundle_sequence", b.Sequence(), "roots", len(b.Authorities()))
}

// due reports whether a new intermediate is to be made now: there is none, the
// upstream has changed since, half of its life is over, or the wall clock stands
// outside of it.
func (a *Authority) due() bool {
	now := a.now()
	if t := a.trouble.Load(); t != nil && now.Before(t.retryAt) && t.retryAt.Sub(now) <= longestBackoff {
		return false // a clock set back must not turn a pause into a year
	}
	is := a.active.Load()
	return is == nil || a.stale || !now.Before(is.renewAt) || now.Before(is.begin)
}

func (a *Authority) untilDue() time.Duration {
	now, next := a.now(), tick
	if t := a.trouble.Load(); t != nil {
		next = min(next, t.retryAt.Sub(now))
	} else if is := a.active.Load(); is != nil {
		next = min(next, is.renewAt.Sub(now))
	}
	return max(next, shortestWait)
}

// renew makes, proves and activates an intermediate, or notes why it could not.
func (a *Authority) renew(ctx context.Context) {
	is, err := a.newIssuer(ctx)
	if err == nil {
		if err = a.prove(ctx, is); err != nil {
			err = fmt.Errorf("proving the new intermediate %s: %w", is.id, err)
		}
	}
	if ctx.Err() != nil {
		return
	}
	a.metrics.upstreamed(err)
	if err != nil {
		a.failed(err)
		return
	}
	a.trouble.Store(nil)
	a.stale = false
	a.proof.failed.Store(nil) // what failed, failed with the one before
	again := is.same(a.active.Load())
	a.activate(is)
	if again {
		return
	}
	a.log.Info("new intermediate in force", "authority", is.id, "serial", fmt.Sprintf("%x", is.cert().SerialNumber),
		"ends", is.end, "renew_at", is.renewAt, "bundle_sequence", is.bundle.Sequence())
	if is.renewAt.Sub(is.began) < a.leaf.Ceiling {
		a.log.Warn("the new intermediate is shorter than asked for: leaves will be cut short at its end",
			"asked", a.intermediateLifetime, "got", is.end.Sub(is.began))
	}
}

func (a *Authority) failed(err error) {
	now := a.now()
	t := trouble{err: err, since: now, failures: 1}
	if old := a.trouble.Load(); old != nil {
		t.since, t.failures = old.since, old.failures+1
	}
	pause := backoff(t.failures)
	t.retryAt = now.Add(pause)
	a.trouble.Store(&t)
	attrs := []any{"error", err, "failures", t.failures, "retry_in", pause}
	if is := a.active.Load(); is != nil {
		attrs = append(attrs, "can_sign_until", is.end)
	}
	a.log.Error("no new intermediate", attrs...)
}

// backoff is full jitter: anything from almost nothing up to a bound that
// doubles from 5 s to 5 min, so that replicas that failed together do not come
// back together.
func backoff(failures int) time.Duration {
	bound := firstBackoff << min(failures-1, 6)
	return max(rand.N(min(bound, longestBackoff)), shortestWait)
}

// proveOn proves the active issuer again and again: being able to sign is
// something to try, not to infer. A failure shows within a tick and heals as
// soon as a proof succeeds.
func (a *Authority) proveOn(ctx context.Context) {
	wait := tick
	for sleep(ctx, wait) {
		wait = tick
		is := a.active.Load()
		if is == nil {
			continue
		}
		began := a.now()
		a.proof.began.Store(&began)
		err := a.prove(ctx, is)
		a.proof.began.Store(nil)
		if ctx.Err() != nil {
			return
		}
		a.metrics.signed(KindProof, err)
		was := a.proof.failed.Load()
		if err == nil {
			a.proof.failed.Store(nil)
			if was != nil {
				a.log.Info("signing works again")
			}
			continue
		}
		wait = retryProof
		a.proof.failed.Store(&err)
		if was == nil {
			a.log.Error("signing does not work", "error", err)
		}
	}
}

// Ready returns nil if the authority can sign now, and otherwise a
// [*NotReadyError]. It only reads and never waits, whatever signing does.
func (a *Authority) Ready() error {
	is, err := a.current()
	if err != nil {
		return err
	}
	now := a.now()
	if _, err := a.validity(is, &order{kind: KindProof, id: a.td.ID(), lifetime: a.leaf.Lifetime}); err != nil {
		return a.notReady("its intermediate is of no more use", err)
	}
	if began := a.proof.began.Load(); began != nil {
		if d := now.Sub(*began); d >= proofTimeout {
			return &NotReadyError{Reason: fmt.Sprintf("signing has been blocked for %v", d)}
		}
	}
	if failed := a.proof.failed.Load(); failed != nil {
		return &NotReadyError{Reason: "the last proof failed", Err: *failed}
	}
	return nil
}

func (a *Authority) notReady(reason string, err error) error {
	if t := a.trouble.Load(); t != nil {
		return &NotReadyError{Reason: fmt.Sprintf("%s (%v)", reason, err), Err: t.err}
	}
	return &NotReadyError{Reason: reason, Err: err}
}

// Status is what operators may want to know beside [Authority.Ready].
type Status struct {
	Authority     string    // key ID of the active intermediate, hex; empty if there is none
	SignsUntil    time.Time // its end
	RenewAt       time.Time
	UpstreamErr   error     // why the last attempt at a new one failed; nil if it did not
	UpstreamSince time.Time // since when attempts have failed
	Upstream      Report    // what the upstream says of itself
}

// RestartLoses reports whether a replica that was restarted now would be without an
// intermediate, which is in memory only.
func (s *Status) RestartLoses() bool { return s.UpstreamErr != nil || s.Upstream.Away }

// Status returns the state of the intermediate and of the upstream. Trouble
// with the upstream alone does not make the authority unready: it signs on
// until SignsUntil.
func (a *Authority) Status() Status {
	var s Status
	if is := a.active.Load(); is != nil {
		s.Authority, s.SignsUntil, s.RenewAt = is.id, is.end, is.renewAt
	}
	if t := a.trouble.Load(); t != nil {
		s.UpstreamErr, s.UpstreamSince = t.err, t.since
	}
	if r, ok := a.upstream.(Reporter); ok {
		s.Upstream = r.Report()
	}
	return s
}

// sleep waits for d and reports whether ctx is still good.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
