package status

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/meshca/meshca/ca/kube/policies"
	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

const (
	callTimeout = 5 * time.Second
	// gather is how long policies may change before they are judged again.
	gather = time.Second
	// share is how much of the time judging may take: a tenth.
	share = 10
	// look is how often pods are looked at, and what could not be written is tried.
	look = 10 * time.Second
	// spare is how long the same is not written again to one object: somebody may
	// write something else over it each time.
	spare = 10 * time.Second
	// perSecond and burst are the pace of writes, and most is how many are made before
	// policies are judged again: of ten thousand new ones the last is not judged by
	// what held a quarter of an hour ago.
	perSecond = 10
	burst     = 50
	most      = 100
)

// Config is what [New] takes. Everything is required but Pods.
type Config struct {
	Client dynamic.Interface
	// Policies are [policies.Source]'s.
	Policies interface {
		Objects() ([]policies.Object, <-chan struct{})
	}
	// Pods returns the pods that run, with their labels and ports. Without it, what
	// depends on pods is not judged.
	Pods func() []manifest.Pod
	// Events is [events.Writer]'s.
	Events interface {
		Policy(apiVersion, namespace, name, uid string, warning bool, reason, text string)
	}
	RootNamespace string
	Now           func() time.Time
	Log           *slog.Logger
}

// Writer writes conditions and events. Use [New], then [Writer.Run], which owns it
// and may be called again when it has returned.
type Writer struct {
	conf Config

	pace    *rate.Limiter
	told    map[string]verdict // by UID: what the owner knows, for as long as there is such a policy
	wrote   map[string]written // by UID
	useless string             // UID of a definition under which conditions do not stay
	said    string             // the last trouble that is in the log
}

// written is what was written to an object last, and when.
type written struct {
	verdict
	generation int64
	at         time.Time
}

// New makes a Writer; it does nothing before Run.
func New(c Config) (*Writer, error) {
	if c.Client == nil || c.Policies == nil || c.Events == nil || c.RootNamespace == "" || c.Now == nil || c.Log == nil {
		return nil, errors.New("status of policies: Client, Policies, Events, RootNamespace, Now and Log must all be given")
	}
	return &Writer{conf: c, pace: rate.NewLimiter(perSecond, burst), told: make(map[string]verdict), wrote: make(map[string]written)}, nil
}

// Run writes until ctx ends. A replica that leads again begins anew: what owners know
// is in the objects, where another one may have written meanwhile.
func (w *Writer) Run(ctx context.Context) error {
	clear(w.told)
	clear(w.wrote)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var changed <-chan struct{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			changed = nil // what follows is gathered
			timer.Reset(gather)
			continue
		case <-timer.C:
		}
		var objects []policies.Object
		objects, changed = w.conf.Policies.Objects()
		more, took := w.pass(ctx, objects)
		pause := look
		if more {
			pause = 0
		}
		rest := time.NewTimer(share * took)
		select {
		case <-ctx.Done():
		case <-rest.C:
		}
		rest.Stop()
		timer.Reset(pause)
	}
}

// pass judges all policies, which takes so long, and tells what is new. It reports
// whether there is more to write.
func (w *Writer) pass(ctx context.Context, objects []policies.Object) (more bool, took time.Duration) {
	if len(objects) == 0 {
		clear(w.told)
		clear(w.wrote)
		return false, 0
	}
	conditions, err := w.ours(ctx)
	if err != nil {
		w.trouble(ctx, err)
		return false, 0
	}
	began := time.Now()
	var pods []manifest.Pod
	if w.conf.Pods != nil {
		pods = w.conf.Pods()
	}
	verdicts := judge(objects, pods, w.conf.RootNamespace)
	took = time.Since(began)
	for _, o := range objects {
		w.tell(o, verdicts[o.Ref])
	}
	w.forget(objects)
	if conditions {
		// What has no effect is said first.
		slices.SortStableFunc(objects, func(a, b policies.Object) int {
			return cmp.Compare(rank(verdicts[a.Ref]), rank(verdicts[b.Ref]))
		})
		more, err = w.writeAll(ctx, objects, verdicts)
	}
	w.trouble(ctx, err)
	return more, took
}

func rank(v verdict) int {
	if v.effective {
		return 1
	}
	return 0
}

// writeAll writes conditions until so many were written, or one could not be.
func (w *Writer) writeAll(ctx context.Context, objects []policies.Object, verdicts map[policy.Ref]verdict) (more bool, err error) {
	written := 0
	for _, o := range objects {
		did, err := w.write(ctx, o, verdicts[o.Ref])
		if err != nil {
			return false, err
		}
		if did {
			written++
		}
		if written == most {
			return true, nil
		}
	}
	return false, nil
}

// forget drops what is known of policies that are not there any more.
func (w *Writer) forget(objects []policies.Object) {
	there := make(map[string]bool, len(objects))
	for _, o := range objects {
		there[o.UID] = true
	}
	maps.DeleteFunc(w.told, func(uid string, _ verdict) bool { return !there[uid] })
	maps.DeleteFunc(w.wrote, func(uid string, _ written) bool { return !there[uid] })
}

// ours reports whether conditions are to be written.
func (w *Writer) ours(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	d, err := w.conf.Client.Resource(definition.Resource).Get(ctx, definition.Name, meta.GetOptions{})
	if apierrors.IsForbidden(err) {
		return false, fmt.Errorf("the CA may not get customresourcedefinitions.apiextensions.k8s.io %q; give its ServiceAccount that permission: %w", definition.Name, err)
	}
	if err != nil {
		return false, fmt.Errorf("finding out whose definition of PeerAuthentication there is: %w", err)
	}
	return definition.IsOurs(d) && string(d.GetUID()) != w.useless, nil
}

// tell makes an event of a verdict that the owner does not know. That a policy does
// what it says is worth one only after it did not.
func (w *Writer) tell(o policies.Object, v verdict) {
	before, known := w.told[o.UID]
	if !known {
		before, known = heldBy(o)
	}
	w.told[o.UID] = v
	if before == v || v.effective && (!known || before.effective) {
		return
	}
	w.conf.Events.Policy(o.APIVersion, o.Namespace, o.Name, o.UID, !v.effective, v.reason, v.message)
}

// write puts a verdict into an object's status, unless it says so already. It reports
// whether it asked the API server to.
func (w *Writer) write(ctx context.Context, o policies.Object, v verdict) (did bool, err error) {
	now := w.conf.Now()
	last, before := w.wrote[o.UID]
	if before && last.verdict == v && last.generation == o.Generation && now.Sub(last.at) < spare {
		return false, nil // the next look is not far
	}
	next, changed := withCondition(o, v, now)
	if !changed {
		return false, nil
	}
	if err := w.pace.Wait(ctx); err != nil {
		return false, nil // ctx has ended
	}
	patch, err := json.Marshal(map[string]any{
		// Fails if anybody has changed the object since; then it comes again.
		"metadata": map[string]any{"resourceVersion": o.Version},
		"status":   map[string]any{"conditions": next},
	})
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	in := w.conf.Client.Resource(policies.Resource("v1")).Namespace(o.Namespace)
	after, err := in.Patch(ctx, o.Name, types.MergePatchType, patch, meta.PatchOptions{FieldManager: "meshca"}, "status")
	switch {
	case apierrors.IsConflict(err), apierrors.IsNotFound(err):
		return true, nil // it has become another, or is gone
	case apierrors.IsForbidden(err):
		return true, fmt.Errorf("the CA may not patch peerauthentications.security.istio.io/status in namespace %q; give its ServiceAccount that permission: %w", o.Namespace, err)
	case err != nil:
		return true, fmt.Errorf("asking the API server to patch the status of PeerAuthentication %s: %w", o.Ref, err)
	}
	w.wrote[o.UID] = written{v, o.Generation, now}
	w.check(ctx, o, after)
	return true, nil
}

// check notices that the API server drops what is written: then it would be written
// for ever.
func (w *Writer) check(ctx context.Context, o policies.Object, after *unstructured.Unstructured) {
	conditions, _, _ := unstructured.NestedSlice(after.Object, "status", "conditions")
	if _, is := find(conditions); is {
		return
	}
	d, err := w.conf.Client.Resource(definition.Resource).Get(ctx, definition.Name, meta.GetOptions{})
	if err != nil {
		return // the next look tells
	}
	w.useless = string(d.GetUID())
	w.conf.Log.Warn("the API server drops conditions of PeerAuthentications, so none are written; events are", "policy", o.Ref.String(), "definition", definition.Name)
}

func (w *Writer) trouble(ctx context.Context, err error) {
	switch {
	case err == nil:
		w.said = ""
	case ctx.Err() == nil && err.Error() != w.said:
		w.said = err.Error()
		w.conf.Log.Warn("owners of policies cannot be told what becomes of them", "error", err)
	}
}
