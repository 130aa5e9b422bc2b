package policy

import (
	"cmp"
	"strings"
	"time"
)

// Ref names a policy.
type Ref struct{ Namespace, Name string }

// String returns the namespace and the name, with a slash between them, or "" for
// the zero Ref.
func (r Ref) String() string {
	if r == (Ref{}) {
		return ""
	}
	return r.Namespace + "/" + r.Name
}

// Policy is one PeerAuthentication. Its maps must not be changed once it has been
// given to [New].
type Policy struct {
	Ref
	// Created decides between policies of equal rank: the oldest wins. An object
	// without a creationTimestamp has the zero time and is older than all others,
	// as it is in Istio's order.
	Created time.Time
	// Selector chooses workloads by their labels. None, or an empty one, chooses the
	// whole namespace, or the whole mesh when Namespace is the root namespace.
	Selector map[string]string
	// Mode is Unset where the object has no mtls.
	Mode Mode
	// Ports are the port-level modes. They count only with a Selector.
	Ports map[uint16]Mode
}

// Compare orders policies of equal rank, the winner first: by age, then by name,
// then by namespace.
func Compare(a, b Policy) int {
	if c := a.Created.Compare(b.Created); c != 0 {
		return c
	}
	return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Namespace, b.Namespace))
}

// Matches reports whether the labels have every pair of the selector. An empty
// selector matches everything.
func Matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
