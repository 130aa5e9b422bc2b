package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/client-go/dynamic"

	"github.com/meshca/meshca/ca/kube/overview"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/meshca/findings"
)

func newExplain() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "explain CODE",
		Short: "say what a finding means, or everything about one pod (explain pod)",
		Long: `Explain prints what the code of a finding means and what to do about it: a code of
"meshca check" (such as MC0303) or "meshca policy lint" (PL5), or what "meshca status -o json" calls a finding (such
as ending_soon). All of them are in docs/findings.md.

For everything about one pod see "meshca explain pod".`,
		Example: "  meshca explain PL5\n  meshca explain pod shop/cart-7d9f-x2x8l",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return cli.Usagef("give one code, or: meshca explain pod NAMESPACE/NAME; see %s --help", c.CommandPath())
			}
			page, ok := findings.Find(args[0])
			if !ok {
				return cli.Usagef("there is no finding %q; there are %s", args[0], strings.Join(findings.Codes(), ", "))
			}
			return printResult(c.OutOrStdout(), output, page, func(w io.Writer) error {
				var b strings.Builder
				wrap(&b, page.Code+": "+page.Title, "", "  ")
				fmt.Fprintln(&b)
				wrap(&b, page.Means, "", "")
				fmt.Fprintln(&b)
				if page.See != "" {
					wrap(&b, "how to see it: "+page.See, "", "")
				}
				wrap(&b, "what to do: "+page.Do, "", "")
				_, err := io.WriteString(w, b.String())
				return err
			})
		},
	}
	outputFlag(c, &output)
	c.AddCommand(newExplainPod())
	return c
}

func newExplainPod() *cobra.Command {
	var flags watchingFlags
	c := &cobra.Command{
		Use:   "pod NAMESPACE/NAME",
		Short: "say everything about one pod: volume, agent, certificate, bundle, policy",
		Long: `Explain pod looks at one pod step by step, with your own kubeconfig: whether it exists
and where, whether it mounts the CSI volume as it must, whether the driver is installed and
the agent of its node ready, what events say, what the CA knows of it, and which mode each
of its ports has by the PeerAuthentications of this moment, and why. The last lines say what
to do.

It needs get on the pod and on CSIDrivers, list on Pods of the agents' namespace, on Events
and PeerAuthentications of the pod's namespace and the root namespace, and on ConfigMaps of
the CA's namespace. A step whose permission is missing says so, and the others are told.

The exit code is 0 if all holds, 1 if something needs attention, and 3 if that could not
be told.`,
		Example: "  meshca explain pod shop/cart-7d9f-x2x8l",
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(flags.output); err != nil {
				return err
			}
			if len(args) != 1 {
				return cli.Usagef("give one pod, as NAMESPACE/NAME; see %s --help", c.CommandPath())
			}
			namespace, name, ok := strings.Cut(args[0], "/")
			if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
				return cli.Usagef("%q is not NAMESPACE/NAME", args[0])
			}
			a, err := flags.open()
			if err != nil {
				return untold(err)
			}
			objects, err := dynamic.NewForConfig(a.config)
			if err != nil {
				return untold(err)
			}
			p := newProgress(c.Context(), c.ErrOrStderr(), "reading what there is to know of "+args[0])
			facts, err := overview.Collector{Client: a, Objects: objects, System: flags.cluster.namespace, Now: a.now}.Collect(c.Context(), namespace, name)
			p.stop()
			if err != nil {
				return untold(err)
			}
			e := overview.Explain(facts)
			if err := printResult(c.OutOrStdout(), flags.output, e, explainView{e, localMarks()}.text); err != nil {
				return err
			}
			return verdict(e.Worst())
		},
	}
	flags.register(c)
	return c
}

// explainView is an explanation as text.
type explainView struct {
	*overview.Explanation
	marks marks
}

func (v explainView) text(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "pod %s/%s\n\n", v.Namespace, v.Pod)
	for _, s := range v.Steps {
		mark := statusView{marks: v.marks}.mark(s.State)
		wrap(&b, s.Text, fmt.Sprintf("%-2s  %-6s  ", mark, s.Name), "            ")
		if s.Name == "policy" {
			v.ports(&b)
		}
		for _, m := range s.More {
			wrap(&b, m, "            ", "              ")
		}
	}
	fmt.Fprintln(&b)
	wrap(&b, v.Verdict, "", "")
	if v.Do != "" {
		// Something to write stands as it is to be written.
		lead, block, _ := strings.Cut(v.Do, "\n")
		wrap(&b, "what to do: "+lead, "", "")
		if block != "" {
			fmt.Fprintln(&b, "\n"+indent(block))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func indent(block string) string { return "  " + strings.ReplaceAll(block, "\n", "\n  ") }

// ports has a line for each that a container declares.
func (v explainView) ports(b *strings.Builder) {
	for _, p := range v.Ports {
		if p.Number == 0 {
			continue // that is the step's own text
		}
		name := fmt.Sprint(p.Number)
		if p.Name != "" {
			name += " (" + p.Name + ")"
		}
		wrap(b, fmt.Sprintf("port %s: %s, %s", name, p.Mode, newDecider(p.Source)), "            ", "              ")
	}
}
