package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/meshca/meshca/agent/caclient"
)

// keepSVID obtains the certificate and renews it until ctx ends.
func (a *Agent) keepSVID(ctx context.Context) {
	files := a.filesPrint()
	chance := a.newLastChance()
	var retryAt time.Time // by the monotonic clock; zero while nothing has failed
	for {
		wait := a.untilRenewal(chance)
		if !retryAt.IsZero() {
			wait = max(wait, time.Until(retryAt))
		}
		if wait <= 0 {
			delay := a.renew(ctx)
			if ctx.Err() != nil {
				return
			}
			retryAt = time.Time{}
			if delay > 0 {
				retryAt = time.Now().Add(delay)
			}
			continue
		}
		if !a.pause(ctx, min(wait, tick)) {
			return
		}
		a.judge()
		if now := a.filesPrint(); now != files {
			files = now
			retryAt = time.Time{} // what was broken may be repaired
			chance = a.newLastChance()
			a.announceFiles()
		}
	}
}

// pause waits, less if the CA has a wish; false when ctx has ended.
func (a *Agent) pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-a.wake:
	case <-timer.C:
	}
	return true
}

// newLastChance draws when to use the token once more that we hold; never where
// it does not say when it ends.
func (a *Agent) newLastChance() lastChance {
	token, err := a.conf.Token()
	if err != nil {
		return lastChance{}
	}
	claims, err := caclient.ReadClaims(token)
	if err != nil || claims.Expires.IsZero() {
		return lastChance{}
	}
	return newLastChance(claims.Expires, a.conf.Draw())
}

// untilRenewal returns how long to wait for the next certificate; at once where
// there is none.
func (a *Agent) untilRenewal(chance lastChance) time.Duration {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.state.svid == nil {
		return 0
	}
	wait := a.state.term.untilRenewal(now)
	if left, ok := chance.left(a.state.term, now); ok {
		wait = min(wait, left)
	}
	return wait
}

// announceFiles wakes those who wait because of a token or an anchor.
func (a *Agent) announceFiles() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.state.filesChanged)
	a.state.filesChanged = make(chan struct{})
}

// renew makes one round. It returns how long to wait before the next one, or
// zero after a success.
func (a *Agent) renew(ctx context.Context) time.Duration {
	began := time.Now()
	key := startKey(a.conf.KeyType)
	var address string
	err := a.conf.CA.Sign(ctx, caclient.SignRequest{
		Token:    a.conf.Token,
		CSR:      key.csr,
		Lifetime: a.conf.Lifetime,
		Accept: func(s *caclient.Signed) error {
			address = s.Address
			return a.take(s, key.result.key)
		},
	})
	<-key.done
	if ctx.Err() != nil {
		return 0
	}
	a.metrics.renewals.WithLabelValues(resultOf(err)).Inc()
	if err == nil {
		a.succeeded(address, time.Since(began))
		return 0
	}
	return a.failed(err)
}

func (a *Agent) succeeded(address string, took time.Duration) {
	now := a.now()
	a.mu.Lock()
	a.state.failures, a.state.lastErr = 0, nil
	svid, term := a.state.svid, a.state.term
	a.mu.Unlock()
	a.conf.Log.Info(fmt.Sprintf("certificate obtained, good for %s, renewed in %s",
		approx(term.left(now)), approx(term.renewAt.Sub(now))),
		"spiffe_id", svid.ID().String(), "serial", svid.Serial(), "ca", address,
		"not_after", stamp(term.end), "renew_at", stamp(term.renewAt),
		"took", took.Round(100*time.Microsecond).String())
}

// failed decides when to ask again, tells the log, and tells callers of the
// Workload API when the CA has refused us and there is nothing left to serve.
func (a *Agent) failed(err error) time.Duration {
	delay, l := a.noteFailure(err)
	a.say(l)
	return delay
}

func (a *Agent) noteFailure(err error) (time.Duration, line) {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.state
	s.failures++
	s.lastErr = err

	var left, lifetime time.Duration
	if s.svid != nil {
		left, lifetime = s.term.left(now), s.term.lifetime()
	}
	delay := retryDelay(s.failures, left, lifetime, a.conf.Draw())
	var refused *caclient.RefusedError
	if errors.As(err, &refused) {
		if refused.Definite() {
			delay = refusedDelay(a.conf.Draw())
		}
		if refused.RetryAfter > 0 {
			delay = askedDelay(refused.RetryAfter, left, a.conf.Draw())
		}
		// A token that proves nothing is no definite refusal, and it is asked
		// again as after any fault; but where there is nothing to serve, the
		// program that waits should learn that it waits in vain.
		if !s.valid(now) && (refused.Definite() || refused.Code == codes.Unauthenticated) {
			a.denyLocked(err)
		}
	}
	var other *IDError
	if !s.valid(now) && !a.conf.ID.IsZero() && errors.As(err, &other) {
		// Who we are was said by somebody whom we believe more than the CA.
		a.denyLocked(err)
	}
	level := slog.LevelWarn
	if s.svid == nil || s.term.alarming(now) || isAlarm(err) {
		level = slog.LevelError
	}
	return delay, line{level, describeFailure(err, delay, s, now), failureAttrs(err)}
}

// denyLocked tells callers of the Workload API that they wait in vain.
func (a *Agent) denyLocked(why error) {
	a.state.denied = why
	a.publishLocked()
}

// judge raises the alarm when too little is left of the certificate in use.
func (a *Agent) judge() {
	if l, alarm := a.noteAlarm(); alarm {
		a.say(l)
	}
}

func (a *Agent) noteAlarm() (line, bool) {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.state
	if s.svid == nil || s.alarmed || !s.term.alarming(now) {
		return line{}, false
	}
	s.alarmed = true
	attrs := []any{"spiffe_id", s.svid.ID().String(), "serial", s.svid.Serial(), "not_after", stamp(s.term.end)}
	if s.lastErr != nil {
		attrs = append(attrs, "cause", s.lastErr.Error())
	}
	return line{slog.LevelError, fmt.Sprintf("the certificate ends in %s and could not be renewed", approx(s.term.left(now))), attrs}, true
}

// line is one for the log. Lines are made while the state is locked and written
// afterwards: whoever reads the log may be slow, or gone, and everything else
// waits for that lock.
type line struct {
	level slog.Level
	text  string
	attrs []any
}

// say must not be called with the state locked.
func (a *Agent) say(l line) { a.conf.Log.Log(context.Background(), l.level, l.text, l.attrs...) }

// describeFailure is the line about a failed round: what was tried, what went
// wrong, what happens next, and what that means for the workload now.
func describeFailure(err error, delay time.Duration, s *state, now time.Time) string {
	serving := "nothing to serve yet"
	switch {
	case s.valid(now):
		serving = "serving the current one, good for " + approx(s.term.left(now))
	case s.svid != nil:
		serving = "the last one is not valid now: it ended at " + stamp(s.term.end)
	}
	return describeAttempts(err, delay) + "; " + serving
}

// describeAttempts names the first CA that was tried; the others are in
// failureAttrs.
func describeAttempts(err error, delay time.Duration) string {
	next := "next try in " + approx(delay)
	text := err.Error()
	var unreachable *caclient.UnreachableError
	if errors.As(err, &unreachable) {
		text = unreachable.First()
		if n := len(unreachable.Attempts); n > 1 {
			next = fmt.Sprintf("tried %d CAs, %s", n, next)
		}
	}
	return fmt.Sprintf("%s (%s)", text, next)
}

// failureAttrs tells of the CAs beyond the first one.
func failureAttrs(err error) []any {
	var unreachable *caclient.UnreachableError
	if !errors.As(err, &unreachable) || len(unreachable.Attempts) < 2 {
		return nil
	}
	others := make([]any, 0, len(unreachable.Attempts))
	for _, at := range unreachable.Attempts[1:] {
		others = append(others, slog.String(at.Address, at.Err.Error()))
	}
	return []any{slog.Group("others", others...)}
}

// isAlarm reports whether an error needs a person, however long the current
// certificate is still good for.
func isAlarm(err error) bool {
	switch resultOf(err) {
	case resultClock, resultDenied, resultBadAnswer:
		return true
	}
	return false
}

// resultOf sorts the outcome of a round; worst first, since a round may have
// failed differently at each CA.
func resultOf(err error) string {
	if err == nil {
		return resultOK
	}
	var (
		clock       *ClockError
		answer      *caclient.AnswerError
		refused     *caclient.RefusedError
		unreachable *caclient.UnreachableError
	)
	switch {
	case errors.As(err, &clock):
		return resultClock
	case errors.As(err, &answer):
		return resultBadAnswer
	case errors.As(err, &refused):
		switch refused.Code {
		case codes.Unauthenticated:
			return resultUnauthenticated
		case codes.ResourceExhausted:
			return resultBusy
		}
		return resultDenied
	case errors.As(err, &unreachable):
		return resultUnreachable
	}
	return resultLocal
}
