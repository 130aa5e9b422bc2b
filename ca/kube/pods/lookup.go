package pods

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/singleflight"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/kube/budget"
)

// limits are those of lookups, apart from those of lists and watches.
var limits = budget.Limits{Timeout: 3 * time.Second, AtOnce: 16, PerNode: 4, Waiting: 256, PerSecond: 50, Burst: 100}

// errNotThere says that the API server has no such object.
var errNotThere = errors.New("there is no such object")

// lookups ask the API server for single objects.
type lookups struct {
	budget  *budget.Budget
	flights singleflight.Group
	now     func() time.Time
	count   func(resource, result string)
	trouble *troubles
}

func newLookups(now func() time.Time, trouble *troubles, count func(resource, result string)) *lookups {
	return &lookups{budget: budget.New(limits, now), now: now, count: count, trouble: trouble}
}

// ask returns what is known, or calls get within the budget and the deadline and has
// keep take what that returns. All who ask for one object at once share one call. The
// error is errNotThere if the API server says so.
func ask[T any](ctx context.Context, l *lookups, resource, node, key string, known func() (T, bool), get func(context.Context) (T, error), keep func(T)) (T, error) {
	answer := l.flights.DoChan(resource+" "+key, func() (any, error) {
		// Another call may have ended since this one was found to be needed.
		f, ok := known()
		if ok {
			return f, nil
		}
		// Whoever came first may leave; the others still want it.
		err := l.budget.Do(context.WithoutCancel(ctx), node, func(ctx context.Context) error {
			var err error
			f, err = get(ctx)
			return err
		})
		l.note(resource, err)
		if err == nil {
			keep(f)
		}
		return f, err
	})
	var none T
	select {
	case r := <-answer:
		if r.Err != nil {
			if apierrors.IsNotFound(r.Err) {
				return none, errNotThere
			}
			return none, explain("get", resource, r.Err)
		}
		return r.Val.(T), nil
	case <-ctx.Done():
		return none, fmt.Errorf("get %s: %w", resource, context.Cause(ctx))
	}
}

func (l *lookups) note(resource string, err error) {
	switch {
	case err == nil:
		l.count(resource, "found")
	case apierrors.IsNotFound(err):
		l.count(resource, "not_found")
		err = nil
	default:
		l.count(resource, "error")
	}
	if err == nil || apierrors.IsForbidden(err) { // all else is this lookup's own
		l.trouble.note("get", resource, err)
	}
}

// find returns an object that is good, from the table or, where the table has
// none, from the API server: it may be newer than what the watch has reported.
// What is not known to be good or gone afterwards is an UnavailableError. The
// object is not good if the API server has another, or none (ok is false).
func find[T fact[T]](ctx context.Context, l *lookups, t *table[T], node, key, uid string, good func(T) bool, get func(context.Context) (T, error)) (f T, ok bool, err error) {
	synced, heard := t.state()
	if !synced {
		return f, false, unavailable(fmt.Errorf("the cluster's %s have not been read yet%s", t.resource, because(l.trouble.of(t.resource))))
	}
	known := func() (T, bool) {
		f, ok := t.get(key)
		return f, ok && good(f)
	}
	if f, ok = known(); ok {
		return f, true, nil
	}
	if uid != "" && t.isGone(uid) {
		return f, false, nil
	}
	if age := l.now().Round(0).Sub(heard.Round(0)); age > staleAfter {
		return f, false, unavailable(fmt.Errorf("%s %s is not known, and nothing has been heard of the cluster's %s for %v (more than %v)%s",
			t.resource, key, t.resource, age.Round(time.Second), staleAfter, because(l.trouble.of(t.resource))))
	}
	keep := func(live T) {
		if uid == "" || live.uid() == uid {
			t.remember(live)
		} else {
			t.forget(uid)
		}
	}
	live, err := ask(ctx, l, t.resource, node, key+" "+uid, known, get, keep)
	switch {
	case errors.Is(err, errNotThere):
		if uid != "" {
			t.forget(uid)
		}
		return f, false, nil
	case err != nil:
		return f, false, unavailable(fmt.Errorf("%s %s is not known yet, and cannot be looked up: %w", t.resource, key, err))
	}
	return live, uid == "" || live.uid() == uid, nil
}

func because(trouble string) string {
	if trouble == "" {
		return ""
	}
	return ": " + trouble
}

func unavailable(err error) error { return &caller.UnavailableError{Err: err} }
