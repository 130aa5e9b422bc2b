package policy_test

import (
	"maps"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshca/meshca/policy"
)

const (
	rootNS = "istio-system"
	S      = policy.Strict
	P      = policy.Permissive
	D      = policy.Disable
	U      = policy.Unset
)

type ports = map[uint16]policy.Mode

// pol makes a policy; with adds to it.
func pol(namespace, name string, created int, mode policy.Mode) policy.Policy {
	return policy.Policy{Ref: policy.Ref{Namespace: namespace, Name: name}, Created: at(created), Mode: mode}
}

func with(p policy.Policy, ports ports, selector ...string) policy.Policy {
	p.Ports = ports
	p.Selector = make(map[string]string)
	for i := 0; i < len(selector); i += 2 {
		p.Selector[selector[i]] = selector[i+1]
	}
	return p
}

func mesh(mode policy.Mode) policy.Policy { return pol(rootNS, "default", 1, mode) }
func ns(mode policy.Mode) policy.Policy   { return pol("foo", "default", 1, mode) }
func wl(mode policy.Mode, ports ports) policy.Policy {
	return with(pol("foo", "w", 1, mode), ports, "app", "a")
}

// example is a line of the table that says what the rules mean.
type example struct {
	name     string
	policies []policy.Policy
	mode     policy.Mode
	ports    ports // of them, those that tell something
}

func examples() []example {
	return []example{
		{"1: nothing", nil, P, nil},
		{"2: mesh", []policy.Policy{mesh(S)}, S, nil},
		{"6: namespace", []policy.Policy{ns(S)}, S, nil},
		{"8: namespace over mesh", []policy.Policy{mesh(S), ns(P)}, P, nil},
		{"10: UNSET inherits", []policy.Policy{mesh(S), ns(U)}, S, nil},
		{"13: an empty selector is none", []policy.Policy{with(mesh(S), nil)}, S, nil},
		{"14: selector in the root namespace", []policy.Policy{with(mesh(S), nil, "app", "a")}, P, nil},
		{"17: workload", []policy.Policy{wl(S, nil)}, S, nil},
		{"19: all labels must match", []policy.Policy{with(ns(S), nil, "app", "a", "v", "2")}, P, nil},
		{"21: workload over namespace", []policy.Policy{ns(S), wl(D, nil)}, D, nil},
		{"23: workload without mtls", []policy.Policy{ns(S), wl(U, nil)}, S, nil},
		{"26: the oldest wins", []policy.Policy{pol(rootNS, "c", 2, D), pol(rootNS, "b", 1, P), pol(rootNS, "d", 1, S)}, P, nil},
		{"28: an older UNSET wins and inherits", []policy.Policy{pol("foo", "zzz", 0, U), pol("foo", "aaa", 1, S)}, P, nil},
		{"31: at the same age the name", []policy.Policy{with(pol("foo", "w1", 1, D), nil, "v", "1"), with(pol("foo", "w2", 1, S), nil, "app", "a")}, D, nil},
		{"33: the second is ignored whole", []policy.Policy{
			ns(S), with(pol("foo", "p1", 1, U), ports{8000: P}, "app", "a"), with(pol("foo", "p2", 2, U), ports{9000: P}, "app", "a"),
		}, S, ports{8000: P, 9000: S}},
		{"35: a stricter port", []policy.Policy{wl(D, ports{9000: S})}, D, ports{9000: S}},
		{"38: a more open port", []policy.Policy{wl(S, ports{9000: P})}, S, ports{9000: P}},
		{"39: ports that inherit", []policy.Policy{mesh(S), wl(U, ports{80: D, 90: U, 100: U})}, S, ports{80: D, 90: S, 100: S}},
		{"42: ports of a namespace's policy", []policy.Policy{with(ns(S), ports{8080: D})}, S, ports{8080: S}},
		{"48: the port of the Service", []policy.Policy{wl(S, ports{8000: D})}, S, ports{80: S, 8000: D}},
		{"49: a port in no Service", []policy.Policy{wl(P, ports{9999: S})}, P, ports{9999: S}},
	}
}

func TestV22_Examples(t *testing.T) {
	labels := map[string]string{"app": "a", "v": "1"}
	for _, tt := range examples() {
		t.Run(tt.name, func(t *testing.T) {
			r := policy.New(tt.policies, rootNS).Resolve("foo", labels)
			if r.Mode != tt.mode {
				t.Errorf("mode %v, want %v", r.Mode, tt.mode)
			}
			for port, want := range tt.ports {
				if got := r.ForPort(port); got != want {
					t.Errorf("port %d: %v, want %v", port, got, want)
				}
			}
			o := oracle{rootNS, tt.policies}
			for port := range maps.Keys(tt.ports) {
				if got := o.mode("foo", labels, port); got != tt.ports[port] {
					t.Errorf("port %d: the oracle says %v, want %v", port, got, tt.ports[port])
				}
			}
			if got := o.mode("foo", labels, 1); got != tt.mode {
				t.Errorf("the oracle says %v, want %v", got, tt.mode)
			}
		})
	}
}

func TestExplain(t *testing.T) {
	set := policy.New([]policy.Policy{
		mesh(S), pol(rootNS, "later", 2, D), with(pol(rootNS, "picky", 1, D), nil, "app", "a"),
		ns(U), wl(P, ports{80: D, 90: U, 100: policy.Unknown}), with(pol("foo", "x", 1, D), nil, "app", "a"),
		with(pol("foo", "other", 0, D), nil, "app", "b"), pol("bar", "default", 0, D),
	}, rootNS)
	e := set.Explain("foo", map[string]string{"app": "a"})
	if want := []policy.Step{
		{Level: policy.LevelMesh, Policy: mesh(S).Ref, Mode: S},
		{Level: policy.LevelNamespace, Policy: ns(U).Ref, Mode: U},
		{Level: policy.LevelWorkload, Policy: wl(P, nil).Ref, Mode: P, Decides: true},
	}; !cmp.Equal(want, e.Steps) {
		t.Error(cmp.Diff(want, e.Steps))
	}
	if want := []policy.Loss{
		{policy.Ref{Namespace: rootNS, Name: "later"}, policy.LevelMesh, D, mesh(S).Ref, "istio-system/default is older: made 2026-01-01T00:00:01Z, this one 2026-01-01T00:00:02Z"},
		{policy.Ref{Namespace: rootNS, Name: "picky"}, policy.LevelWorkload, D, policy.Ref{}, `a selector in the root namespace "istio-system" chooses nothing`},
		{policy.Ref{Namespace: "foo", Name: "x"}, policy.LevelWorkload, D, wl(P, nil).Ref, "foo/w is of the same age and its name comes first"},
	}; !cmp.Equal(want, e.Lost) {
		t.Error(cmp.Diff(want, e.Lost))
	}
	if want := []string{"foo/w: its mode for port 100 is not known to this version and is taken as STRICT"}; !cmp.Equal(want, e.Warnings) {
		t.Error(cmp.Diff(want, e.Warnings))
	}
	for port, want := range map[uint16]policy.Source{
		80: {Level: policy.LevelPort, Policy: wl(P, nil).Ref},
		90: {Level: policy.LevelWorkload, Policy: wl(P, nil).Ref},
		1:  {Level: policy.LevelWorkload, Policy: wl(P, nil).Ref},
	} {
		if got := e.SourceForPort(port); got != want {
			t.Errorf("port %d: decided by %v, want %v", port, got, want)
		}
	}
	for namespace, want := range map[string]policy.Source{
		"bar":  {Level: policy.LevelNamespace, Policy: policy.Ref{Namespace: "bar", Name: "default"}},
		"else": {Level: policy.LevelMesh, Policy: mesh(S).Ref},
		rootNS: {Level: policy.LevelMesh, Policy: mesh(S).Ref},
	} {
		if got := set.Resolve(namespace, nil).Source; got != want {
			t.Errorf("namespace %q: decided by %v, want %v", namespace, got, want)
		}
	}
}
