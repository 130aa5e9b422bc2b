package policy

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Revision rises when the same policies come to another decision than in an older
// version of this package, so that whoever numbers decisions gives them a new one.
const Revision = 1

// Resolved is the decision about one workload as it is handed on: from who knows
// the policies to who enforces them.
//
// It has two versions because it is made from two things that are watched apart.
// Two replicas may each be ahead of the other in one of them, so that no single
// number could say which decision is the later.
type Resolved struct {
	// Version rises with every change of any policy of the mesh. It orders decisions;
	// two with the same content may have different versions. Zero is no version:
	// whoever resolved it does not know the policies, the Result is STRICT by
	// LevelClosed, and it is for those who never had another.
	Version uint64
	// WorkloadVersion rises with every change of the workload's labels. Zero is none:
	// the labels are not known, or have no version of their own, as from files.
	WorkloadVersion uint64
	Result
}

// behind reports whether one of r's versions is lower than held's.
func (r Resolved) behind(held Resolved) bool {
	return r.Version < held.Version || r.WorkloadVersion < held.WorkloadVersion
}

// describeVersion shows the version for an error, or both: "8", or "8, labels 51".
func (r Resolved) describeVersion() string {
	if r.WorkloadVersion == 0 {
		return strconv.FormatUint(r.Version, 10)
	}
	return fmt.Sprintf("%d, labels %d", r.Version, r.WorkloadVersion)
}

// StaleError says that somebody sent another policy than the one in use under a
// version that is not newer: they are behind, and what they say may open what has
// been closed since.
type StaleError struct{ Held, Got Resolved }

func (e *StaleError) Error() string {
	return fmt.Sprintf("the policy has version %s (%v, %v); version %s (%v, %v) is in use already",
		e.Got.describeVersion(), e.Got.Mode, e.Got.Source, e.Held.describeVersion(), e.Held.Mode, e.Held.Source)
}

// Succeeds decides for everybody whom policies are sent to whether r takes the
// place of held; either may be nil. What is not known, or not new, does not and is
// no error; what may not is a [*StaleError]. A newer version of the same does:
// whoever holds it will not go back behind it.
func (r *Resolved) Succeeds(held *Resolved) (bool, error) {
	switch {
	case r == nil:
		return false, nil
	case held == nil:
		return true, nil
	case r.Version == 0:
		return false, nil
	case !held.Follows(*r):
		return false, &StaleError{Held: *held, Got: *r}
	}
	return held.Version == 0 || !r.behind(*held) && (r.Version > held.Version || r.WorkloadVersion > held.WorkloadVersion), nil
}

// Unresolved is what holds where nobody knows the policies and there never was a
// decision.
func Unresolved() Resolved {
	return Resolved{Result: Result{Mode: Strict, Source: Source{Level: LevelClosed}}}
}

// Follows reports whether next may take r's place: it is newer in one of its
// versions and older in none, or says the same. Whatever else comes from somebody
// who is behind in something, and could open what was closed since.
func (r Resolved) Follows(next Resolved) bool {
	newer := next.Version > r.Version || next.WorkloadVersion > r.WorkloadVersion
	return r.Version == 0 || newer && !next.behind(r) || next.Equal(r.Result)
}

// Decided puts a Result together from what [Result.PortLevel] and its fields said
// somewhere else. Modes that this version does not know become Strict. The map is
// kept.
func Decided(mode Mode, source Source, portPolicy Ref, ports map[uint16]Mode) Result {
	return Result{Mode: mode.over(Strict), Source: source, ports: ports, portPolicy: portPolicy}
}

// PortLevel returns the ports with a mode of their own, and the policy that has
// them. The map is the caller's; it is nil if there are none.
func (r Result) PortLevel() (policy Ref, ports map[uint16]Mode) {
	for port, m := range r.ports {
		if m == Unset {
			continue
		}
		if ports == nil {
			ports = make(map[uint16]Mode, len(r.ports))
		}
		ports[port] = r.ForPort(port)
	}
	if ports == nil {
		return Ref{}, nil
	}
	return r.portPolicy, ports
}

// DescribePorts shows the ports with a mode of their own for a log, such as
// "8080=DISABLE 9090=PERMISSIVE"; "" if there are none.
func (r Result) DescribePorts() string {
	const most = 16
	_, ports := r.PortLevel()
	var b strings.Builder
	for i, port := range slices.Sorted(maps.Keys(ports)) {
		if i == most {
			fmt.Fprintf(&b, " and %d more", len(ports)-most)
			break
		}
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%d=%v", port, ports[port])
	}
	return b.String()
}

// Equal reports whether two results say the same about every port, for the same
// reasons.
func (r Result) Equal(other Result) bool {
	policy, ports := r.PortLevel()
	otherPolicy, otherPorts := other.PortLevel()
	return r.Mode == other.Mode && r.Source == other.Source && policy == otherPolicy && maps.Equal(ports, otherPorts)
}

// ResolveUnlabelled decides for a workload whose labels are not known. Where no
// policy of its namespace selects by labels they do not matter; otherwise any of
// those policies may be the one that holds, and everything is STRICT.
func (s *Set) ResolveUnlabelled(namespace string) Result {
	if s.Closed() == "" && s.Selects(namespace) {
		return Result{Mode: Strict, Source: Source{Level: LevelClosed}}
	}
	return s.Resolve(namespace, nil)
}

// Selects reports whether a policy of the namespace selects workloads by labels,
// with effect.
func (s *Set) Selects(namespace string) bool {
	if s.Closed() != "" {
		return false
	}
	n := s.namespaces[namespace]
	return n != nil && len(n.selected) > 0
}

// String says who decided, for a log: "shop/cart", with the level where that
// tells more than the name.
func (s Source) String() string {
	switch s.Level {
	case LevelDefault:
		return "no policy"
	case LevelClosed:
		return "not known"
	}
	return string(s.Level) + " " + s.Policy.String()
}
