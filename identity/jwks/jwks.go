package jwks

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/identity/token"
)

const (
	// onDemand is the least time between two attempts to load a set. Anybody can
	// make up tokens with unknown key IDs; nobody can make us ask more often.
	onDemand = 10 * time.Second
	// loadTimeout bounds one attempt.
	loadTimeout = 5 * time.Second
	// maxWaiting bounds the callers that wait for an attempt. A source that hangs
	// would gather them, and whoever made up the key ID waits too.
	maxWaiting = 64
	// keepGone is how long a key outlives its removal from the set.
	keepGone = 60 * time.Second
)

// Config says what a Cache reads.
type Config struct {
	Source Source
	// Issuer names the issuer in log lines and as a label of the metrics.
	Issuer string
	// Now is the clock; time.Now if nil.
	Now func() time.Time
	// Log gets a line whenever the set changes, cannot be had, or can be had
	// again. slog's default is not used: nil means no log.
	Log *slog.Logger
	// Metrics, if any, gets the cache's metrics.
	Metrics prometheus.Registerer
}

// Cache holds the keys of one issuer. It is a [token.KeySource] and safe for
// concurrent use.
type Cache struct {
	source  Source
	issuer  string
	now     func() time.Time
	log     *slog.Logger
	metrics metrics

	keys atomic.Pointer[set]   // nil until the first good document
	why  atomic.Pointer[error] // what came of the last attempt, for Ready; nil before the first

	waiting chan struct{} // an item for each question that a load may answer
	begun   atomic.Uint64 // attempts to load that have begun
	loading chan struct{} // held (one item) while loading; guards what follows
	settled uint64        // number of the last attempt that was not broken off
	last    time.Time     // when the last attempt began
	err     error         // why the last attempt failed; nil if it did not
	hash    [sha256.Size]byte
}

// set is an immutable state of an issuer's keys.
type set struct {
	current map[string][]token.Key
	gone    []goneKey
}

// goneKey is a key that the issuer no longer publishes.
type goneKey struct {
	token.Key
	since time.Time
}

// usable reports whether the key may still be given out. A clock that was set
// back ends it too: the other mistake would keep the key for as long as the
// clock was off.
func (g goneKey) usable(now time.Time) bool {
	age := now.Sub(g.since)
	return age >= 0 && age < keepGone
}

// New makes a Cache, which loads nothing yet: [Cache.Run] does, or the first
// question.
func New(c Config) (*Cache, error) {
	if c.Source == nil {
		return nil, errors.New("key cache: it has no source")
	}
	if h, ok := c.Source.(HTTPS); ok {
		if err := h.validate(); err != nil {
			return nil, err
		}
	}
	k := &Cache{source: c.Source, issuer: c.Issuer, now: c.Now, log: c.Log, loading: make(chan struct{}, 1), waiting: make(chan struct{}, maxWaiting)}
	if k.now == nil {
		k.now = time.Now
	}
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	k.log = k.log.With("issuer", c.Issuer, "keys_from", c.Source.String())
	if err := k.metrics.register(c.Metrics, c.Issuer); err != nil {
		return nil, fmt.Errorf("key cache for issuer %q: %w", c.Issuer, err)
	}
	return k, nil
}

// Keys returns the keys that the issuer publishes under an ID, or published in
// the last minute. If there are none, the set is loaded again, unless that was
// tried less than 10 s ago.
//
// There being none is only said from a set that was loaded after the question;
// otherwise the error says why there is no such set, and whether the key exists
// is not known. A key can be published at any time, and a token that is signed
// with it must not be called bad because somebody asked for another one a second
// earlier.
func (k *Cache) Keys(ctx context.Context, kid string) ([]token.Key, error) {
	asked := k.begun.Load()
	if keys := k.held(kid); keys != nil {
		return keys, nil
	}
	select {
	case k.waiting <- struct{}{}:
		defer func() { <-k.waiting }()
	default:
		return nil, fmt.Errorf("%d callers wait for them already", maxWaiting)
	}
	select {
	case k.loading <- struct{}{}:
		defer func() { <-k.loading }()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for the keys: %w", context.Cause(ctx))
	}
	if keys := k.held(kid); keys != nil {
		return keys, nil // somebody else loaded them meanwhile
	}
	if since := k.now().Round(0).Sub(k.last); k.last.IsZero() || since >= onDemand || since < 0 {
		// Not the caller's context: one that hangs up at once must not use up the
		// attempt for everybody.
		k.load(context.WithoutCancel(ctx))
	}
	if keys := k.held(kid); keys != nil {
		return keys, nil
	}
	switch {
	case k.err != nil:
		return nil, k.err
	case k.settled <= asked:
		return nil, fmt.Errorf("key %.256q is not among them as they were last read, before it was asked for; they are read at most every %s", kid, onDemand)
	}
	return nil, nil
}

// Ready returns nil once the set has been loaded: from then on there are keys to
// verify with, if only the last good ones. Until then no token of the issuer can
// be verified, and the error says why. It never waits.
func (k *Cache) Ready() error {
	if k.keys.Load() != nil {
		return nil
	}
	if why := k.why.Load(); why != nil && *why != nil {
		return fmt.Errorf("no token of issuer %q can be verified: its keys have not been read since the start: %w", k.issuer, *why)
	}
	return fmt.Errorf("no token of issuer %q can be verified: its keys have not been read yet", k.issuer)
}

// held returns keys without loading any.
func (k *Cache) held(kid string) []token.Key {
	s := k.keys.Load()
	if s == nil {
		return nil
	}
	keys := s.current[kid]
	for _, g := range s.gone {
		if g.ID == kid && g.usable(k.now().Round(0)) {
			keys = append(slices.Clip(keys), g.Key)
		}
	}
	return keys
}

// Run loads the set now and then at intervals, until ctx ends: a file every
// 10 s, a URL every 5 min and, while it fails, every 10 s. It returns nil.
func (k *Cache) Run(ctx context.Context) error {
	for {
		wait, err := k.refresh(ctx)
		if err != nil {
			return nil
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

// refresh loads the set and returns how long to wait until the next time. The
// error is that ctx has ended.
func (k *Cache) refresh(ctx context.Context) (time.Duration, error) {
	select {
	case k.loading <- struct{}{}:
		defer func() { <-k.loading }()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	k.load(ctx)
	if k.err != nil {
		return onDemand, ctx.Err()
	}
	return k.source.interval(), ctx.Err()
}

// load makes one attempt. The caller holds k.loading.
func (k *Cache) load(ctx context.Context) {
	number := k.begun.Add(1)
	k.last = k.now().Round(0)
	bounded, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	document, err := k.source.Load(bounded)
	if err == nil {
		err = k.accept(document)
	}
	if err != nil && ctx.Err() != nil {
		return // Run is ending, which says nothing about the source
	}
	before := k.err
	k.err, k.settled = err, number
	k.why.Store(&err)
	k.metrics.loaded(err, k.now())
	switch {
	case err != nil && before != nil && err.Error() == before.Error():
		// Said already.
	case err != nil && k.keys.Load() != nil:
		k.log.Warn("the issuer's keys cannot be read again; the last good ones stay in use", "error", err)
	case err != nil:
		k.log.Error("the issuer's keys cannot be read; every token is refused until they can", "error", err)
	case before != nil:
		k.log.Info("the issuer's keys can be read again")
	}
}

// accept makes a document the current set.
func (k *Cache) accept(document []byte) error {
	hash := sha256.Sum256(document)
	old := k.keys.Load()
	if old != nil && hash == k.hash && len(old.gone) == 0 {
		return nil
	}
	keys, left, err := parse(document)
	if err != nil {
		return err
	}
	s := &set{current: keys}
	var added, removed []string
	if old != nil {
		s.gone, removed = old.without(keys, k.now().Round(0))
	}
	for kid := range keys {
		if old == nil || old.current[kid] == nil {
			added = append(added, kid)
		}
	}
	changed := hash != k.hash
	k.hash = hash
	k.keys.Store(s)
	if !changed {
		return nil
	}
	k.log.Info("the issuer's keys were read", "count", len(keys), "added", added, "removed", removed)
	for _, i := range left {
		k.log.Warn("a key in the issuer's set is left out", "kid", i.kid, "reason", i.reason)
	}
	return nil
}

// without returns the keys of s that are not among the new ones and may still be
// given out, and the IDs of those that have gone just now.
func (s *set) without(keys map[string][]token.Key, now time.Time) (gone []goneKey, removed []string) {
	among := func(k token.Key) bool {
		return slices.ContainsFunc(keys[k.ID], func(other token.Key) bool { return equal(k.Public, other.Public) })
	}
	for _, g := range s.gone {
		if !among(g.Key) && g.usable(now) {
			gone = append(gone, g)
		}
	}
	for kid, were := range s.current {
		for _, was := range were {
			if !among(was) {
				gone = append(gone, goneKey{was, now})
				removed = append(removed, kid)
			}
		}
	}
	return gone, removed
}
