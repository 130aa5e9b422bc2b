package main

import (
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/policy/lint"
)

func newPolicyLint() *cobra.Command {
	var flags policyFlags
	c := &cobra.Command{
		Use:   "lint -f PATH…",
		Short: "name the policies that would be refused, and those that have no effect",
		Long: `Lint judges PeerAuthentications as the API server and Istio's webhook would (codes
PV0 to PV20, PA6), and names those that are accepted and do not do what they say:

  PL0   a policy for the mesh in istio-system, which is not the root namespace
  PL1   a selector in the root namespace
  PL2   a second policy for one namespace, or for the mesh
  PL3   two policies that select one pod           judged when -f holds Pods
  PL4   a port that is a Service's, not the pods'  judged when -f holds Services
  PL5   a mode that gives way to an older policy's
  PL6   a selector that matches nothing            judged when -f holds Pods

What cannot be judged is listed as not checked. The exit code is 1 if a policy would
be refused, and 0 if not, even if some have no effect.`,
		Example: "  meshca policy lint -f policies/\n" +
			"  kubectl get peerauthentications,services,pods -A -o yaml | meshca policy lint -f - --root-namespace istio-system -o json",
		RunE: func(c *cobra.Command, args []string) error {
			m, err := flags.load(c, args)
			if err != nil {
				return err
			}
			report := lint.Run(lint.Input{RootNamespace: flags.rootNamespace, Policies: m.policies, Services: m.services, Pods: m.pods})
			result := newLinted(report, m)
			if err := printResult(c.OutOrStdout(), flags.output, result, result.text); err != nil {
				return err
			}
			if n := report.Rejected() + len(m.broken); n > 0 {
				return fmt.Errorf("%d of the findings would have the API server refuse a policy", n)
			}
			return nil
		},
	}
	flags.register(c)
	return c
}

// linted is the command's result.
type linted struct {
	Findings   []lintFinding `json:"findings"`
	NotChecked []notChecked  `json:"not_checked"`
	// NotRead counts the objects of kinds that are not looked at, by kind: a
	// misspelt one is among them.
	NotRead  map[string]int `json:"not_read,omitempty"`
	Policies int            `json:"policies"`
	Files    int            `json:"files"`
}

type lintFinding struct {
	Code     string        `json:"code"`
	Severity lint.Severity `json:"severity"`
	Policy   string        `json:"policy"` // empty where a file is not readable
	BeatenBy string        `json:"beaten_by,omitempty"`
	File     string        `json:"file"`
	Line     int           `json:"line"`
	Message  string        `json:"message"`
}

type notChecked struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func newLinted(r lint.Report, m *manifests) *linted {
	result := &linted{Findings: []lintFinding{}, NotChecked: []notChecked{}, NotRead: m.notRead, Policies: len(m.policies), Files: m.files}
	for _, e := range m.broken {
		result.Findings = append(result.Findings, lintFinding{Code: e.code, Severity: lint.Rejected, Policy: e.policy.String(), File: e.file, Line: e.line, Message: e.text})
	}
	for _, f := range r.Findings {
		result.Findings = append(result.Findings, lintFinding{f.Code, f.Severity, f.Policy.String(), f.BeatenBy.String(), f.File, f.Line, f.Text})
	}
	for _, n := range r.NotChecked {
		result.NotChecked = append(result.NotChecked, notChecked{n.Code, "not checked: " + n.Text})
	}
	return result
}

func (l *linted) text(w io.Writer) error {
	for _, f := range l.Findings {
		about := f.Policy
		if about != "" {
			about += ": "
		}
		if _, err := fmt.Fprintf(w, "%s:%d: %s %s: %s%s\n", f.File, f.Line, f.Code, f.Severity, about, f.Message); err != nil {
			return err
		}
	}
	for _, n := range l.NotChecked {
		if _, err := fmt.Fprintf(w, "%s %s\n", n.Code, n.Message); err != nil {
			return err
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(l.NotRead)) {
		if _, err := fmt.Fprintf(w, "not read: %d of kind %q\n", l.NotRead[kind], kind); err != nil {
			return err
		}
	}
	found := "nothing found"
	if n := len(l.Findings); n > 0 {
		found = fmt.Sprintf("%d found", n)
	}
	_, err := fmt.Fprintf(w, "%s in %d PeerAuthentications of %d files\n", found, l.Policies, l.Files)
	return err
}
