package pods

import (
	"fmt"
	"sync"
	"time"
)

// fact is what is kept of one object.
type fact[T any] interface {
	key() string // pods: the UID; else namespace and name
	uid() string
	version() uint64
	says(T) bool
}

// Bounds on what is remembered beside the objects themselves. Losing one costs a
// lookup.
const (
	maxAhead = 4096
	maxGone  = 16384
	// aheadFor is how long something that was looked up may wait for a watch that
	// is heard from. After that the watch is past it for certain, whatever the
	// versions say: those of a restored etcd begin anew.
	aheadFor = 5 * time.Minute
)

// table holds all objects of one kind, as a watch reports them, and what live
// lookups have found that the watch has not reported yet. It is the store behind
// a reflector, which owns the methods of [cache.ReflectorStore].
type table[T fact[T]] struct {
	resource string
	convert  func(any) (T, bool)
	now      func() time.Time
	changed  func(key string) // called without mu; must not block

	mu      sync.Mutex
	held    map[string]T // by key
	reached uint64       // the version that the watch has come to
	synced  bool
	heard   time.Time // when the watch last reported anything
	ahead   map[string]found[T]
	gone    map[string]struct{} // UIDs of objects that are known not to exist any more
}

// found is what a lookup has found, and when.
type found[T any] struct {
	fact T
	at   time.Time
}

func newTable[T fact[T]](resource string, now func() time.Time, convert func(any) (T, bool)) *table[T] {
	return &table[T]{
		resource: resource, convert: convert, now: now, changed: func(string) {},
		held: make(map[string]T), ahead: make(map[string]found[T]), gone: make(map[string]struct{}),
	}
}

// get returns what is known of an object: what the watch says, or what was looked
// up since.
func (t *table[T]) get(key string) (T, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.getLocked(key)
}

func (t *table[T]) getLocked(key string) (T, bool) {
	f, ok := t.held[key]
	if a, looked := t.ahead[key]; looked && (!ok || a.fact.version() > f.version()) {
		return a.fact, true
	}
	return f, ok
}

// isGone reports whether the object with that UID is known not to exist any more.
// None ever comes back under its UID, short of a restored etcd, and what the watch
// has counts first.
func (t *table[T]) isGone(uid string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.gone[uid]
	return ok
}

// state says whether there ever was a whole list, and when the watch was heard last.
func (t *table[T]) state() (synced bool, heard time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.synced, t.heard
}

// hear notes that a watch has begun where the last one was: all that happened since
// is on its way, also if that is nothing.
func (t *table[T]) hear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.heard = t.now()
}

func (t *table[T]) size() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.held)
}

// remember keeps what a lookup has found until the watch has come as far. If it
// has already, it knows better.
func (t *table[T]) remember(f T) {
	t.mu.Lock()
	if f.version() > t.reached {
		if len(t.ahead) >= maxAhead {
			dropAny(t.ahead)
		}
		t.ahead[f.key()] = found[T]{f, t.now()}
	}
	t.mu.Unlock()
	t.changed(f.key())
}

// forget notes that the object with that UID does not exist any more, as a lookup
// has found.
func (t *table[T]) forget(uid string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.goneLocked(uid)
}

func (t *table[T]) goneLocked(uid string) {
	if _, ok := t.gone[uid]; !ok && len(t.gone) >= maxGone {
		dropAny(t.gone)
	}
	t.gone[uid] = struct{}{}
}

func dropAny[V any](m map[string]V) {
	for k := range m {
		delete(m, k)
		return
	}
}

// Replace takes a whole list. What was there and is not in it has been deleted
// while nobody watched.
func (t *table[T]) Replace(list []any, version string) error {
	next := make(map[string]T, len(list))
	for _, o := range list {
		f, ok := t.convert(o)
		if !ok {
			return fmt.Errorf("a list of %s holds a %T", t.resource, o)
		}
		next[f.key()] = f
	}
	t.mu.Lock()
	var changed []string
	for key, f := range next {
		if old, ok := t.held[key]; !ok || !old.says(f) {
			changed = append(changed, key)
			if ok && old.uid() != f.uid() {
				t.goneLocked(old.uid())
			}
		}
	}
	for key, old := range t.held {
		if _, ok := next[key]; !ok {
			changed = append(changed, key)
			t.goneLocked(old.uid())
		}
	}
	t.held, t.synced = next, true
	// Not the higher of the two: etcd that was restored counts from lower again.
	t.reached = versionOf(version)
	changed = append(changed, t.caughtUpLocked()...)
	t.mu.Unlock()
	for _, key := range changed {
		t.changed(key)
	}
	return nil
}

// Add takes an object that has appeared.
func (t *table[T]) Add(o any) error { return t.Update(o) }

// Update takes an object that has changed.
func (t *table[T]) Update(o any) error {
	f, ok := t.convert(o)
	if !ok {
		return fmt.Errorf("a watch of %s reports a %T", t.resource, o)
	}
	t.mu.Lock()
	old, had := t.held[f.key()]
	told := had && old.says(f)
	if !had || f.version() >= old.version() { // else it is a repetition
		t.held[f.key()] = f
		if had && old.uid() != f.uid() {
			t.goneLocked(old.uid())
		}
	}
	t.mu.Unlock()
	if !told {
		t.changed(f.key())
	}
	return nil
}

// Delete takes an object that is gone.
func (t *table[T]) Delete(o any) error {
	f, ok := t.convert(o)
	if !ok {
		return fmt.Errorf("a watch of %s reports the deletion of a %T", t.resource, o)
	}
	t.mu.Lock()
	// One that has its name may be there already.
	if old, had := t.held[f.key()]; had && old.uid() == f.uid() {
		delete(t.held, f.key())
	}
	if a, had := t.ahead[f.key()]; had && a.fact.uid() == f.uid() {
		delete(t.ahead, f.key())
	}
	t.goneLocked(f.uid())
	t.mu.Unlock()
	t.changed(f.key())
	return nil
}

// Resync has no meaning here.
func (t *table[T]) Resync() error { return nil }

// UpdateResourceVersion learns how far the watch has come, from each event and
// from bookmarks, which come about once a minute while nothing happens.
func (t *table[T]) UpdateResourceVersion(version string) {
	t.mu.Lock()
	t.reached = max(t.reached, versionOf(version))
	changed := t.caughtUpLocked()
	t.mu.Unlock()
	for _, key := range changed {
		t.changed(key)
	}
}

// caughtUpLocked lets go of what was looked up before the watch was where it is
// now, and returns what is known otherwise for that.
func (t *table[T]) caughtUpLocked() (changed []string) {
	now := t.now()
	t.heard = now
	for key, a := range t.ahead {
		if a.fact.version() > t.reached && now.Sub(a.at) < aheadFor {
			continue
		}
		delete(t.ahead, key)
		if f, ok := t.held[key]; !ok || !f.says(a.fact) {
			changed = append(changed, key)
		}
		if f, ok := t.held[key]; a.fact.version() <= t.reached && (!ok || f.uid() != a.fact.uid()) {
			t.goneLocked(a.fact.uid())
		}
	}
	return changed
}

// all returns what get would say of each object.
func (t *table[T]) all() []T {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]T, 0, len(t.held))
	for key := range t.held {
		f, _ := t.getLocked(key)
		all = append(all, f)
	}
	for key, a := range t.ahead {
		if _, ok := t.held[key]; !ok {
			all = append(all, a.fact)
		}
	}
	return all
}
