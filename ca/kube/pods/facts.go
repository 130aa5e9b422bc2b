package pods

import (
	"fmt"
	"maps"
	"strconv"
	"time"
	"unique"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Pod is what is kept of a pod. Its map must not be changed.
type Pod struct {
	UID, Namespace, Name string
	ServiceAccount       string
	// Node is where the scheduler put it; empty as long as it did not.
	Node string
	// Finished says that its containers have ended and will not start again.
	Finished bool
	// Deletion is the instant by which it should be gone, its grace included: that
	// is how the API server counts. Zero if nobody has asked for its deletion.
	Deletion time.Time
	Labels   map[string]string
	// Version is the resourceVersion. Within one cluster it rises with each change
	// of any pod.
	Version uint64
}

// linger is how long a pod still counts as there after it should have gone: a
// kubelet needs a moment to stop and report it. The API server takes tokens for
// as long.
const linger = time.Minute

// end returns why the pod has no identity any more; "" if it lives.
func (p Pod) end(now time.Time) string {
	switch {
	case p.Finished:
		return "it has finished"
	case !p.Deletion.IsZero() && now.Sub(p.Deletion) > linger:
		return fmt.Sprintf("it is being deleted and should have been gone by %s, more than %v ago", stamp(p.Deletion), linger)
	}
	return ""
}

// Alive reports whether the pod exists in the sense of an identity: a pod that
// drains does, one that has finished does not.
func (p Pod) Alive(now time.Time) bool { return p.end(now.Round(0)) == "" }

func (p Pod) key() string     { return p.UID }
func (p Pod) uid() string     { return p.UID }
func (p Pod) version() uint64 { return p.Version }

// says reports whether q says the same of the pod, apart from its version. Most
// updates of a pod are about what is not kept here.
func (p Pod) says(q Pod) bool {
	return p.UID == q.UID && p.Namespace == q.Namespace && p.Name == q.Name && p.ServiceAccount == q.ServiceAccount &&
		p.Node == q.Node && p.Finished == q.Finished && p.Deletion.Equal(q.Deletion) && maps.Equal(p.Labels, q.Labels)
}

// podOf keeps what counts of a pod. What is the same in many pods is kept once.
func podOf(o *core.Pod) Pod {
	p := Pod{
		UID: string(o.UID), Namespace: shared(o.Namespace), Name: o.Name,
		ServiceAccount: shared(o.Spec.ServiceAccountName), Node: shared(o.Spec.NodeName),
		Finished: o.Status.Phase == core.PodSucceeded || o.Status.Phase == core.PodFailed,
		Deletion: deletionOf(o.DeletionTimestamp), Version: versionOf(o.ResourceVersion),
	}
	if len(o.Labels) > 0 {
		p.Labels = make(map[string]string, len(o.Labels))
		for k, v := range o.Labels {
			p.Labels[shared(k)] = shared(v)
		}
	}
	return p
}

// object is what is kept of a node, a namespace or a ServiceAccount.
type object struct {
	UID, Namespace, Name string
	Deletion             time.Time
	Version              uint64
}

func (o object) key() string     { return keyOf(o.Namespace, o.Name) }
func (o object) uid() string     { return o.UID }
func (o object) version() uint64 { return o.Version }

func (o object) says(p object) bool {
	return o.UID == p.UID && o.Deletion.Equal(p.Deletion)
}

func objectOf(o *meta.PartialObjectMetadata) object {
	return object{
		UID: string(o.UID), Namespace: shared(o.Namespace), Name: o.Name,
		Deletion: deletionOf(o.DeletionTimestamp), Version: versionOf(o.ResourceVersion),
	}
}

// keyOf names an object of a kind. Neither part can hold a slash.
func keyOf(namespace, name string) string {
	if namespace == "" {
		return name
	}
	return namespace + "/" + name
}

func shared(s string) string { return unique.Make(s).Value() }

func deletionOf(t *meta.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.Time
}

// versionOf reads a resourceVersion. That it is a number, and that numbers of one
// resource can be compared, has been promised since Kubernetes 1.35. Anything
// else counts as the oldest.
func versionOf(s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
