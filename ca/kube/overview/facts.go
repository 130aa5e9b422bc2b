package overview

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/meshca/meshca/ca/kube/policies"
	"github.com/meshca/meshca/ca/kube/report"
	"github.com/meshca/meshca/policy"
)

// Facts are all that is known of one pod. What could not be read is in Untold, by the
// step that needs it.
type Facts struct {
	Namespace, Name string
	At              time.Time

	Pod      *core.Pod          // nil: there is none
	Driver   *storage.CSIDriver // nil: there is none
	Agents   []core.Pod         // on the pod's node
	Events   []Event            // about the pod, the newest first
	Docs     report.Documents
	Policies []policy.Policy // of its namespace and the root namespace
	Root     string          // that namespace

	Untold map[string]error
}

// Event is what Kubernetes or the CA has said of a pod.
type Event struct {
	At      time.Time `json:"at"`
	Reason  string    `json:"reason"`
	Message string    `json:"message"`
	Count   int       `json:"count"`
}

// Collector reads facts.
type Collector struct {
	Client  kubernetes.Interface
	Objects dynamic.Interface
	System  string // the CA's namespace
	Now     func() time.Time
}

// Collect reads the facts of one pod. Only a pod that cannot be looked for is an
// error: whatever else is missing is told.
func (c Collector) Collect(ctx context.Context, namespace, name string) (*Facts, error) {
	f := &Facts{Namespace: namespace, Name: name, Root: c.System, Untold: make(map[string]error)}
	pod, err := c.Client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		f.At = c.Now()
		return f, nil
	case err != nil:
		return nil, fmt.Errorf("reading pod %s/%s: %w", namespace, name, err)
	}
	f.Pod = pod
	agents := "meshca-agents"
	f.try(stepCA, func() error {
		docs, err := report.Read(ctx, c.Client.CoreV1().ConfigMaps(c.System), c.Now)
		f.Docs = docs
		for _, d := range docs.Fresh {
			f.Root, agents = cmp.Or(d.RootNamespace, f.Root), cmp.Or(d.Agents, agents)
		}
		return err
	})
	f.try(stepNode, func() error { return c.node(ctx, f, agents) })
	f.try(stepEvents, func() error { return c.events(ctx, f) })
	f.try(stepPolicy, func() error { return c.policies(ctx, f) })
	f.At = c.Now()
	return f, nil
}

func (f *Facts) try(step string, read func() error) {
	if err := read(); err != nil {
		f.Untold[step] = err
	}
}

func (c Collector) node(ctx context.Context, f *Facts, agents string) error {
	driver, err := c.Client.StorageV1().CSIDrivers().Get(ctx, Driver, metav1.GetOptions{})
	if err == nil {
		f.Driver = driver
	} else if !apierrors.IsNotFound(err) {
		return fmt.Errorf("reading CSIDriver %s: %w", Driver, err)
	}
	if f.Pod.Spec.NodeName == "" {
		return nil
	}
	list, err := c.Client.CoreV1().Pods(agents).List(ctx, metav1.ListOptions{
		LabelSelector: "app.kubernetes.io/component=agent", FieldSelector: fields.OneTermEqualSelector("spec.nodeName", f.Pod.Spec.NodeName).String(),
	})
	if err != nil {
		return fmt.Errorf("reading the agents in namespace %q: %w", agents, err)
	}
	f.Agents = list.Items
	return nil
}

func (c Collector) events(ctx context.Context, f *Facts) error {
	list, err := c.Client.CoreV1().Events(f.Namespace).List(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("involvedObject.uid", string(f.Pod.UID)).String(),
	})
	if err != nil {
		return fmt.Errorf("reading the events of namespace %q: %w", f.Namespace, err)
	}
	for _, e := range list.Items {
		if e.Type != core.EventTypeWarning {
			continue
		}
		event := Event{At: e.LastTimestamp.Time, Reason: e.Reason, Message: e.Message, Count: max(1, int(e.Count))}
		if event.At.IsZero() {
			event.At = e.EventTime.Time
		}
		if e.Series != nil {
			event.At, event.Count = e.Series.LastObservedTime.Time, int(e.Series.Count)
		}
		f.Events = append(f.Events, event)
	}
	slices.SortStableFunc(f.Events, func(a, b Event) int { return b.At.Compare(a.At) })
	return nil
}

func (c Collector) policies(ctx context.Context, f *Facts) error {
	namespaces := []string{f.Namespace}
	if f.Root != f.Namespace {
		namespaces = append(namespaces, f.Root)
	}
	for _, namespace := range namespaces {
		list, err := c.Objects.Resource(policies.Resource("v1")).Namespace(namespace).List(ctx, metav1.ListOptions{})
		if apierrors.IsNotFound(err) {
			return fmt.Errorf("the API server does not know PeerAuthentication: %w; the CA makes its definition when it starts", err)
		}
		if err != nil {
			return fmt.Errorf("reading the PeerAuthentications of namespace %q: %w", namespace, err)
		}
		for i := range list.Items {
			f.Policies = append(f.Policies, policies.Decode(&list.Items[i]).Policy.Policy)
		}
	}
	return nil
}
