package policy

import (
	"fmt"
	"slices"
	"time"
)

// Explanation is a decision with everything that had a part in it.
type Explanation struct {
	Result
	// Steps are the winners of their levels, the widest first.
	Steps []Step
	// Lost are the policies that are about this workload and have no effect on it.
	Lost []Loss
	// Warnings tell of settings that were not taken as they were written.
	Warnings []string
	// Closed is why the policies are not known; then there is nothing else.
	Closed string
}

// Step is the winner of one level.
type Step struct {
	Level  Level
	Policy Ref
	Mode   Mode // as the policy has it
	// Decides is true for the policy whose mode holds. The mode of another is Unset,
	// or a narrower policy says something else.
	Decides bool
}

// Loss is a policy without effect.
type Loss struct {
	Policy Ref
	Level  Level
	Mode   Mode
	// BeatenBy is the policy that counts instead; zero if none does.
	BeatenBy Ref
	Reason   string
}

// Explain decides as [Set.Resolve] does and says why. It looks at every policy of
// the namespace.
func (s *Set) Explain(namespace string, labels map[string]string) Explanation {
	e := Explanation{Result: s.Resolve(namespace, labels), Closed: s.Closed()}
	if e.Closed != "" {
		return e
	}
	e.level(LevelMesh, s.mesh.wide)
	for _, p := range s.mesh.selected {
		if Matches(p.Selector, labels) {
			e.Lost = append(e.Lost, Loss{Policy: p.Ref, Level: LevelWorkload, Mode: p.Mode, Reason: fmt.Sprintf("a selector in the root namespace %q chooses nothing", s.root)})
		}
	}
	if n := s.namespaces[namespace]; n != nil {
		e.level(LevelNamespace, n.wide)
		var matching []Policy
		for _, p := range n.selected {
			if Matches(p.Selector, labels) {
				matching = append(matching, p)
			}
		}
		e.level(LevelWorkload, matching)
	}
	for i, step := range e.Steps {
		e.Steps[i].Decides = e.Source == Source{step.Level, step.Policy}
	}
	return e
}

// level adds the policies of one level, sorted.
func (e *Explanation) level(level Level, sorted []Policy) {
	for i, p := range sorted {
		if i > 0 {
			e.Lost = append(e.Lost, Loss{p.Ref, level, p.Mode, sorted[0].Ref, Why(sorted[0], p)})
			continue
		}
		e.Steps = append(e.Steps, Step{Level: level, Policy: p.Ref, Mode: p.Mode})
		if level != LevelWorkload && len(p.Ports) > 0 {
			e.Warnings = append(e.Warnings, fmt.Sprintf("%s: its port-level modes are not read, because it has no selector", p.Ref))
		}
		e.Warnings = append(e.Warnings, p.warnings(level == LevelWorkload)...)
	}
}

// warnings are about modes that are not known.
func (p Policy) warnings(withPorts bool) []string {
	var all []string
	if !p.Mode.known() {
		all = append(all, fmt.Sprintf("%s: its mode is not known to this version and is taken as STRICT", p.Ref))
	}
	if !withPorts {
		return all
	}
	ports := make([]uint16, 0, len(p.Ports))
	for port, m := range p.Ports {
		if !m.known() {
			ports = append(ports, port)
		}
	}
	slices.Sort(ports)
	for _, port := range ports {
		all = append(all, fmt.Sprintf("%s: its mode for port %d is not known to this version and is taken as STRICT", p.Ref, port))
	}
	return all
}

// Why says what made winner win over loser.
func Why(winner, loser Policy) string {
	if !winner.Created.Equal(loser.Created) {
		return fmt.Sprintf("%s is older: made %s, this one %s", winner.Ref, instant(winner.Created), instant(loser.Created))
	}
	if winner.Name != loser.Name && winner.Created.IsZero() {
		return fmt.Sprintf("%s has no creationTimestamp either, and its name comes first", winner.Ref)
	}
	if winner.Name != loser.Name {
		return fmt.Sprintf("%s is of the same age and its name comes first", winner.Ref)
	}
	return fmt.Sprintf("%s is of the same age and name, and its namespace comes first", winner.Ref)
}

func instant(t time.Time) string {
	if t.IsZero() {
		return "at an unknown time"
	}
	return t.UTC().Format(time.RFC3339)
}
