package state

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

const (
	// DefaultInterval is how often the objects are looked at.
	DefaultInterval = 5 * time.Second

	// Patience is for how long a replica signs on without having read the shared
	// state, while a rotation is under way.
	Patience = 10 * time.Minute

	firstRetry = 200 * time.Millisecond
)

// Config is what a [Store] is made from.
type Config struct {
	Client      typedcorev1.CoreV1Interface // required
	Namespace   string                      // required: the CA's own
	TrustDomain identity.TrustDomain        // required
	// Anchors returns the trust anchors of the domain that are found outside of the
	// namespace, where only administrators write. They outlive it, and so tell a new
	// namespace from one that was lost with its root. It is asked before a first root
	// is made or taken over, and an error keeps that from happening; nil means none.
	Anchors      func(context.Context) ([]Anchor, error)
	RootLifetime time.Duration         // of the first root; zero means 10 years
	Interval     time.Duration         // zero means [DefaultInterval]
	Now          func() time.Time      // nil means time.Now
	Log          *slog.Logger          // nil means no log
	Metrics      prometheus.Registerer // nil means none
}

// Store is one replica's view of the roots and the shared state. It implements
// [ca.Upstream]. Its methods are safe for concurrent use.
type Store struct {
	loader
	interval time.Duration
	clock    func() time.Time
	log      *slog.Logger
	metrics  *metrics
	tried    chan struct{} // closed after the first attempt to load

	changes sync.Mutex // one round, or one change, at a time

	mu       sync.Mutex    // guards what follows
	snap     *snapshot     // nil before the first success
	changed  chan struct{} // closed with another epoch
	answers  chan struct{} // closed when intermediates, or what comes with them, change
	refused  bool          // somebody asked for an intermediate before the first success
	readAt   time.Time
	troubles map[cause]error
}

var (
	_ ca.Upstream = (*Store)(nil)
	_ ca.Changer  = (*Store)(nil)
)

// New checks the configuration. The store knows nothing before [Store.Run] has
// read, or made, what is in the namespace.
func New(c Config) (*Store, error) {
	if c.Client == nil || c.Namespace == "" {
		return nil, errors.New("state in the cluster: Client and Namespace must both be given")
	}
	if err := (ca.RootConfig{TrustDomain: c.TrustDomain, Lifetime: c.RootLifetime}).Check(); err != nil {
		return nil, err
	}
	if c.Interval == 0 {
		c.Interval = DefaultInterval
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(c.Metrics)
	if err != nil {
		return nil, fmt.Errorf("state in the cluster: metrics: %w", err)
	}
	s := &Store{
		interval: c.Interval, clock: c.Now, log: c.Log, metrics: m,
		tried: make(chan struct{}), changed: make(chan struct{}), answers: make(chan struct{}),
		troubles: make(map[cause]error),
	}
	s.loader = loader{
		api:      api{client: c.Client, namespace: c.Namespace, td: c.TrustDomain},
		lifetime: c.RootLifetime, now: c.Now, anchors: c.Anchors,
		made: func(h *held) {
			c.Log.Warn("made the root of a new trust domain, since there never was one here; keep a backup: meshca backup",
				"trust_domain", c.TrustDomain.String(), "secret", SecretName(h.number), "subject", h.cert.Subject.String(), "ends", h.cert.NotAfter)
		},
		adopted: func(h *held) {
			c.Log.Warn("took over a root that this replica did not make; another one did, or somebody has put it there before the first start: compare the time and the writer",
				"trust_domain", c.TrustDomain.String(), "secret", SecretName(h.number), "sha256", mark(h.number, h.cert).Certificate,
				"created", h.origin.created, "written_by", h.origin.writers)
		},
	}
	return s, nil
}

// Run reads the objects, makes the first root in a namespace that never had one,
// and then looks after them until ctx is done; it returns nil then. A refusal is
// logged and tried again, since a restore heals it. Run must be called once.
func (s *Store) Run(ctx context.Context) error {
	failures := 0
	for first := true; ; first = false {
		err := s.turn(ctx)
		if first {
			close(s.tried)
		}
		wait := s.interval - s.interval/10 + rand.N(s.interval/5+1)
		if failures++; err == nil {
			failures = 0
		} else if s.snapshot() == nil {
			// Before the first success nothing can be signed at all.
			wait = min(wait, firstRetry<<min(failures-1, 5))
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// turn loads, or looks after what was loaded.
func (s *Store) turn(ctx context.Context) error {
	s.changes.Lock()
	defer s.changes.Unlock()
	before := s.snapshot()
	var now map[cause]error
	if before == nil {
		snap, err := s.load(ctx)
		now = map[cause]error{judge(err): err}
		if err == nil {
			s.publish(snap)
			s.log.Info("root and shared state read", "namespace", s.namespace, "root", SecretName(snap.state.Active),
				"epoch", snap.state.Epoch, "bundle_sequence", snap.state.Sequence)
		}
	} else {
		now = s.look(ctx, before)
	}
	if ctx.Err() != nil {
		return nil
	}
	return s.report(now)
}

// judge sorts an error of the start.
func judge(err error) cause {
	for _, target := range []any{new(*LostError), new(*CorruptError), new(*ReplacedError), new(*RollbackError), new(*VersionError), new(*TrustDomainError), new(*PlantedError)} {
		if errors.As(err, target) {
			return causeLost
		}
	}
	return causeUnreachable
}

// report notes what is wrong now, and logs what is new and what has gone.
func (s *Store) report(now map[cause]error) error {
	s.metrics.troubles(now)
	s.mu.Lock()
	before := s.troubles
	s.troubles = now
	s.mu.Unlock()
	var errs []error
	for _, c := range slices.Sorted(maps.Keys(now)) {
		err := now[c]
		if err == nil {
			continue
		}
		errs = append(errs, err)
		if was := before[c]; was == nil || was.Error() != err.Error() {
			s.log.Error("root and shared state in the cluster", "cause", string(c), "namespace", s.namespace, "error", err)
		}
	}
	for c, was := range before {
		if was != nil && now[c] == nil {
			s.log.Info("root and shared state in the cluster: mended", "cause", string(c), "namespace", s.namespace)
		}
	}
	return errors.Join(errs...)
}

// publish puts a snapshot into force.
func (s *Store) publish(snap *snapshot) {
	now := s.clock().Round(0)
	s.mu.Lock()
	defer s.mu.Unlock()
	moved := s.snap == nil || s.snap.state.Epoch != snap.state.Epoch
	other := s.refused
	if s.snap != nil {
		other = !s.snap.answersLike(snap)
	}
	s.snap, s.readAt = snap, now
	s.metrics.epoch.Set(float64(snap.state.Epoch))
	s.metrics.sequence.Set(float64(snap.state.Sequence))
	s.metrics.read.Set(float64(now.Unix()))
	if moved {
		close(s.changed)
		s.changed = make(chan struct{})
	}
	if other {
		close(s.answers)
		s.answers = make(chan struct{})
	}
}

// answersLike reports whether requests are answered as by o: with the same bundle,
// and from the same root.
func (s *snapshot) answersLike(o *snapshot) bool {
	return s.state.Sequence == o.state.Sequence && s.state.Active == o.state.Active &&
		slices.EqualFunc(s.bundle.Authorities(), o.bundle.Authorities(), (*x509.Certificate).Equal)
}

// Changed implements [ca.Changer]. Steps of a rotation that change neither the bundle
// nor the root that signs are no change.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answers
}

func (s *Store) snapshot() *snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snap
}

// State returns the shared state as this replica knows it, and a channel that is
// closed when it knows a newer one. ok is false before the first success.
func (s *Store) State() (state State, changed <-chan struct{}, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.snap == nil {
		return State{}, s.changed, false
	}
	state = s.snap.state
	state.Bundle = slices.Clone(state.Bundle)
	return state, s.changed, true
}

// Trouble returns what is wrong with the objects in the cluster, nil if nothing.
// It does not keep the CA from signing; see [Store.MaySign].
func (s *Store) Trouble() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, c := range causes {
		errs = append(errs, s.troubles[c])
	}
	return errors.Join(errs...)
}

// unread says why nothing is known.
func (s *Store) unread() error {
	if err := s.Trouble(); err != nil {
		return err
	}
	return fmt.Errorf("the roots in namespace %q have not been read yet", s.namespace)
}

// MaySign is for [ca.Config]: it returns a [*StaleError] while another issuer may
// have come into force that this replica has not heard of.
func (s *Store) MaySign() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.snap == nil || s.snap.state.Step == StepNone {
		return nil
	}
	age := s.clock().Round(0).Sub(s.readAt)
	if age < Patience {
		return nil
	}
	err := s.troubles[causeUnreachable]
	if err == nil {
		err = s.troubles[causeState]
	}
	return &StaleError{Age: age, Step: s.snap.state.Step, Err: err}
}

// SignIntermediate implements [ca.Upstream] with the active root. It waits for
// the first attempt to read the roots.
func (s *Store) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	select {
	case <-s.tried:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := s.MaySign(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	snap := s.snap
	s.refused = s.refused || snap == nil
	s.mu.Unlock()
	if snap == nil {
		return nil, fmt.Errorf("signing an intermediate: %w", s.unread())
	}
	active := snap.roots[snap.state.Active]
	root := ca.Root{
		TrustDomain: s.td, Certificate: active.cert, Now: s.clock,
		Key: func() (crypto.Signer, error) { return active.key, nil },
	}
	cert, err := root.Sign(ctx, req)
	if err != nil {
		return nil, err
	}
	return &ca.Signed{
		Chain: []*x509.Certificate{cert}, Roots: snap.bundle.Authorities(), Sequence: snap.state.Sequence,
	}, nil
}
