package policy

// Level is where a mode comes from.
type Level string

const (
	LevelPort      Level = "port"      // the port-level mode of a policy with a selector
	LevelWorkload  Level = "workload"  // a policy with a selector
	LevelNamespace Level = "namespace" // a policy without one
	LevelMesh      Level = "mesh"      // a policy without one in the root namespace
	LevelDefault   Level = "default"   // no policy says anything: PERMISSIVE
	LevelClosed    Level = "closed"    // the policies are not known: STRICT
)

// Source says who decided a mode. Policy is zero for LevelDefault and LevelClosed.
type Source struct {
	Level  Level
	Policy Ref
}

// Result is the decision about one workload. The zero Result is STRICT on all
// ports.
type Result struct {
	// Mode of all ports that the deciding policy does not name: Strict, Permissive
	// or Disable.
	Mode Mode
	// Source tells who decided Mode.
	Source Source

	ports      map[uint16]Mode // as written, so Unset and Unknown too
	portPolicy Ref
}

// overlay applies the mode of the policy that counts at a narrower level. Only that
// one policy is asked: where it is UNSET, no other of its level takes its place.
func (r *Result) overlay(p Policy, level Level) {
	if p.Mode == Unset {
		return
	}
	r.Mode, r.Source = p.Mode.over(r.Mode), Source{level, p.Ref}
}

// ForPort returns the mode of a port that the workload itself listens on; a
// Service's own number for it means nothing here.
func (r Result) ForPort(port uint16) Mode {
	if m, ok := r.ports[port]; ok {
		return m.over(r.Mode)
	}
	return r.Mode
}

// SourceForPort tells who decided [Result.ForPort].
func (r Result) SourceForPort(port uint16) Source {
	if m, ok := r.ports[port]; ok && m != Unset {
		return Source{LevelPort, r.portPolicy}
	}
	return r.Source
}

// Ports returns the decided modes of the ports that the deciding policy names,
// even where they are the same as Mode. The map is the caller's.
func (r Result) Ports() map[uint16]Mode {
	ports := make(map[uint16]Mode, len(r.ports))
	for port := range r.ports {
		ports[port] = r.ForPort(port)
	}
	return ports
}
