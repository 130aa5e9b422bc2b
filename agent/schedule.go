package agent

import (
	"fmt"
	"math"
	"time"
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

	// leastTerm is the least time between two certificates, whatever their
	// lifetimes are and the CA wishes: nobody can make us a flood.
	leastTerm = time.Second

	// alarmShare of the lifetime left, without a new certificate, is an alarm.
	alarmShare = 4
)

// renewDelay draws how long after its issue a certificate of the given lifetime
// is renewed: uniformly in 1/3…1/2 of it. An outage of the CA shorter than half
// a lifetime then goes unseen, and agents that started together drift apart.
// draw is in [0, 1).
func renewDelay(lifetime time.Duration, draw float64) time.Duration {
	third, half := float64(lifetime)/3, float64(lifetime)/2
	return time.Duration(third + draw*(half-third))
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

// refusedDelay draws how long to wait after a definite refusal. Asking again is
// only for the case that somebody changes the CA's mind, so it is done rarely.
func refusedDelay(draw float64) time.Duration {
	return longestRetry/2 + time.Duration(draw*float64(longestRetry/2))
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
	delay := renewDelay(end.Sub(now), draw)
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
