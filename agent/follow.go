package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/meshca/meshca/agent/caclient"
)

// settled is how long a stream must have stood for its end not to count as one
// more failure.
const settled = 5 * time.Second

// keepBundle follows the CA's stream until ctx ends. It begins when the first
// certificate is there: until then a stream could only compete with it.
func (a *Agent) keepBundle(ctx context.Context) {
	a.mu.Lock()
	first := a.state.first
	a.mu.Unlock()
	if first != nil {
		select {
		case <-first:
		case <-ctx.Done():
			return
		}
	}
	failures := 0
	var opened time.Time
	watch := &caclient.Watch{
		Token:   a.conf.Token,
		Apply:   a.apply,
		Removed: a.removed,
		Refused: a.refused,
		Connected: func(is bool) {
			a.setConnected(is)
			if is {
				opened = time.Now()
			} else if time.Since(opened) >= settled {
				failures = 0
			}
		},
	}
	for {
		changed := a.filesChange()
		err := a.conf.CA.Watch(ctx, watch)
		if ctx.Err() != nil {
			return
		}
		failures++
		if err == nil && failures == 1 {
			continue // the CA ends streams in good order, and wants us back at once
		}
		delay := retryDelay(failures, 0, 0, a.conf.Draw())
		a.logStreamEnd(err, delay)
		timer := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (a *Agent) filesChange() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.filesChanged
}

func (a *Agent) setConnected(is bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state.connected = is
}

// refused is told of each response that was refused, and says so once for each
// reason: the CA's log has it too, but who looks for it looks here first.
func (a *Agent) refused(why error) {
	a.metrics.bundles.WithLabelValues("nack").Inc()
	a.mu.Lock()
	before := a.state.refused
	a.state.refused = why.Error()
	a.mu.Unlock()
	if before == why.Error() {
		return
	}
	a.conf.Log.Error("refusing what the CA sends; what is in use stays", "reason", why.Error())
}

// removed is told when the CA no longer knows the workload. What we hold stays:
// a certificate is valid until it ends, and a bundle until a better one comes.
func (a *Agent) removed(name string) {
	a.conf.Log.Warn("the CA no longer has this workload; the certificate and the bundle in use stay", "resource", fmt.Sprintf("%.256q", name))
}

func (a *Agent) logStreamEnd(err error, delay time.Duration) {
	if err == nil {
		a.conf.Log.Info(fmt.Sprintf("the CA ended the stream again at once (next try in %s)", approx(delay)))
		return
	}
	a.mu.Lock()
	sequence := a.state.sequence()
	a.mu.Unlock()
	a.conf.Log.Warn(describeAttempts(err, delay)+"; the bundle in use stays", append(failureAttrs(err), "sequence", sequence)...)
}
