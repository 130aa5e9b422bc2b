package uninstall

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/meshca/meshca/ca/kube/installed"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/volumes"
)

// Config says what to take away.
type Config struct {
	Client          kubernetes.Interface
	Objects         dynamic.Interface
	Namespace       string // of the CA
	AgentsNamespace string
	Now             func() time.Time
	DryRun          bool
	// IgnoreRelease goes on where Helm has installed.
	IgnoreRelease bool
	// DeleteRoot is the trust domain whose root is to be deleted. Empty keeps it.
	DeleteRoot string
	// Poll is how often is looked whether something has gone. Zero means a second.
	Poll time.Duration
	// Progress is told what is being waited for. It may be nil.
	Progress func(what string)
}

// Result is what was done, or would be.
type Result struct {
	DryRun  bool     `json:"dry_run"`
	Deleted []string `json:"deleted"` // or would be, in this order
	// Foreign have a name of ours and are somebody else's.
	Foreign []string `json:"foreign,omitempty"`
	// Kept holds the trust domain's root.
	Kept []string `json:"kept,omitempty"`
	// Release is the Helm release that does not know of this.
	Release string `json:"helm_release,omitempty"`
}

type run struct {
	Config
	result *Result
}

// found is an object of ours that is there.
type found struct {
	installed.Object
	have *unstructured.Unstructured
}

// Run takes an installation away. With an error the result says how far it came.
func Run(ctx context.Context, c Config) (*Result, error) {
	if c.Poll == 0 {
		c.Poll = time.Second
	}
	r := &run{c, &Result{DryRun: c.DryRun, Deleted: []string{}}}
	// All is judged before anything is touched.
	objects, err := r.look(ctx)
	if err != nil {
		return r.result, err
	}
	root, err := r.lookRoot(ctx)
	if err != nil {
		return r.result, err
	}
	all := append(objects, root...)
	if len(all) > 0 {
		if err := r.unused(ctx, false); err != nil {
			return r.result, err
		}
	}
	for _, o := range all {
		if err := r.delete(ctx, o); err != nil {
			return r.result, err
		}
	}
	return r.result, r.keep(ctx)
}

// unused refuses while pods have our volume.
func (r *run) unused(ctx context.Context, late bool) error {
	users, err := volumes.Users(ctx, r.Client, r.Now())
	if err != nil {
		return err
	}
	if len(users) > 0 {
		return &MountedError{Pods: users, Late: late}
	}
	return nil
}

var lease = installed.Object{Part: installed.CA, Kind: "Lease", Name: "meshca-leader",
	Resource: resource("coordination.k8s.io", "leases")}

// look finds what is there and ours.
func (r *run) look(ctx context.Context) ([]found, error) {
	var there []found
	for _, o := range installed.Objects(r.Namespace, r.AgentsNamespace) {
		u, err := r.get(ctx, o)
		if err != nil {
			return nil, err
		}
		if u == nil {
			continue
		}
		if !installed.Ours(u) {
			r.result.Foreign = append(r.result.Foreign, o.String())
			continue
		}
		if name, namespace, ok := installed.Release(u); ok {
			if !r.IgnoreRelease {
				return nil, &ReleaseError{name, namespace}
			}
			r.result.Release = namespace + "/" + name
		}
		there = append(there, found{o, u})
	}
	o := lease
	o.Namespace = r.Namespace
	u, err := r.get(ctx, o)
	if err != nil {
		return nil, err
	}
	if u != nil {
		there = append(there, found{o, u})
	}
	return there, nil
}

// get returns an object, nil if it is not there.
func (r *run) get(ctx context.Context, o installed.Object) (*unstructured.Unstructured, error) {
	u, err := r.resource(o).Get(ctx, o.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", o, err)
	}
	return u, nil
}

func (r *run) resource(o installed.Object) dynamic.ResourceInterface {
	if o.Namespace == "" {
		return r.Objects.Resource(o.Resource)
	}
	return r.Objects.Resource(o.Resource).Namespace(o.Namespace)
}

// delete takes away the very object that was judged, and waits where others would go
// on working.
func (r *run) delete(ctx context.Context, f found) error {
	if r.DryRun {
		r.result.Deleted = append(r.result.Deleted, f.String())
		return nil
	}
	uid := f.have.GetUID()
	background := metav1.DeletePropagationBackground
	err := r.resource(f.Object).Delete(ctx, f.Name, metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: &uid}, PropagationPolicy: &background,
	})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting %s: %w", f, err)
	}
	r.result.Deleted = append(r.result.Deleted, f.String())
	switch f.Kind {
	case "DaemonSet":
		if err := r.gone(ctx, f, "agent"); err != nil {
			return err
		}
		// Whoever came since the first look was let in by agents that were still there.
		return r.unused(ctx, true)
	case "Deployment":
		return r.gone(ctx, f, "ca")
	}
	return nil
}

// gone waits until an object and its pods are gone.
func (r *run) gone(ctx context.Context, f found, component string) error {
	what := "waiting for the pods of " + f.String() + " to end"
	return r.until(ctx, what, func() (string, error) {
		pods, err := r.Client.CoreV1().Pods(f.Namespace).List(ctx, metav1.ListOptions{
			LabelSelector: "app.kubernetes.io/name=meshca,app.kubernetes.io/component=" + component,
		})
		if err != nil {
			return "", fmt.Errorf("reading the pods of %s: %w", f, err)
		}
		if len(pods.Items) > 0 {
			return fmt.Sprintf("%s: %d left", what, len(pods.Items)), nil
		}
		have, err := r.get(ctx, f.Object)
		if err != nil {
			return "", err
		}
		if have != nil && have.GetUID() == f.have.GetUID() {
			return what, nil
		}
		return "", nil
	})
}

// until asks again until nothing is waited for any more.
func (r *run) until(ctx context.Context, what string, waits func() (string, error)) error {
	return until(ctx, r.Config, what, waits)
}

func until(ctx context.Context, c Config, what string, waits func() (string, error)) error {
	tick := time.NewTicker(c.Poll)
	defer tick.Stop()
	for {
		now, err := waits()
		if err != nil || now == "" {
			return err
		}
		if c.Progress != nil {
			c.Progress(now)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// Wait returns when no pod has a volume of ours. It says how many it waits for.
func Wait(ctx context.Context, c Config) error {
	if c.Poll == 0 {
		c.Poll = time.Second
	}
	first := 0
	var last error
	err := until(ctx, c, "waiting for pods with a volume of "+volumes.Driver+" to end", func() (string, error) {
		users, err := volumes.Users(ctx, c.Client, c.Now())
		if err != nil || len(users) == 0 {
			return "", err
		}
		first = max(first, len(users))
		last = &MountedError{Pods: users}
		return fmt.Sprintf("waiting for %d of %d pods to end (%s)", len(users), first, names(users[:min(3, len(users))])), nil
	})
	if err != nil && ctx.Err() != nil && last != nil {
		return last // what is in the way says more than that time is over
	}
	return err
}

// keep names what is left of the root.
func (r *run) keep(ctx context.Context) error {
	if r.DeleteRoot != "" {
		return nil
	}
	marker, err := state.ReadMarker(ctx, r.Client.CoreV1(), r.Namespace)
	if errors.As(err, new(*state.NothingError)) {
		return nil
	}
	domain := ""
	if err == nil {
		domain = " of trust domain " + marker.TrustDomain
	}
	r.result.Kept = append(r.result.Kept, "the root"+domain+" in namespace "+r.Namespace+": Secrets meshca-root-*, ConfigMaps "+state.MarkerName+", "+state.StateName)
	return nil // that it could not be read whole is for meshca check
}
