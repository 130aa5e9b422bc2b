package agent

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/meshca/meshca/agent/caclient"
)

// When things are done again.
const (
	// tick is how often everything is judged again by the wall clock, and how
	// soon a repaired token or anchor file is noticed. A timer alone would run
	// on the monotonic clock, which stands still while the machine sleeps: more
	// than one mesh has woken up with expired certificates and a timer with
	// hours to go.
	tick = 5 * time.Second

	firstRetry   = time.Second
	longestRetry = time.Minute
	// longestSearch is the longest pause between two tries to reach any CA for its stream.
	// A policy or a root that is new reaches nobody meanwhile; and a try costs a CA that
	// is away, or not ready, next to nothing.
	longestSearch = 8 * time.Second

	// leastTerm is the least time between two certificates, whatever their
	// lifetimes are and the CA wishes: nobody can make us a flood.
	leastTerm = time.Second

	// chanceFrom and chanceUntil are when a token that has no successor is used once
	// more, before its end. The kubelet brings a new one after 80 % of a lifetime of
	// 10 minutes or more, and so tokens come to this when it cannot.
	chanceFrom  = 5 * time.Minute
	chanceUntil = 2 * time.Minute

	// alarmShare of the lifetime left, without a new certificate, is an alarm.
	alarmShare = 4
)

// RenewDelay is how long after its issue an agent renews a certificate of the given
// lifetime, by a draw that is uniform in [0, 1): a moment in 1/3…1/2 of the lifetime.
// An outage of the CA shorter than half a lifetime then goes unseen, and agents that
// started together drift apart.
func RenewDelay(lifetime time.Duration, draw float64) time.Duration {
	third, half := float64(lifetime)/3, float64(lifetime)/2
	return time.Duration(third + draw*(half-third))
}

// lastChance is when to renew by a token that is about to end: who has a new
// certificate then outlives an outage of those who make tokens by a whole
// lifetime. The zero lastChance is none.
type lastChance struct{ at, end time.Time }

func newLastChance(end time.Time, draw float64) lastChance {
	return lastChance{at: end.Add(-chanceFrom + time.Duration(draw*float64(chanceFrom-chanceUntil))), end: end}
}

// left returns how long to wait for it; false where it is taken, or gone.
func (c lastChance) left(t term, now time.Time) (time.Duration, bool) {
	if c.at.IsZero() || !t.issued.Before(c.at) || !now.Before(c.end) {
		return 0, false
	}
	return max(c.at.Sub(now), leastTerm-time.Since(t.received)), true
}

// retryDelay draws how long to wait after the given number of failures in a
// row: full jitter below a ceiling that doubles from 1 s to 60 s. left is what
// remains of the current certificate's lifetime (zero if there is none): the
// ceiling leaves room for four more tries on average, down to 1 s, or to 1/40
// of a lifetime that is so short that 1 s is much of it.
func retryDelay(failures int, left, lifetime time.Duration, draw float64) time.Duration {
	ceiling := longestRetry
	if shift := failures - 1; shift < 6 {
		ceiling = min(ceiling, firstRetry<<max(shift, 0))
	}
	if left > 0 {
		floor := min(firstRetry, lifetime/40)
		ceiling = min(ceiling, max(left/4, floor))
	}
	// Never nothing at all: a draw of zero must not become a busy loop.
	return max(time.Duration(draw*float64(ceiling)), ceiling/20)
}

// followDelay draws how long to wait before the next stream, after the given number
// of failures in a row and the last one.
func followDelay(failures int, err error, draw float64) time.Duration {
	delay := retryDelay(failures, 0, 0, draw)
	var away *caclient.UnreachableError
	if errors.As(err, &away) {
		return min(delay, max(time.Duration(draw*float64(longestSearch)), longestSearch/20))
	}
	return delay
}

// refusedDelay draws how long to wait after a definite refusal. Asking again is
// only for the case that somebody changes the CA's mind, so it is done rarely.
func refusedDelay(draw float64) time.Duration {
	return longestRetry/2 + time.Duration(draw*float64(longestRetry/2))
}

// askedDelay is how long to wait where a CA that is busy has said when to come back:
// up to a tenth longer, since clocks and queues are not exact; never nothing at all,
// and no longer than a quarter of what is left of the current certificate, or a second.
func askedDelay(asked, left time.Duration, draw float64) time.Duration {
	most := longestRetry
	if left > 0 {
		most = min(most, max(left/4, firstRetry))
	}
	return min(max(asked, firstRetry/20)+time.Duration(draw*float64(asked)/10), most)
}

// term is the life of the certificate in use, by both clocks.
type term struct {
	issued   time.Time // when we got it, wall clock
	end      time.Time
	renewAt  time.Time     // drawn, or brought forward by the CA
	received time.Time     // when we got it, with the monotonic clock
	delay    time.Duration // from issue to renewAt, as drawn
}

func newTerm(now, end time.Time, draw float64) term {
	delay := RenewDelay(end.Sub(now), draw)
	return term{issued: now, end: end, renewAt: now.Add(delay), received: time.Now(), delay: delay}
}

// untilRenewal returns how long to wait for the renewal; not positive when it
// is due. The wall clock decides what peers will accept, so it goes first; but
// when it has been set back, the renewal is not put off by it.
func (t *term) untilRenewal(now time.Time) time.Duration {
	since := time.Since(t.received)
	return max(min(t.renewAt.Sub(now), t.delay-since), leastTerm-since)
}

// lifetime is counted from the issue: a notBefore that lies back to allow for
// clock skew gives no time to live.
func (t *term) lifetime() time.Duration { return t.end.Sub(t.issued) }

// left returns the rest of the life; zero when it is over.
func (t *term) left(now time.Time) time.Duration { return max(0, t.end.Sub(now)) }

// alarming reports whether so little is left that somebody should look.
func (t *term) alarming(now time.Time) bool { return t.left(now) <= t.lifetime()/alarmShare }

// approx writes a duration for people: one number, one unit.
func approx(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 100*time.Second:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d < 100*time.Minute:
		return fmt.Sprintf("%.0f min", math.Floor(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%.0f h", math.Floor(d.Hours()))
	}
	return fmt.Sprintf("%.0f d", math.Floor(d.Hours()/24))
}
