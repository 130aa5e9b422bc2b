package policy_test

import (
	"time"

	"github.com/meshca/meshca/policy"
)

// The oracle is a second reading of the rules, written before the engine and by
// another method. The engine sorts, compiles, and overlays mesh, namespace and
// workload from the bottom up. The oracle asks from the top down, for one port of
// one workload at a time: which is the first setting in the list
//
//	the port's, the workload's, the namespace's, the mesh's, PERMISSIVE
//
// that is there and not UNSET? Whose setting counts at a level it finds without
// sorting: the policy that no other of its kind precedes.
type oracle struct {
	root     string
	policies []policy.Policy
}

func (o oracle) mode(namespace string, labels map[string]string, port uint16) policy.Mode {
	var settings []policy.Mode
	workload := o.first(func(p policy.Policy) bool {
		return p.Namespace != o.root && p.Namespace == namespace && len(p.Selector) > 0 && covers(p.Selector, labels)
	})
	if workload != nil {
		if m, named := workload.Ports[port]; named {
			settings = append(settings, m)
		}
		settings = append(settings, workload.Mode)
	}
	if p := o.first(func(p policy.Policy) bool {
		return p.Namespace != o.root && p.Namespace == namespace && len(p.Selector) == 0
	}); p != nil {
		settings = append(settings, p.Mode)
	}
	if p := o.first(func(p policy.Policy) bool { return p.Namespace == o.root && len(p.Selector) == 0 }); p != nil {
		settings = append(settings, p.Mode)
	}
	for _, m := range settings {
		switch m {
		case policy.Unset:
		case policy.Disable, policy.Permissive:
			return m
		default: // STRICT, and whatever this version does not know
			return policy.Strict
		}
	}
	return policy.Permissive
}

// first is the policy of a kind that none of its kind precedes.
func (o oracle) first(kind func(policy.Policy) bool) *policy.Policy {
next:
	for i, p := range o.policies {
		if !kind(p) {
			continue
		}
		for j, other := range o.policies {
			if j != i && kind(other) && precedes(other, p) {
				continue next
			}
		}
		return &o.policies[i]
	}
	return nil
}

func precedes(a, b policy.Policy) bool {
	switch {
	case a.Created.Before(b.Created):
		return true
	case b.Created.Before(a.Created):
		return false
	case a.Name != b.Name:
		return a.Name < b.Name
	}
	return a.Namespace < b.Namespace
}

// covers is true when no pair of the selector is missing from the labels.
func covers(selector, labels map[string]string) bool {
	missing := 0
	for key, want := range selector {
		if got, there := labels[key]; !there || got != want {
			missing++
		}
	}
	return missing == 0
}

// at is an instant of the tests' calendar; at(0) is no time at all, which is what
// an object without a creationTimestamp has.
func at(n int) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Date(2026, 1, 1, 0, 0, n, 0, time.UTC)
}
