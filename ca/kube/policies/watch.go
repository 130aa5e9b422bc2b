package policies

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/meshca/meshca/ca/kube/watches"
)

// retries are how soon an API server, or a definition, that has come back is
// found: after 3 s at the latest.
var retries = wait.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 1 << 30, Cap: 2 * time.Second}

// watch lets the collection follow the API server until ctx ends.
func (s *Source) watch(ctx context.Context) {
	// What goes wrong is in our log, once for each kind of trouble.
	quiet := logr.Discard()
	r := cache.NewReflectorWithOptions(&source{client: s.conf.Client, report: s.asked}, nil, &s.all, cache.ReflectorOptions{
		Name: "peerauthentications", TypeDescription: "PeerAuthentication", Logger: &quiet, Backoff: &retries,
	})
	r.RunWithContext(klog.NewContext(ctx, quiet))
}

// asked notes what became of a request. Run says what it means.
func (s *Source) asked(err error) {
	s.mu.Lock()
	before := s.trouble
	s.trouble = err
	s.mu.Unlock()
	switch {
	case err == nil && before != nil:
		s.conf.Log.Info("the API server tells of policies again")
	case err != nil && (before == nil || before.Error() != err.Error()):
		s.conf.Log.Warn("the API server does not tell of policies; what is in force stays, and it is asked again", "error", err)
	}
	s.wake()
}

// source lists and watches, under the newest version of the API that there is.
type source struct {
	client dynamic.Interface
	report func(error)
	older  atomic.Bool // only v1beta1 is served: Istio before 1.22
}

func (l *source) resource() dynamic.ResourceInterface {
	if l.older.Load() {
		return l.client.Resource(Resource("v1beta1"))
	}
	return l.client.Resource(Resource("v1"))
}

// ListWithContext is asked by a reflector.
func (l *source) ListWithContext(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
	list, err := l.resource().List(ctx, o)
	if apierrors.IsNotFound(err) {
		l.older.Store(!l.older.Load())
		list, err = l.resource().List(ctx, o)
	}
	if err == nil {
		_, err = number(list.GetResourceVersion())
	}
	if err != nil {
		l.failed(ctx, "list", err)
		return nil, err
	}
	l.report(nil)
	return list, nil
}

// WatchWithContext is asked by a reflector.
func (l *source) WatchWithContext(ctx context.Context, o meta.ListOptions) (watch.Interface, error) {
	w, err := watches.Begin(ctx, o, l.resource().Watch)
	if err != nil {
		l.failed(ctx, "watch", err)
		return nil, err
	}
	l.report(nil)
	return w, nil
}

func (l *source) failed(ctx context.Context, verb string, err error) {
	switch {
	case ctx.Err() != nil:
		return
	case apierrors.IsNotFound(err):
		err = errors.New("the API server has no PeerAuthentication; the CA that leads defines it, if it may create customresourcedefinitions.apiextensions.k8s.io")
	case apierrors.IsForbidden(err):
		err = fmt.Errorf("the CA may not %s peerauthentications.%s in the cluster; give its ServiceAccount that permission: %w", verb, group, err)
	default:
		err = fmt.Errorf("asking the API server to %s peerauthentications.%s: %w", verb, group, err)
	}
	l.report(err)
}

// List and Watch are the same without a context.
func (l *source) List(o meta.ListOptions) (runtime.Object, error) {
	return l.ListWithContext(context.Background(), o)
}

// Watch is not asked by a reflector of today.
func (l *source) Watch(o meta.ListOptions) (watch.Interface, error) {
	return l.WatchWithContext(context.Background(), o)
}

// IsWatchListSemanticsUnSupported has the reflector list, so that a resource that is
// not there is told from one that is empty by an answer of its own.
func (l *source) IsWatchListSemanticsUnSupported() bool { return true }
