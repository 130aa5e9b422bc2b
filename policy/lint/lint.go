package lint

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

// Severity is what becomes of a policy that a finding is about.
type Severity string

const (
	Rejected    Severity = "rejected"    // the API server refuses it
	Ineffective Severity = "ineffective" // it is accepted, and does not do what it says
	Warning     Severity = "warning"     // it does what it says, which may not be what is meant
)

// istioRoot is where policies for the mesh are likely to come from.
const istioRoot = "istio-system"

// Finding is one thing to say about one policy.
type Finding struct {
	Code     string // PV0 to PV20, PA3, PA6, PL0 to PL6
	Severity Severity
	Policy   policy.Ref
	BeatenBy policy.Ref // the policy that wins instead, if one does
	File     string
	Line     int
	Text     string
}

// NotChecked is a rule that could not be judged.
type NotChecked struct{ Code, Text string }

// Policy is a policy and the file that it is in.
type Policy struct {
	manifest.Policy
	File string
}

// Input is all that is known.
type Input struct {
	RootNamespace string
	Policies      []Policy // each name once
	Services      []manifest.Service
	Pods          []manifest.Pod
}

// Report is the outcome, in the order of files and lines.
type Report struct {
	Findings   []Finding
	NotChecked []NotChecked
}

// Rejected counts the findings for which a policy is refused.
func (r Report) Rejected() int {
	n := 0
	for _, f := range r.Findings {
		if f.Severity == Rejected {
			n++
		}
	}
	return n
}

// Run judges. A policy that is refused has no effect on the others.
func Run(in Input) Report {
	l := linter{Input: in, groups: make(map[string]*group)}
	for _, p := range in.Policies {
		if l.verdicts(p) {
			l.admit(p)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(l.groups)) {
		g := l.groups[name]
		slices.SortStableFunc(g.wide, compare)
		slices.SortStableFunc(g.selected, compare)
		l.wide(g.wide)
		l.covered(g.selected)
		l.pods(g.selected)
		l.ports(g.selected)
	}
	if len(in.Pods) == 0 {
		l.not("PL3", "whether two policies match one pod: no Pod is given")
		l.not("PL6", "whether a selector matches anything: no Pod is given")
	}
	if len(in.Services) == 0 {
		l.not("PL4", "whether a port is a Service's and not the pods': no Service is given")
	}
	slices.SortStableFunc(l.Findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Code, b.Code))
	})
	slices.SortStableFunc(l.NotChecked, func(a, b NotChecked) int { return cmp.Compare(a.Code, b.Code) })
	return l.Report
}

type linter struct {
	Input
	Report
	groups map[string]*group // by namespace
}

// group are the policies of a namespace that would be accepted.
type group struct{ wide, selected []Policy }

func compare(a, b Policy) int { return policy.Compare(a.Policy.Policy, b.Policy.Policy) }

func (l *linter) find(p Policy, code string, s Severity, beatenBy policy.Ref, format string, args ...any) {
	l.Findings = append(l.Findings, Finding{code, s, p.Ref, beatenBy, p.File, p.Line, fmt.Sprintf(format, args...)})
}

func (l *linter) not(code, text string) {
	l.NotChecked = append(l.NotChecked, NotChecked{code, text})
}

// verdicts reports what is wrong with a policy by itself, each rule once, and
// whether it would be accepted.
func (l *linter) verdicts(p Policy) (accepted bool) {
	accepted = true
	said := make(map[string]bool)
	for _, problem := range p.Problems {
		severity := Rejected
		if problem.Verdict == manifest.Warned {
			severity = Warning
		} else {
			accepted = false
		}
		if !said[problem.Code] {
			said[problem.Code] = true
			l.find(p, problem.Code, severity, policy.Ref{}, "%s", problem.Text)
			l.Findings[len(l.Findings)-1].Line = problem.Line
		}
	}
	return accepted
}

// admit sorts an accepted policy in, or says that its place makes it void.
func (l *linter) admit(p Policy) {
	g := l.groups[p.Namespace]
	if g == nil {
		g = new(group)
		l.groups[p.Namespace] = g
	}
	if p.Namespace == istioRoot && l.RootNamespace != istioRoot && len(p.Selector) == 0 {
		l.find(p, "PL0", Warning, policy.Ref{}, "%q is Istio's root namespace; the one here is %q, so the policy is not for the mesh", istioRoot, l.RootNamespace)
	}
	switch {
	case len(p.Selector) == 0:
		g.wide = append(g.wide, p)
	case p.Namespace == l.RootNamespace:
		l.find(p, "PL1", Ineffective, policy.Ref{}, "a selector in the root namespace %q chooses nothing; put the policy into the workload's namespace, or leave the selector out", l.RootNamespace)
	default:
		g.selected = append(g.selected, p)
	}
}

// wide judges policies without selector: the first counts.
func (l *linter) wide(sorted []Policy) {
	for i, p := range sorted {
		if i == 0 {
			continue
		}
		first := sorted[0]
		scope := fmt.Sprintf("namespace %q", p.Namespace)
		if p.Namespace == l.RootNamespace {
			scope = "the mesh"
		}
		why := policy.Why(first.Policy.Policy, p.Policy.Policy)
		l.find(p, "PL2", Ineffective, first.Ref, "it is not the only policy for %s, and %s", scope, why)
		if p.Mode != first.Mode {
			l.find(p, "PL5", Ineffective, first.Ref, "its mode %v gives way to %v: %s", p.Mode, first.Mode, why)
		}
	}
}

// covered finds policies that can never win, whatever pods there are: all that they
// select is selected by an older one too.
func (l *linter) covered(sorted []Policy) {
	for i, p := range sorted {
		for _, older := range sorted[:i] {
			if !policy.Matches(older.Selector, p.Selector) || p.Mode == older.Mode && maps.Equal(p.Ports, older.Ports) {
				continue
			}
			l.find(p, "PL5", Ineffective, older.Ref, "its %s to %s's on every workload that it selects: %s", gives(p.Policy.Policy, older.Policy.Policy), older.Ref, policy.Why(older.Policy.Policy, p.Policy.Policy))
			break
		}
	}
}

func gives(p, older policy.Policy) string {
	if p.Mode == older.Mode {
		return "port-level modes give way"
	}
	return fmt.Sprintf("mode %v gives way", p.Mode)
}
