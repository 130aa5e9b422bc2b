package pods

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/meshca/meshca/ca/kube/watches"
)

const (
	// pageSize is how many objects of a list are in memory whole at once.
	pageSize    = 500
	pageTimeout = 30 * time.Second
)

// A feed tries again within 6 s however long there was no list to be had, so that what
// happened meanwhile is known soon after the API server is back. Where one is had and
// no watch goes on from it, or where it takes somebody to grant what is missing, it
// does so less and less, at last each 15 s: lists are costly.
var (
	unlisted  = wait.Backoff{Duration: 500 * time.Millisecond, Cap: 4 * time.Second, Steps: 20, Factor: 2, Jitter: 0.5}
	unwatched = wait.Backoff{Duration: 500 * time.Millisecond, Cap: 10 * time.Second, Steps: 20, Factor: 2, Jitter: 0.5}
)

// feed keeps one table current. It is the reflector's way to the API server.
type feed struct {
	resource string
	table    cache.ReflectorStore
	example  any // of the objects
	list     func(context.Context, meta.ListOptions) (runtime.Object, error)
	watch    func(context.Context, meta.ListOptions) (watch.Interface, error)
	trouble  *troubles
	begun    func() // a watch has, where the last one was
}

// run follows the resource until ctx ends. It is the loop that the reflector has
// itself, without its way of telling errors, which is the whole process's.
func (f *feed) run(ctx context.Context) {
	quiet := logr.Discard() // what goes wrong is told by troubles, once
	r := cache.NewReflectorWithOptions(f, f.example, f.table, cache.ReflectorOptions{
		Name: f.resource, TypeDescription: f.resource, Backoff: &unlisted, Logger: &quiet,
	})
	r.WatchListPageSize = pageSize
	ctx = klog.NewContext(ctx, quiet)
	away, no := unlisted, unwatched
	for ctx.Err() == nil {
		began := time.Now()
		err := r.ListAndWatchWithContext(ctx) // noted where it went wrong
		if time.Since(began) > watches.Lasts {
			away, no = unlisted, unwatched
		}
		delay := &away
		if err == nil || apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
			delay = &no
		}
		timer := time.NewTimer(delay.Step())
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
}

// IsWatchListSemanticsUnSupported has the reflector list and then watch. A watch
// that brings the list along, too, would need as many permissions for an API
// server that does not offer it, and could not be slimmed page by page.
func (f *feed) IsWatchListSemanticsUnSupported() bool { return true }

// ListWithContext returns a page of a list.
func (f *feed) ListWithContext(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
	// "Whatever you have" may be older than what another replica has acted on. And in
	// pages the version that was known last is asked for exactly: from there no watch
	// goes on either, for as long as etcd remembers it.
	o.ResourceVersion = ""
	ctx, cancel := context.WithTimeout(ctx, pageTimeout)
	defer cancel()
	list, err := f.list(ctx, o)
	f.trouble.note("list", f.resource, err)
	return list, err
}

// List is ListWithContext for callers that have none; the reflector does.
func (f *feed) List(o meta.ListOptions) (runtime.Object, error) {
	return f.ListWithContext(context.Background(), o)
}

// WatchWithContext begins a watch.
func (f *feed) WatchWithContext(ctx context.Context, o meta.ListOptions) (watch.Interface, error) {
	w, err := watches.Begin(ctx, o, f.watch)
	f.trouble.note("watch", f.resource, err)
	if err != nil {
		return nil, err
	}
	f.begun()
	return w, nil
}

// Watch is WatchWithContext for callers that have none.
func (f *feed) Watch(o meta.ListOptions) (watch.Interface, error) {
	return f.WatchWithContext(context.Background(), o)
}

// troubles are what does not work at the API server, by verb and resource.
type troubles struct {
	say func(what string, err error) // for each that begins, changes or ends (nil)

	mu  sync.Mutex
	now map[string]trouble
}

type trouble struct {
	text      string
	forbidden bool
}

func newTroubles(say func(string, error)) *troubles {
	return &troubles{say: say, now: make(map[string]trouble)}
}

// note learns how a request went. That something does not work is said once, and
// again when it turns out that a permission is missing: texts differ with each try.
func (t *troubles) note(verb, resource string, err error) {
	what := verb + " " + resource
	forbidden := apierrors.IsForbidden(err)
	if err != nil {
		err = explain(verb, resource, err)
	}
	t.mu.Lock()
	before, had := t.now[what]
	changed := err == nil && had || err != nil && (!had || forbidden && !before.forbidden)
	if err != nil {
		t.now[what] = trouble{err.Error(), forbidden}
	} else {
		delete(t.now, what)
	}
	t.mu.Unlock()
	if changed {
		t.say(what, err)
	}
}

// of returns what does not work for a resource; "" if nothing.
func (t *troubles) of(resource string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, what := range []string{"list " + resource, "watch " + resource, "get " + resource, reaching} {
		if s, ok := t.now[what]; ok {
			return s.text
		}
	}
	return ""
}

// reaching is the trouble of having no connection. Client-go tries again many times
// before it says so.
const reaching = "reach the API server"

// wrap watches whether the API server answers at all.
func (t *troubles) wrap(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(req *http.Request) (*http.Response, error) {
		resp, err := next.RoundTrip(req)
		if err == nil || req.Context().Err() == nil { // else we gave it up ourselves
			t.note("reach", "the API server", err)
		}
		return resp, err
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// explain says what to do about an error, where that is known.
func explain(verb, resource string, err error) error {
	if apierrors.IsForbidden(err) {
		return fmt.Errorf("the API server forbids to %s %s; grant the CA's ServiceAccount the verb %q on the resource %q: %w", verb, resource, verb, resource, err)
	}
	return fmt.Errorf("%s %s: %w", verb, resource, err)
}
