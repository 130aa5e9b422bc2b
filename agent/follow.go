package agent

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/wire"
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
	f := &follower{
		ca: a.conf.CA, draw: a.conf.Draw, filesChange: a.filesChange,
		watch: &caclient.Watch{
			Token:     a.conf.Token,
			Apply:     func(_ string, w wire.Workload) error { return a.apply(w) },
			Removed:   a.removed,
			Refused:   a.refused,
			Connected: a.setConnected,
		},
		ended: func(err error, delay time.Duration) {
			a.mu.Lock()
			sequence := a.state.sequence()
			a.mu.Unlock()
			a.say(streamEnd(err, delay, sequence))
		},
	}
	f.run(ctx)
}

// follower opens a stream again and again.
type follower struct {
	ca    *caclient.Client
	watch *caclient.Watch
	draw  func() float64
	// filesChange returns a channel that is closed when what an attempt depends
	// on has changed.
	filesChange func() <-chan struct{}
	// ended is told how a stream ended, or could not be opened, if the next try
	// is not at once.
	ended func(err error, delay time.Duration)
}

// run follows streams until ctx ends.
func (f *follower) run(ctx context.Context) {
	failures := 0
	var opened time.Time
	tell := f.watch.Connected
	f.watch.Connected = func(is bool) {
		tell(is)
		if is {
			opened = time.Now()
		} else if time.Since(opened) >= settled {
			failures = 0
		}
	}
	for {
		changed := f.filesChange()
		err := f.ca.Watch(ctx, f.watch)
		if ctx.Err() != nil {
			return
		}
		failures++
		if err == nil && failures == 1 {
			continue // the CA ends streams in good order, and wants us back at once
		}
		delay := followDelay(failures, err, f.draw())
		f.ended(err, delay)
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

// removed is told when the CA does not have the workload. What we hold stays: a
// certificate is valid until it ends, and a bundle until a better one comes.
func (a *Agent) removed(name string) {
	a.mu.Lock()
	known := a.state.streamed
	a.mu.Unlock()
	if !known {
		// A pod may be younger than what the CA has read of it.
		a.conf.Log.Info("the CA does not know this workload yet; bundle and policy follow once it does", "resource", fmt.Sprintf("%.256q", name))
		return
	}
	a.conf.Log.Warn("the CA no longer has this workload; the certificate and the bundle in use stay", "resource", fmt.Sprintf("%.256q", name))
}

// streamEnd is the line about a stream that is opened again in a while.
func streamEnd(err error, delay time.Duration, sequence uint64) line {
	if err == nil {
		return line{level: slog.LevelInfo, text: fmt.Sprintf("the CA ended the stream again at once (next try in %s)", approx(delay))}
	}
	return line{slog.LevelWarn, describeAttempts(err, delay) + "; the bundle in use stays", append(failureAttrs(err), "sequence", sequence)}
}
