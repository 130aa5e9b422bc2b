package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/wire"
)

// Run follows what the CA says of the workloads until ctx ends; then it returns
// nil. Nothing that goes wrong outside ends it.
//
// The host subscribes to its own pod too. So there is a stream on a node
// without workloads, and an answer on it that shows that CA, anchor and token
// are good before the first pod needs them.
func (h *Host) Run(ctx context.Context) error {
	h.lookAtFiles()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { h.watchFiles(ctx); return nil })
	g.Go(func() error {
		f := &follower{
			ca: h.conf.CA, draw: h.conf.Draw, filesChange: h.filesChange,
			watch: &caclient.Watch{
				Names: &h.names, Token: h.token, Apply: h.apply, Removed: h.removed,
				Ignored: h.ignored, Refused: h.refused, Connected: h.setConnected,
			},
			ended: h.streamEnded,
		}
		f.run(ctx)
		return nil
	})
	return g.Wait()
}

// token returns the host's own token, and subscribes to the pod that it names.
func (h *Host) token() (string, error) {
	token, err := h.conf.Token()
	if err != nil {
		return "", err
	}
	claims, err := ownClaims(token)
	if err != nil {
		return "", err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.self; old != claims.PodUID {
		if h.members[old] == nil {
			h.names.Remove(old)
		}
		h.self = claims.PodUID
		h.names.Add(h.self)
	}
	return token, nil
}

func ownClaims(token string) (caclient.Claims, error) {
	claims, err := caclient.ReadClaims(token)
	if err != nil {
		return claims, fmt.Errorf("this agent's own token: %w", err)
	}
	if claims.PodUID == "" || claims.NodeName == "" {
		return claims, errors.New("this agent's own token names no pod and node; project one of the audience \"meshca\" into its pod")
	}
	return claims, nil
}

// apply hands a resource to the workload that it is about.
func (h *Host) apply(name string, w wire.Workload) error {
	h.heard()
	var errs []error
	if err := h.applyOwn(name, w); err != nil {
		errs = append(errs, err)
	}
	for _, a := range h.agents(name) {
		if err := a.apply(w); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// applyOwn judges the resource of the host's own pod, of which nothing is used
// but its age: a CA that is behind should be told so, and left, on a node
// without workloads too.
func (h *Host) applyOwn(name string, w wire.Workload) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if name != h.self {
		return nil
	}
	if held := h.sequence; w.Bundle.Sequence() < held {
		return &StaleError{Held: held, Got: w.Bundle.Sequence()}
	}
	h.sequence = w.Bundle.Sequence()
	newer, err := w.Policy.Succeeds(h.policy)
	if newer {
		h.policy = w.Policy
	}
	return err
}

func (h *Host) removed(name string) {
	h.heard()
	for _, a := range h.agents(name) {
		a.removed(name)
	}
}

// ignored is told of what came about a workload that is gone already, or that
// we never had.
func (h *Host) ignored(name string) {
	h.heard()
	h.conf.Log.Debug("ignoring what the CA says of a workload that is not here", "resource", fmt.Sprintf("%.256q", name))
}

// refused says why a response was refused, once for each reason in a row.
func (h *Host) refused(why error) {
	h.heard()
	h.metrics.bundles.WithLabelValues("nack").Inc()
	h.mu.Lock()
	before := h.refusal
	h.refusal = why.Error()
	h.mu.Unlock()
	if before != why.Error() {
		h.conf.Log.Error("refusing what the CA sends; what is in use stays", "reason", why.Error())
	}
}

func (h *Host) heard() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answered, h.lastErr = true, nil
}

func (h *Host) setConnected(is bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.connected = is
}

func (h *Host) streamEnded(err error, delay time.Duration) {
	h.mu.Lock()
	h.lastErr = err
	sequence := h.sequence
	h.mu.Unlock()
	l := streamEnd(err, delay, sequence)
	h.conf.Log.Log(context.Background(), l.level, l.text, l.attrs...)
}

// watchFiles looks at the files that attempts depend on, for all agents.
func (h *Host) watchFiles(ctx context.Context) {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	var before [sha256.Size]byte
	for first := true; ; first = false {
		now := h.lookAtFiles()
		if now != before && !first {
			h.announceFiles()
		}
		before = now
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// lookAtFiles returns a fingerprint of our token and the anchor, and keeps that
// of the anchor for the agents.
func (h *Host) lookAtFiles() [sha256.Size]byte {
	anchor, anchorErr := h.conf.CA.AnchorPEM()
	token, err := h.conf.Token()
	print := sha256.Sum256(fmt.Appendf(nil, "%q %v", anchor, anchorErr))
	h.mu.Lock()
	h.anchor = print
	h.mu.Unlock()
	return sha256.Sum256(fmt.Appendf(nil, "%x %q %v", print, token, err))
}

func (h *Host) anchorPrint() [sha256.Size]byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.anchor
}

// announceFiles wakes whoever waits because of a token or an anchor.
func (h *Host) announceFiles() {
	h.mu.Lock()
	close(h.filesChanged)
	h.filesChanged = make(chan struct{})
	h.mu.Unlock()
	for _, a := range h.all() {
		a.wakeUp()
	}
}

func (h *Host) filesChange() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.filesChanged
}
