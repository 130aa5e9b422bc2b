package agent

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/meshca/meshca/agent/caclient"
)

func TestRenewDelayIsInTheWindow(t *testing.T) {
	for _, lifetime := range []time.Duration{10 * time.Second, time.Hour, 24 * time.Hour} {
		if got := RenewDelay(lifetime, 0); got != lifetime/3 {
			t.Errorf("%v: earliest %v", lifetime, got)
		}
		if got := RenewDelay(lifetime, 0.9999999); got > lifetime/2 || got < lifetime/2-time.Second {
			t.Errorf("%v: latest %v", lifetime, got)
		}
	}
}

func TestRetryDelay(t *testing.T) {
	for _, test := range []struct {
		failures       int
		left, lifetime time.Duration
		ceiling        time.Duration
	}{
		{1, 0, 0, time.Second},
		{2, 0, 0, 2 * time.Second},
		{6, 0, 0, 32 * time.Second},
		{7, 0, 0, time.Minute},
		{1000000, 0, 0, time.Minute},
		{0, 0, 0, time.Second},
		{7, 30 * time.Minute, time.Hour, time.Minute},
		{7, 2 * time.Minute, time.Hour, 30 * time.Second},
		{7, time.Second, time.Hour, time.Second},
		{7, 5 * time.Second, 10 * time.Second, 1250 * time.Millisecond},
		{7, time.Millisecond, 10 * time.Second, 250 * time.Millisecond},
	} {
		if got := retryDelay(test.failures, test.left, test.lifetime, 1); got != test.ceiling {
			t.Errorf("%+v: at most %v", test, got)
		}
		if got := retryDelay(test.failures, test.left, test.lifetime, 0.5); got != test.ceiling/2 {
			t.Errorf("%+v: on average %v", test, got)
		}
		if got := retryDelay(test.failures, test.left, test.lifetime, 0); got <= 0 || got > test.ceiling/10 {
			t.Errorf("%+v: at least %v", test, got)
		}
	}
	for _, draw := range []float64{0, 0.999} {
		if got := refusedDelay(draw); got < 30*time.Second || got > time.Minute {
			t.Errorf("after a definite refusal: %v", got)
		}
	}
}

func TestApprox(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0 ms", 40 * time.Millisecond: "40 ms", 2 * time.Second: "2 s", 99 * time.Second: "99 s",
		41*time.Minute + 59*time.Second: "41 min", 100 * time.Minute: "1 h", 47 * time.Hour: "47 h", 72 * time.Hour: "3 d",
	} {
		if got := approx(d); got != want {
			t.Errorf("%v: %q, not %q", d, got, want)
		}
	}
}

// A CA that nobody reaches is looked for often; one that ends streams, or refuses
// them, is not hammered.
func TestL4_FollowDelay(t *testing.T) {
	away := fmt.Errorf("no stream: %w", &caclient.UnreachableError{Doing: "%s", Attempts: []caclient.Attempt{{Address: "a:1", Err: errors.New("no")}}})
	for failures := range 20 {
		if got, most := followDelay(failures+1, away, 0.999999), min(firstRetry<<failures, longestSearch); got > most || got < most*9/10 {
			t.Errorf("after %d failures to reach one: %v, want at most %v", failures+1, got, most)
		}
		if got := followDelay(failures+1, away, 0); got <= 0 {
			t.Errorf("after %d failures: a busy loop", failures+1)
		}
	}
	for _, err := range []error{nil, &caclient.RefusedError{Code: codes.PermissionDenied}} {
		if got := followDelay(20, err, 0.999999); got < longestRetry*9/10 {
			t.Errorf("after %v: %v", err, got)
		}
	}
}
