package policy

import (
	"maps"
	"math"
	"slices"
)

// Set is a compiled, immutable set of policies, for use by any number of
// goroutines. A nil Set, like one made by [Closed], stands for policies that are
// not known, and decides STRICT for everybody.
type Set struct {
	root       string
	closed     string // why the policies are not known; empty if they are
	mesh       *namespace
	namespaces map[string]*namespace // without the root; none is empty
}

// namespace has the policies of one, the root's too, sorted: the first counts.
type namespace struct {
	wide     []Policy // without selector
	selected []Policy // with one
	// index leads from a label to the policies whose selector has it, as rising
	// positions in selected. Each policy stands under one label of its selector.
	index map[label][]int
}

type label struct{ key, value string }

// New compiles policies, in any order. The slice is not kept, the policies' maps
// are.
func New(policies []Policy, rootNamespace string) *Set {
	s := &Set{root: rootNamespace, mesh: new(namespace), namespaces: make(map[string]*namespace)}
	byNamespace := make(map[string][]Policy)
	for _, p := range policies {
		byNamespace[p.Namespace] = append(byNamespace[p.Namespace], p)
	}
	for name, all := range byNamespace {
		s.put(name, all)
	}
	return s
}

// WithNamespace returns a Set in which these are all the policies of one
// namespace, and those of the others stay. It is for changes in a large set: its
// cost is in the size of that namespace. A Set whose policies are not known stays
// as it is.
func (s *Set) WithNamespace(name string, policies []Policy) *Set {
	if s.Closed() != "" {
		return s
	}
	changed := *s
	changed.namespaces = maps.Clone(s.namespaces)
	changed.put(name, policies)
	return &changed
}

func (s *Set) put(name string, policies []Policy) {
	switch {
	case name == s.root:
		s.mesh = compile(policies)
	case len(policies) == 0:
		delete(s.namespaces, name)
	default:
		s.namespaces[name] = compile(policies)
	}
}

// Closed returns a Set that decides STRICT for everybody. The reason says why the
// policies are not known, such as the file that could not be read.
func Closed(reason string) *Set {
	if reason == "" {
		reason = notRead
	}
	return &Set{closed: reason}
}

const notRead = "no policy has been read yet"

// Closed returns why the policies are not known, or "" if they are.
func (s *Set) Closed() string {
	if s == nil {
		return notRead
	}
	return s.closed
}

func compile(policies []Policy) *namespace {
	n := new(namespace)
	for _, p := range policies {
		if len(p.Selector) == 0 {
			n.wide = append(n.wide, p)
		} else {
			n.selected = append(n.selected, p)
		}
	}
	slices.SortStableFunc(n.wide, Compare)
	slices.SortStableFunc(n.selected, Compare)
	count := make(map[label]int)
	for _, p := range n.selected {
		for k, v := range p.Selector {
			count[label{k, v}]++
		}
	}
	n.index = make(map[label][]int, len(n.selected))
	for i, p := range n.selected {
		// The rarest label keeps the lists short where all selectors share one.
		var rarest label
		fewest := math.MaxInt
		for k, v := range p.Selector {
			if c := count[label{k, v}]; c < fewest {
				rarest, fewest = label{k, v}, c
			}
		}
		n.index[rarest] = append(n.index[rarest], i)
	}
	return n
}

// first returns the position in selected of the policy that counts for a workload,
// or -1.
func (n *namespace) first(labels map[string]string) int {
	winner := len(n.selected)
	for k, v := range labels {
		for _, i := range n.index[label{k, v}] {
			if i >= winner {
				break
			}
			if Matches(n.selected[i].Selector, labels) {
				winner = i
			}
		}
	}
	if winner == len(n.selected) {
		return -1
	}
	return winner
}

// Resolve decides for a workload with these labels. Its time is in the number of
// labels and of the policies that share a label with the workload; it allocates
// nothing.
func (s *Set) Resolve(namespace string, labels map[string]string) Result {
	if s.Closed() != "" {
		return Result{Mode: Strict, Source: Source{Level: LevelClosed}}
	}
	r := Result{Mode: Permissive, Source: Source{Level: LevelDefault}}
	if len(s.mesh.wide) > 0 {
		r.overlay(s.mesh.wide[0], LevelMesh)
	}
	// Selectors in the root namespace choose nothing, there or elsewhere: that
	// namespace is not in the map.
	n := s.namespaces[namespace]
	if n == nil {
		return r
	}
	if len(n.wide) > 0 {
		r.overlay(n.wide[0], LevelNamespace)
	}
	if i := n.first(labels); i >= 0 {
		r.overlay(n.selected[i], LevelWorkload)
		r.ports, r.portPolicy = n.selected[i].Ports, n.selected[i].Ref
	}
	return r
}
