package state

import (
	"context"
	"errors"
	"fmt"

	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// Restored tells what [Backup.Restore] did.
type Restored struct {
	Created  []string `json:"created"`
	Replaced []string `json:"replaced"`
	Kept     []string `json:"kept"` // was there and good
	Sequence uint64   `json:"sequence"`
	Epoch    uint64   `json:"epoch"`
}

// restorer is one restore under way.
type restorer struct {
	api
	backup *Backup
	newest bool
	done   Restored

	marker      Marker // that is to be
	haveMarker  stored
	markerAsIs  bool
	state       State // that is to be
	haveState   stored
	stateAsIs   bool
	missingRoot []*held
}

// Restore puts back what is missing in a namespace. All is judged before anything
// is written: a root that is there and another one is refused with a
// [*ReplacedError], and a backup that is older than what there has been with a
// [*RollbackError], unless asNewest says that what it holds is to be the newest
// version. Restore can be repeated after whatever error.
func (b *Backup) Restore(ctx context.Context, client typedcorev1.CoreV1Interface, namespace string, asNewest bool) (*Restored, error) {
	r := &restorer{
		api:    api{client: client, namespace: namespace, td: b.td},
		backup: b, newest: asNewest,
		done: Restored{Created: []string{}, Replaced: []string{}, Kept: []string{}},
	}
	for _, judge := range []func(context.Context) error{r.judgeMarker, r.judgeRoots, r.judgeState} {
		if err := judge(ctx); err != nil {
			return nil, err
		}
	}
	if err := r.write(ctx); err != nil {
		return nil, fmt.Errorf("%w; what is written so far is right, run the same again", err)
	}
	return &r.done, nil
}

func (r *restorer) judgeMarker(ctx context.Context) (err error) {
	if r.haveMarker, err = r.readMarker(ctx); err != nil {
		return err
	}
	r.marker = r.backup.Marker
	if !r.haveMarker.found() {
		return nil
	}
	m, err := parseMarker("ConfigMap "+MarkerName, r.haveMarker.text, r.td)
	if errors.As(err, new(*CorruptError)) {
		return nil // whatever it knew is not to be had; it is replaced
	}
	if err != nil {
		return err
	}
	if r.marker, err = m.join(r.backup.Marker); err != nil {
		return err
	}
	r.markerAsIs = r.marker.equal(m)
	return nil
}

func (r *restorer) judgeRoots(ctx context.Context) error {
	for _, h := range r.backup.roots {
		have, err := r.readRoot(ctx, h.number)
		if err != nil {
			return err
		}
		if have == nil {
			r.missingRoot = append(r.missingRoot, h)
			continue
		}
		if err := have.matches(mark(h.number, h.cert)); err != nil {
			return err
		}
		r.done.Kept = append(r.done.Kept, "Secret "+SecretName(h.number))
	}
	return nil
}

func (r *restorer) judgeState(ctx context.Context) (err error) {
	if r.haveState, err = r.readState(ctx); err != nil {
		return err
	}
	object, want := "ConfigMap "+StateName, r.backup.State
	if r.haveState.found() {
		have, err := parseState(object, r.haveState.text, r.td, r.marker)
		switch {
		case errors.As(err, new(*TrustDomainError)), errors.As(err, new(*VersionError)):
			return err
		case err == nil && (have.equal(want) || have.follows(want) && !r.newest):
			// The same, or newer than the backup: then that is in force.
			r.state, r.stateAsIs = have, true
			return nil
		case err == nil:
			r.marker = r.marker.raised(have)
		}
	}
	r.state = want
	r.state.Epoch = max(want.Epoch, r.marker.Epoch) + 1
	if want.Sequence < r.marker.Sequence {
		if !r.newest {
			return &RollbackError{Object: "the backup", What: "sequence", Have: want.Sequence, Highest: r.marker.Sequence}
		}
		// What agents hold has the higher number: only a still higher one moves them.
		r.state.Sequence = r.marker.Sequence + 1
	}
	return r.state.check(r.marker)
}

// write goes from the object that stops a CA to the one that lets it go on: a
// replica that looks in the middle refuses, and makes nothing.
func (r *restorer) write(ctx context.Context) error {
	if !r.markerAsIs {
		if err := r.writeMarker(ctx, r.haveMarker, r.marker); err != nil {
			return err
		}
	}
	r.note(r.markerAsIs, r.haveMarker.found(), "ConfigMap "+MarkerName)
	for _, h := range r.missingRoot {
		if err := r.createRoot(ctx, h); err != nil {
			return err
		}
		r.note(false, false, "Secret "+SecretName(h.number))
	}
	if !r.stateAsIs {
		if err := r.writeState(ctx, r.haveState, r.state); err != nil {
			return err
		}
	}
	r.note(r.stateAsIs, r.haveState.found(), "ConfigMap "+StateName)
	r.done.Sequence, r.done.Epoch = r.state.Sequence, r.state.Epoch
	return nil
}

func (r *restorer) note(asIs, was bool, object string) {
	switch {
	case asIs:
		r.done.Kept = append(r.done.Kept, object)
	case was:
		r.done.Replaced = append(r.done.Replaced, object)
	default:
		r.done.Created = append(r.done.Created, object)
	}
}
