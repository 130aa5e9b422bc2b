package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/sds"
)

// HostConfig is what a [Host] is made from.
type HostConfig struct {
	// CA is asked for the certificates of all workloads, each by its own token;
	// required. It should be made as a shared one. Whoever made it closes it.
	CA *caclient.Client
	// Token is the host's own, by which it follows what the CA says of its
	// workloads; required. It must be bound to a pod.
	Token caclient.TokenSource
	// KeyType of the private keys; empty means P-256.
	KeyType KeyType
	// Now is the wall clock; required.
	Now func() time.Time
	// Log gets what concerns all workloads; required.
	Log *slog.Logger
	// Metrics is where the metrics of all workloads are registered; required.
	Metrics prometheus.Registerer
	// Draw yields the jitter, uniform in [0, 1); nil means math/rand/v2.
	Draw func() float64
}

// Host keeps the identities of many workloads, such as those of a node's pods.
// Each is an [Agent] of its own, with its own token, key and deadlines, so that
// what goes wrong for one is nothing to the others. What the CA says of them,
// bundle and policy, comes over one stream that all share. Use [NewHost], and
// Run beside the agents.
type Host struct {
	conf    HostConfig
	names   caclient.Names
	metrics *metrics

	mu           sync.Mutex // guards all below; never held while logging, or with an agent's
	members      map[string]map[*Agent]struct{}
	self         string // the name of our own resource, from our token
	anchor       [sha256.Size]byte
	filesChanged chan struct{} // closed and replaced when token or anchor changed
	connected    bool
	answered     bool             // the CA, at least once
	sequence     uint64           // of the bundle in our own resource
	policy       *policy.Resolved // in our own resource
	refusal      string           // why the last response was refused; empty if it was not
	lastErr      error            // why there is no stream
}

// NewHost makes a host without workloads. It contacts nobody.
func NewHost(conf HostConfig) (*Host, error) {
	switch {
	case conf.CA == nil:
		return nil, errors.New("agent host: no CA client is given")
	case conf.Token == nil:
		return nil, errors.New("agent host: no token source is given")
	case conf.Now == nil || conf.Log == nil || conf.Metrics == nil:
		return nil, errors.New("agent host: Now, Log and Metrics must all be given")
	}
	if conf.KeyType == "" {
		conf.KeyType = P256
	}
	if _, err := ParseKeyType(string(conf.KeyType)); err != nil {
		return nil, fmt.Errorf("agent host: %w", err)
	}
	if conf.Draw == nil {
		conf.Draw = rand.Float64
	}
	h := &Host{conf: conf, members: make(map[string]map[*Agent]struct{}), filesChanged: make(chan struct{})}
	var err error
	if h.metrics, err = newMetrics(conf.Metrics); err != nil {
		return nil, err
	}
	return h, h.registerGauges(conf.Metrics)
}

// Workload is what the identity of one workload is made from.
type Workload struct {
	// Name is that of the workload's resource at the CA, its pod's UID; required.
	Name string
	// ID is the only identity to take; required.
	ID identity.ID
	// Token is the workload's own; required. It is asked for each attempt.
	Token caclient.TokenSource
	// Feed gets every change; required.
	Feed *sds.Feed
	// Log should carry what names the workload; required.
	Log *slog.Logger
}

// Agent makes the agent of one workload. What the CA says of it is followed
// while its Run does. Several agents may have one name.
func (h *Host) Agent(w Workload) (*Agent, error) {
	if w.Name == "" || w.ID.IsZero() {
		return nil, errors.New("agent host: a workload needs a name and an ID")
	}
	a, err := newAgent(Config{
		CA: h.conf.CA, Token: w.Token, Feed: w.Feed, ID: w.ID, KeyType: h.conf.KeyType,
		Now: h.conf.Now, Log: w.Log, Metrics: h.conf.Metrics, Draw: h.conf.Draw,
	}, h)
	if err != nil {
		return nil, err
	}
	a.name = w.Name
	return a, nil
}

// TrustDomain returns the domain of all workloads.
func (h *Host) TrustDomain() identity.TrustDomain { return h.conf.CA.TrustDomain() }

// Node returns the name of the node that we are on, from our token.
func (h *Host) Node() (string, error) {
	token, err := h.conf.Token()
	if err != nil {
		return "", err
	}
	claims, err := ownClaims(token)
	return claims.NodeName, err
}

// Ready returns nil once a CA has answered on the stream that all share,
// otherwise why not. A CA that is away later changes nothing: what is held is
// served on.
func (h *Host) Ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.answered:
		return nil
	case h.lastErr != nil:
		return fmt.Errorf("nothing has been heard from a CA yet: %w", h.lastErr)
	}
	return errors.New("nothing has been heard from a CA yet")
}

// join has an agent told of what the CA says, until it leaves.
func (h *Host) join(a *Agent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.members[a.name] == nil {
		h.members[a.name] = make(map[*Agent]struct{})
	}
	h.members[a.name][a] = struct{}{}
	h.names.Add(a.name)
}

func (h *Host) leave(a *Agent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.members[a.name], a)
	if len(h.members[a.name]) > 0 {
		return
	}
	delete(h.members, a.name)
	if a.name != h.self {
		h.names.Remove(a.name)
	}
}

// agents returns those of one name.
func (h *Host) agents(name string) []*Agent {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := make([]*Agent, 0, len(h.members[name]))
	for a := range h.members[name] {
		list = append(list, a)
	}
	return list
}

func (h *Host) all() []*Agent {
	h.mu.Lock()
	defer h.mu.Unlock()
	var list []*Agent
	for _, members := range h.members {
		for a := range members {
			list = append(list, a)
		}
	}
	return list
}

// DeniedError says that the CA will not have a workload, or calls it by another
// name than its own.
type DeniedError struct{ Err error }

func (e *DeniedError) Error() string { return e.Err.Error() }

func (e *DeniedError) Unwrap() error { return e.Err }

// First waits for the first certificate. It returns a [*DeniedError] as soon as
// that will not come, and the context's cause when ctx ends before.
func (a *Agent) First(ctx context.Context) error {
	for {
		s, changed := a.conf.Feed.State()
		switch {
		case s.Denied != nil:
			return &DeniedError{Err: s.Denied}
		case s.SVID != nil:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Refresh makes the agent look at its token now, and try again if that is
// another one.
func (a *Agent) Refresh() { a.wakeUp() }
