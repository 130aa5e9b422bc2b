package state

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// look compares what is in the cluster with what is in memory, puts back what
// was deleted, damaged or replaced by something older, and takes over what is
// newer. It returns what it could not mend.
func (s *Store) look(ctx context.Context, mem *snapshot) map[cause]error {
	found := make(map[cause]error)
	note := func(c cause, err error) {
		if err == nil || outrun(err) {
			return // whoever came first has written; the next round will see
		}
		if !errors.As(err, new(*refusal)) {
			c = causeUnreachable
		}
		found[c] = errors.Join(found[c], err)
	}
	marker, err := s.lookMarker(ctx, mem)
	note(causeMarker, err)
	if err == nil {
		mem = &snapshot{marker: marker, state: mem.state, roots: mem.roots, bundle: mem.bundle}
		next, err := s.lookState(ctx, mem)
		note(causeState, err)
		if err == nil {
			s.publish(next)
			mem = next
			if next.state.Epoch > marker.Epoch {
				_, err = s.lookMarker(ctx, next)
				note(causeMarker, err)
			}
		}
	}
	for _, n := range slices.Sorted(maps.Keys(mem.roots)) {
		note(causeRoot, s.lookRoot(ctx, mem.roots[n]))
	}
	return found
}

// refusal is an error about an object's content, and not about reading it.
type refusal struct{ error }

func (r *refusal) Unwrap() error { return r.error }

func refuse(err error) error { return &refusal{err} }

// lookMarker returns the marker that knows all that the cluster and this memory
// know, after it has been written.
func (s *Store) lookMarker(ctx context.Context, mem *snapshot) (Marker, error) {
	read, err := s.readMarker(ctx)
	if err != nil {
		return Marker{}, err
	}
	known := mem.marker.raised(mem.state)
	if read.found() {
		marker, err := parseMarker("ConfigMap "+MarkerName, read.text, s.td)
		switch {
		case errors.As(err, new(*CorruptError)):
			// Ours is put in its place.
		case err != nil:
			return Marker{}, refuse(err)
		default:
			if known, err = known.join(marker); err != nil {
				return Marker{}, refuse(err)
			}
			if known.equal(marker) {
				return known, nil
			}
		}
	}
	if err := s.writeMarker(ctx, read, known); err != nil {
		return Marker{}, err
	}
	if !read.found() || known.equal(mem.marker) {
		s.restored("marker", MarkerName, read.found())
	}
	return known, nil
}

// lookState returns the snapshot to go by from now on.
func (s *Store) lookState(ctx context.Context, mem *snapshot) (*snapshot, error) {
	read, err := s.readState(ctx)
	if err != nil {
		return nil, err
	}
	if read.found() {
		state, err := parseState("ConfigMap "+StateName, read.text, s.td, mem.marker)
		switch {
		case err == nil && state.equal(mem.state):
			return mem, nil
		case err == nil && state.follows(mem.state):
			return s.takeOver(ctx, mem, state)
		case errors.As(err, new(*VersionError)), errors.As(err, new(*TrustDomainError)):
			return nil, refuse(err)
		}
	}
	// Gone, damaged, older, or changed without a new epoch.
	if mem.state.Epoch < mem.marker.Epoch {
		return nil, refuse(fmt.Errorf("ConfigMap %s is gone or older than the newest, and this replica knows epoch %d while the marker has seen %d; a replica that knows the newest puts it back, or: meshca restore",
			StateName, mem.state.Epoch, mem.marker.Epoch))
	}
	state := mem.state
	state.Epoch++
	if err := s.writeState(ctx, read, state); err != nil {
		return nil, err
	}
	s.restored("state", StateName, read.found())
	return newSnapshot(s.td, mem.marker, state, mem.roots)
}

// follows reports whether s can be what a replica has made of o.
func (s State) follows(o State) bool {
	same := slices.Equal(s.Bundle, o.Bundle)
	return s.Epoch > o.Epoch && s.Sequence >= o.Sequence && (same || s.Sequence > o.Sequence)
}

// takeOver goes on to a newer state, with the roots that it needs.
func (s *Store) takeOver(ctx context.Context, mem *snapshot, state State) (*snapshot, error) {
	roots := make(map[int]*held)
	for _, m := range mem.marker.Roots {
		if m.Retired {
			continue
		}
		if h := mem.roots[m.Number]; h != nil {
			roots[m.Number] = h
			continue
		}
		h, err := s.wanted(ctx, m)
		if err != nil && slices.Contains(state.Bundle, m.Number) {
			return nil, refuse(fmt.Errorf("taking over epoch %d of the shared state: %w", state.Epoch, err))
		}
		if err == nil {
			roots[m.Number] = h
		}
	}
	s.log.Info("shared state changed", "epoch", state.Epoch, "bundle_sequence", state.Sequence, "root", SecretName(state.Active), "step", string(state.Step))
	return newSnapshot(s.td, mem.marker, state, roots)
}

// lookRoot puts a Secret back that was deleted, and reports one that was made
// anew with other content. What memory holds stays in force either way.
func (s *Store) lookRoot(ctx context.Context, h *held) error {
	read, err := s.readRoot(ctx, h.number)
	if errors.As(err, new(*CorruptError)) {
		return refuse(fmt.Errorf("%w; this replica signs on with the right root from memory, and creates the Secret again once it is deleted", err))
	}
	if err != nil {
		return err
	}
	if read == nil {
		if err := s.createRoot(ctx, h); err != nil {
			return err
		}
		s.restored("root", SecretName(h.number), false)
		return nil
	}
	if err := read.matches(mark(h.number, h.cert)); err != nil {
		return refuse(err)
	}
	return nil
}

func (s *Store) restored(kind, name string, edited bool) {
	s.metrics.restored.WithLabelValues(kind).Inc()
	was := "deleted"
	if edited {
		was = "edited"
	}
	s.log.Warn("an object was "+was+" and is put back from memory", "namespace", s.namespace, "object", name)
}

// Advance writes the state that follows from, which is what the decision was
// based on: whoever has decided on an older one gets an [*EpochError], however
// long it was asleep and whatever lease it believes to hold. The epoch is set
// here. The new state is in force when Advance returns nil.
func (s *Store) Advance(ctx context.Context, from, to State) error {
	s.changes.Lock()
	defer s.changes.Unlock()
	mem := s.snapshot()
	if mem == nil {
		return fmt.Errorf("changing the shared state: %w", s.unread())
	}
	// The state that is replaced is noted in the marker first, which so is never
	// more than one epoch behind.
	marker, err := s.lookMarker(ctx, mem)
	if err != nil {
		return err
	}
	read, err := s.readState(ctx)
	if err != nil {
		return err
	}
	current, err := parseState("ConfigMap "+StateName, read.text, s.td, marker)
	if err != nil {
		return err
	}
	if !current.equal(from) {
		return &EpochError{Based: from.Epoch, Found: current.Epoch}
	}
	to.Version, to.TrustDomain, to.Epoch = version, s.td.String(), from.Epoch+1
	if err := to.check(marker); err != nil {
		return fmt.Errorf("changing the shared state: %w", err)
	}
	if !to.follows(from) {
		return fmt.Errorf("changing the shared state: the bundle goes from %v to %v and its sequence from %d to %d; it must rise with each change and never fall",
			from.Bundle, to.Bundle, from.Sequence, to.Sequence)
	}
	base := &snapshot{marker: marker, state: mem.state, roots: mem.roots, bundle: mem.bundle}
	next, err := s.takeOver(ctx, base, to)
	if err != nil {
		return err
	}
	if err := s.writeState(ctx, read, to); err != nil {
		return s.outcome(ctx, from, to, next, err)
	}
	s.publish(next)
	return s.raiseMarker(ctx, next)
}

// raiseMarker has the marker tell of a state that is written. Another replica that saw
// the state may be doing the same at this moment; then what it wrote is looked at.
func (s *Store) raiseMarker(ctx context.Context, next *snapshot) (err error) {
	for range 4 {
		if _, err = s.lookMarker(ctx, next); !outrun(err) {
			return err
		}
	}
	return err
}

// outcome finds out what became of a write whose answer was an error.
func (s *Store) outcome(ctx context.Context, from, to State, next *snapshot, cause error) error {
	read, err := s.readState(ctx)
	if err != nil {
		return errors.Join(cause, err)
	}
	if read.text == string(encode(to)) {
		s.publish(next)
		return s.raiseMarker(ctx, next)
	}
	if outrun(cause) {
		var found State
		_ = decode(StateName, read.text, s.td, &found) // zero says that it could not be read
		return &EpochError{Based: from.Epoch, Found: found.Epoch}
	}
	return cause
}
