package main

import (
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

func newPolicyResolve() *cobra.Command {
	var (
		flags     policyFlags
		namespace string
		labels    []string
		port      int
	)
	c := &cobra.Command{
		Use:   "resolve -f PATH… --namespace NS --labels k=v,…",
		Short: "say which mode a workload's ports have, and which policy decided it",
		Long: `Resolve reads PeerAuthentications and prints the mode of a workload: STRICT,
PERMISSIVE or DISABLE, those of the ports that a policy names, who decided, and
which policies lost and why. With --port, the mode is that port's.

Port numbers are those that the workload listens on, not a Service's. Of several
policies of one kind the oldest wins (creationTimestamp; an object without one is
older than all others), then the first by name. A mode that this version does not
know is STRICT. Policies that the API server would refuse are refused here, unless
their meaning is beyond doubt; "meshca policy lint" names them.`,
		Example: "  meshca policy resolve -f policies/ --namespace shop --labels app=cart --port 8080\n" +
			"  kubectl get peerauthentications -A -o yaml | meshca policy resolve -f - --root-namespace istio-system --namespace shop --labels app=cart -o json",
		RunE: func(c *cobra.Command, args []string) error {
			m, err := flags.load(c, args)
			if err != nil {
				return err
			}
			if namespace == "" {
				return cli.Usagef("--namespace: give the workload's")
			}
			parsed, err := parseLabels(labels)
			if err != nil {
				return err
			}
			asked := c.Flags().Changed("port")
			if asked && (port < 1 || port > math.MaxUint16) {
				return cli.Usagef("--port %d: it must be 1 to 65535", port)
			}
			policies, err := m.usable()
			if err != nil {
				return err
			}
			e := policy.New(policies, flags.rootNamespace).Explain(namespace, parsed)
			result := newResolved(e, m.warnings(e))
			if asked {
				result.ask(e, uint16(port))
			}
			return printResult(c.OutOrStdout(), flags.output, result, result.text)
		},
	}
	flags.register(c)
	f := c.Flags()
	f.StringVar(&namespace, "namespace", "", "the workload's namespace")
	f.StringArrayVar(&labels, "labels", nil, "the workload's labels, as key=value with commas between; repeatable")
	f.IntVar(&port, "port", 0, "the port to tell the mode of, 1 to 65535")
	return c
}

// parseLabels reads k=v,k=v.
func parseLabels(texts []string) (map[string]string, error) {
	labels := make(map[string]string)
	for _, text := range texts {
		for pair := range strings.SplitSeq(text, ",") {
			if pair == "" {
				continue
			}
			key, value, ok := strings.Cut(pair, "=")
			if !ok || key == "" {
				return nil, cli.Usagef("--labels %q: %q is not key=value", text, pair)
			}
			if _, twice := labels[key]; twice {
				return nil, cli.Usagef("--labels %q: label %q is given twice", text, key)
			}
			labels[key] = value
		}
	}
	return labels, nil
}

// usable returns the policies, or what makes an answer impossible.
func (m *manifests) usable() ([]policy.Policy, error) {
	if len(m.broken) > 0 {
		return nil, m.broken[0]
	}
	policies := make([]policy.Policy, 0, len(m.policies))
	for _, p := range m.policies {
		if worst, bad := p.Worst(); bad && worst.Verdict == manifest.Unusable {
			return nil, &manifestError{p.File, worst.Line, worst.Code, p.Ref, worst.Code + ": " + worst.Text}
		}
		policies = append(policies, p.Policy.Policy)
	}
	return policies, nil
}

// warnings are what is to be said about the policies that had a part in a decision.
func (m *manifests) warnings(e policy.Explanation) []string {
	all := []string{}
	for _, step := range e.Steps {
		p := m.policies[m.seen[step.Policy]]
		for _, problem := range p.Problems {
			all = append(all, fmt.Sprintf("%s:%d: %s: %s: %s", p.File, problem.Line, p.Ref, problem.Code, problem.Text))
		}
	}
	return all
}

// resolved is the command's result.
type resolved struct {
	Mode     policy.Mode            `json:"mode"`
	Ports    map[uint16]policy.Mode `json:"ports"`
	Source   resolvedSource         `json:"source"`
	Warnings []string               `json:"warnings"`
}

type resolvedSource struct {
	decider
	Ports      map[uint16]decider `json:"ports"`
	Considered []consideredPolicy `json:"considered"`
	Lost       []lostPolicy       `json:"lost"`
}

// decider says which policy decided. Policy is empty where none did.
type decider struct {
	Level  policy.Level `json:"level"`
	Policy string       `json:"policy"`
	Reason string       `json:"reason"`
}

// consideredPolicy counts at its level, the widest level first.
type consideredPolicy struct {
	Level   policy.Level `json:"level"`
	Policy  string       `json:"policy"`
	Mode    policy.Mode  `json:"mode"`
	Decides bool         `json:"decides"`
}

// lostPolicy is about the workload and has no effect on it.
type lostPolicy struct {
	Level    policy.Level `json:"level"`
	Policy   string       `json:"policy"`
	Mode     policy.Mode  `json:"mode"`
	BeatenBy string       `json:"beaten_by,omitempty"`
	Reason   string       `json:"reason"`
}

func newResolved(e policy.Explanation, warnings []string) *resolved {
	r := &resolved{
		Mode: e.Mode, Ports: e.Ports(), Warnings: warnings,
		Source: resolvedSource{decider: newDecider(e.Source), Ports: map[uint16]decider{}, Considered: []consideredPolicy{}, Lost: []lostPolicy{}},
	}
	for port := range r.Ports {
		r.Source.Ports[port] = newDecider(e.SourceForPort(port))
	}
	for _, s := range e.Steps {
		r.Source.Considered = append(r.Source.Considered, consideredPolicy{s.Level, s.Policy.String(), s.Mode, s.Decides})
	}
	for _, l := range e.Lost {
		r.Source.Lost = append(r.Source.Lost, lostPolicy{l.Level, l.Policy.String(), l.Mode, l.BeatenBy.String(), l.Reason})
	}
	return r
}

// ask makes the result that of one port.
func (r *resolved) ask(e policy.Explanation, port uint16) {
	r.Mode, r.Source.decider = e.ForPort(port), newDecider(e.SourceForPort(port))
}

func newDecider(s policy.Source) decider {
	reason := map[policy.Level]string{
		policy.LevelPort:      "it selects the workload and names the port",
		policy.LevelWorkload:  "it selects the workload",
		policy.LevelNamespace: "it is for the whole namespace, and no policy with a selector says otherwise",
		policy.LevelMesh:      "it is for the whole mesh, and no narrower policy says otherwise",
		policy.LevelDefault:   "no policy says anything, which means PERMISSIVE",
	}[s.Level]
	return decider{s.Level, s.Policy.String(), reason}
}

func (d decider) String() string {
	if d.Policy == "" {
		return d.Reason
	}
	return d.Policy + ": " + d.Reason
}

func (r *resolved) text(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(t, "%s\t\t%s\n", r.Mode, r.Source.decider)
	for _, port := range slices.Sorted(maps.Keys(r.Ports)) {
		fmt.Fprintf(t, "%s\tport %s\t%s\n", r.Ports[port], strconv.Itoa(int(port)), r.Source.Ports[port])
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, l := range r.Source.Lost {
		if _, err := fmt.Fprintf(w, "without effect: %s (%s): %s\n", l.Policy, l.Mode, l.Reason); err != nil {
			return err
		}
	}
	for _, warning := range r.Warnings {
		if _, err := fmt.Fprintf(w, "warning: %s\n", warning); err != nil {
			return err
		}
	}
	return nil
}
