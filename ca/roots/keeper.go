package roots

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

const (
	// DefaultSettle is how long a root is in the bundle before a chain may end in it:
	// the slowest way of a bundle to a workload is a file that the kubelet projects.
	DefaultSettle = 5 * time.Minute
	// DefaultInterval is how often the record is looked at.
	DefaultInterval = 5 * time.Second

	// margin is what a certificate can outlive its ceiling by, with clocks that differ,
	// and how late a replica may see that its operator has added a root.
	margin = 10 * time.Minute
	// noteEvery is how often it is written down that a root is still signed under.
	noteEvery = 10 * time.Minute

	requestTimeout = 10 * time.Second
	attempts       = 8 // at a record that others change
)

// Config is what a [Keeper] is made from.
type Config struct {
	TrustDomain identity.TrustDomain // required
	Store       Store                // required
	// Ceiling is the longest life of a leaf; required. A root is needed for that long
	// after the last certificate under it.
	Ceiling  time.Duration
	Settle   time.Duration    // zero means [DefaultSettle]
	Interval time.Duration    // zero means [DefaultInterval]
	Now      func() time.Time // required
	Log      *slog.Logger     // nil means no log
}

// Keeper is one replica's view of the record. Its methods are safe for concurrent use.
type Keeper struct {
	conf Config

	changes sync.Mutex // one change at a time

	mu      sync.Mutex // guards what follows
	held    *snapshot  // nil before the record was read or made
	changed chan struct{}
	anchor  *x509.Certificate   // what this replica signs under; nil before the first
	shown   []*x509.Certificate // what its upstream shows
	trouble error               // why the last look failed
}

var _ ca.RootKeeper = (*Keeper)(nil)

// New checks the configuration. It reads nothing.
func New(c Config) (*Keeper, error) {
	if c.TrustDomain.IsZero() || c.Store == nil || c.Ceiling <= 0 || c.Now == nil {
		return nil, errors.New("roots: TrustDomain, Store, Ceiling and Now must all be given")
	}
	if c.Settle == 0 {
		c.Settle = DefaultSettle
	}
	if c.Interval == 0 {
		c.Interval = DefaultInterval
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Keeper{conf: c, changed: make(chan struct{})}, nil
}

// Bundle implements [ca.RootKeeper].
func (k *Keeper) Bundle() (*identity.Bundle, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.held == nil {
		return nil, k.changed
	}
	return k.held.bundle, k.changed
}

// Trouble says why the record could not be read or written when that was tried last;
// nil if it could. The bundle in force stays.
func (k *Keeper) Trouble() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.trouble
}

// Judge says whether a chain that ends in anchor may come into use while the upstream
// shows these roots, by what this replica knows. Before it has read the record it
// knows nothing against it; [Keeper.Agree] has the last word.
//
// Errors: [*UntrustedError], [*OrphanError].
func (k *Keeper) Judge(anchor *x509.Certificate, roots []*x509.Certificate) error {
	k.mu.Lock()
	held := k.held
	k.mu.Unlock()
	if held == nil {
		return nil
	}
	return k.judge(held, anchor, roots, k.now())
}

func (k *Keeper) judge(s *snapshot, anchor *x509.Certificate, roots []*x509.Certificate, now time.Time) error {
	living := false
	for _, r := range s.roots {
		if r.signed.IsZero() || now.After(k.neededUntil(r.signed)) {
			continue
		}
		living = true
		if !slices.ContainsFunc(roots, r.cert.Equal) {
			return &OrphanError{Root: r.cert, Until: k.neededUntil(r.signed)}
		}
	}
	if !living {
		return nil // nobody is left who could be cut off
	}
	i := s.find(anchor)
	if i < 0 {
		return &UntrustedError{Root: anchor}
	}
	if added := s.roots[i].added; !added.IsZero() && now.Before(added.Add(k.conf.Settle)) {
		return &UntrustedError{Root: anchor, Ready: added.Add(k.conf.Settle)}
	}
	return nil
}

// neededUntil is when the last certificate has ended that can have been issued by t.
func (k *Keeper) neededUntil(t time.Time) time.Time { return t.Add(k.conf.Ceiling + margin) }

// Agree implements [ca.RootKeeper]. Besides those of [Keeper.Judge] its errors are
// [*CorruptError] and what the store says.
func (k *Keeper) Agree(ctx context.Context, anchor *x509.Certificate, roots []*x509.Certificate) (*identity.Bundle, error) {
	s, err := k.change(ctx, func(s *snapshot, now time.Time) ([]root, error) {
		if s == nil {
			return firstRoots(anchor, roots, now), nil
		}
		if err := k.judge(s, anchor, roots, now); err != nil {
			return nil, err
		}
		next := slices.Clone(s.roots)
		for _, c := range roots {
			if s.find(c) < 0 {
				next = append(next, root{cert: c, added: now})
			}
		}
		for i := range next {
			if next[i].cert.Equal(anchor) {
				next[i].signed = now
			}
		}
		return next, nil
	})
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.anchor, k.shown = anchor, slices.Clone(roots)
	return s.bundle, nil
}

// firstRoots is the first bundle: whoever gets one has all of it.
func firstRoots(anchor *x509.Certificate, roots []*x509.Certificate, now time.Time) []root {
	var first []root
	for _, c := range roots {
		r := root{cert: c}
		if c.Equal(anchor) {
			r.signed = now
		}
		first = append(first, r)
	}
	return first
}

// Run looks after the record until ctx ends, and returns nil then: it takes over what
// other replicas have changed, notes that a root is still signed under, takes roots
// out that nobody needs, and puts back a record that was lost or damaged. It must be
// called once.
func (k *Keeper) Run(ctx context.Context) error {
	for {
		timer := time.NewTimer(k.conf.Interval - k.conf.Interval/10 + rand.N(k.conf.Interval/5+1))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		_, err := k.change(ctx, k.upkeep)
		if ctx.Err() != nil {
			return nil
		}
		k.report(err)
	}
}

// upkeep is what becomes of the roots without anybody's doing.
func (k *Keeper) upkeep(s *snapshot, now time.Time) ([]root, error) {
	if s == nil {
		return nil, nil
	}
	k.mu.Lock()
	anchor, shown := k.anchor, k.shown
	k.mu.Unlock()
	if anchor == nil {
		return s.roots, nil // this replica has signed nothing: it only watches
	}
	var next []root
	for _, r := range s.roots {
		if r.cert.Equal(anchor) && now.Sub(r.signed) >= noteEvery {
			r.signed = now
		}
		// Another replica may see a new root earlier: what was added lately stays.
		last := r.added
		if r.signed.After(last) {
			last = r.signed
		}
		if !slices.ContainsFunc(shown, r.cert.Equal) && now.After(k.neededUntil(last)) {
			k.conf.Log.Info("a root leaves the bundle: the upstream shows it no more, and nothing can be alive under it", "root", describe(r.cert))
			continue
		}
		next = append(next, r)
	}
	return next, nil
}

// change reads the record, and writes what f makes of its roots; nil is none. It puts
// into force, and returns, what then is in the store.
func (k *Keeper) change(ctx context.Context, f func(s *snapshot, now time.Time) ([]root, error)) (*snapshot, error) {
	k.changes.Lock()
	defer k.changes.Unlock()
	var err error
	for range attempts {
		var s *snapshot
		if s, err = k.tryChange(ctx, f); !errors.Is(err, ErrConflict) {
			return s, err
		}
	}
	return nil, fmt.Errorf("writing the record of the roots: %w", err)
}

func (k *Keeper) tryChange(ctx context.Context, f func(s *snapshot, now time.Time) ([]root, error)) (*snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	data, version, err := k.conf.Store.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the record of the roots: %w", err)
	}
	base, err := k.base(data, version)
	if err != nil {
		return nil, err
	}
	now := k.now()
	roots, err := f(base, now)
	if err != nil || roots == nil {
		return nil, err
	}
	next, err := k.successor(base, roots, now)
	if err != nil {
		return nil, err
	}
	text := next.encode()
	if !bytes.Equal(text, data) {
		if err := k.conf.Store.Save(ctx, text, version); err != nil {
			return nil, err
		}
	}
	k.publish(next)
	return next, nil
}

// base is the newest that is known: what is in the store, unless that is gone, damaged
// or older than what this replica has told others already.
func (k *Keeper) base(data []byte, version string) (*snapshot, error) {
	k.mu.Lock()
	held := k.held
	k.mu.Unlock()
	if version == "" {
		if held != nil {
			k.conf.Log.Warn("the record of the roots was deleted and is put back from memory", "bundle_sequence", held.sequence)
		}
		return held, nil
	}
	s, err := parse(k.conf.TrustDomain, data)
	switch {
	case held != nil && errors.As(err, new(*CorruptError)):
		k.conf.Log.Warn("the record of the roots was damaged and is put back from memory", "bundle_sequence", held.sequence, "error", err)
		return held, nil
	case err != nil:
		return nil, err
	case held != nil && (s.sequence < held.sequence || s.sequence == held.sequence && !s.sameRoots(held)):
		k.conf.Log.Warn("the record of the roots was replaced by an older or another one and is put back from memory", "bundle_sequence", held.sequence, "found", s.sequence)
		return held, nil
	}
	return s, nil
}

// successor is the snapshot with these roots after base, which may be nil.
func (k *Keeper) successor(base *snapshot, roots []root, now time.Time) (*snapshot, error) {
	next, err := newSnapshot(k.conf.TrustDomain, 1, roots)
	if err != nil {
		return nil, err
	}
	if base != nil && next.sameRoots(base) {
		return newSnapshot(k.conf.TrustDomain, base.sequence, roots)
	}
	sequence := uint64(max(1, now.Unix()))
	if base != nil {
		sequence = max(sequence, base.sequence+1)
	}
	return newSnapshot(k.conf.TrustDomain, sequence, roots)
}

// publish puts a snapshot into force.
func (k *Keeper) publish(s *snapshot) {
	k.mu.Lock()
	other := k.held == nil || k.held.sequence != s.sequence
	if !other {
		s = &snapshot{sequence: s.sequence, roots: s.roots, bundle: k.held.bundle}
	}
	k.held = s
	if other {
		close(k.changed)
		k.changed = make(chan struct{})
	}
	k.mu.Unlock()
	if other {
		k.conf.Log.Info("roots of the mesh", "bundle_sequence", s.sequence, "roots", len(s.roots))
	}
}

// report notes what went wrong, and logs what is new.
func (k *Keeper) report(err error) {
	k.mu.Lock()
	before := k.trouble
	k.trouble = err
	k.mu.Unlock()
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		k.conf.Log.Error("the record of the roots; the bundle in force stays", "error", err)
	case err == nil && before != nil:
		k.conf.Log.Info("the record of the roots can be read again")
	}
}

// now is the wall clock in the form in which it is written.
func (k *Keeper) now() time.Time { return k.conf.Now().UTC().Truncate(time.Second) }
