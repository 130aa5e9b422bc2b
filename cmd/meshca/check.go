package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/ca/kube/check"
	"github.com/meshca/meshca/cmd/internal/cli"
)

func newCheck() *cobra.Command {
	var (
		cluster       clusterFlags
		c             check.Config
		output        string
		all           bool
		agents, roots = "meshca-agents", "meshca-system"
	)
	cmd := &cobra.Command{
		Use:   "check",
		Short: "say whether a cluster is fit for meshca, and whether an installation is whole",
		Long: `Check judges the cluster that your kubeconfig names, by what you may read there.
Before the installation it says what would be in the way; afterwards also whether CA,
agents, permissions, roots and trust bundles are as they must be. It changes nothing.

Each finding has a code, which docs/findings.md explains. What holds is counted;
--all shows it. The exit code is 0 if nothing is broken (what will need attention
counts as that), 1 if something is, and 3 if nothing is known to be broken and
something could not be told. What could not be told is never shown as if it held.

Whether the CA can sign is what its readiness says. To look at one of the cluster's
tokens, check asks for one with an audience that nothing accepts, if you may.`,
		Example: "  meshca check\n  meshca check --all --context staging\n  meshca check -o json",
		Args:    cli.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			api, err := cluster.config()
			if err != nil {
				return err
			}
			c.API, c.Namespace, c.AgentsNamespace, c.RootNamespace, c.Now = api, cluster.namespace, agents, roots, time.Now
			progress := newProgress(cmd.Context(), cmd.ErrOrStderr(), "checking")
			c.Progress = func(what string) { progress.say("checking %s", what) }
			report, err := check.Run(cmd.Context(), c)
			progress.stop()
			if err != nil {
				return unknownHint(err)
			}
			if err := printResult(cmd.OutOrStdout(), output, report, func(w io.Writer) error { return printReport(w, report, all) }); err != nil {
				return err
			}
			return verdictOf(report)
		},
	}
	cluster.register(cmd)
	cmd.Flags().StringVar(&agents, "agents-namespace", agents, "the namespace of the agents")
	cmd.Flags().StringVar(&roots, "root-namespace", roots, "before the installation: the namespace whose policies are to be for the whole mesh")
	cmd.Flags().StringVar(&c.KubeletDir, "kubelet-dir", "/var/lib/kubelet", "the kubelet's folder on the nodes")
	cmd.Flags().BoolVar(&all, "all", false, "show also what holds")
	outputFlag(cmd, &output)
	return cmd
}

// verdictOf makes the exit code.
func verdictOf(r *check.Report) error {
	s := r.Summary
	switch {
	case s.Broken > 0:
		return fmt.Errorf("%d of %d checks do not hold", s.Broken, len(r.Checks))
	case s.Unknown > 0:
		return &cli.UnknownError{Err: fmt.Errorf("%d of %d checks could not be made", s.Unknown, len(r.Checks))}
	}
	return nil
}

// unknownHint says what to do where the API server told nothing.
func unknownHint(err error) error {
	hint := "see what kubectl says with the same --kubeconfig and --context"
	if errors.As(err, new(*check.UnreachableError)) {
		hint = "is the cluster up, and is it the one of --kubeconfig and --context?"
	}
	return &cli.UnknownError{Err: &cli.HintError{Err: err, Hint: hint}}
}

// printReport writes a report for people.
func printReport(w io.Writer, r *check.Report, all bool) error {
	var s strings.Builder
	m := localMarks().coloured(w)
	mark := map[check.Status]string{check.Holds: m.holds, check.Attention: m.attention, check.Broken: m.fails, check.Unknown: m.unknown}
	what := "fit for meshca"
	if r.Phase == check.After {
		what = "meshca in namespace " + r.Namespace
	}
	shown := 0
	if !all && r.Summary.Holds > 0 {
		fmt.Fprint(&s, wrapped(m.holds+" ", "  ", fmt.Sprintf("Kubernetes %s; %s: %s", r.Kubernetes, what, count(r.Summary.Holds, "check holds", "checks hold"))))
	}
	for _, c := range r.Checks {
		if c.Status == check.Holds && !all {
			continue
		}
		shown++
		fmt.Fprint(&s, wrapped(mark[c.Status]+" ", "    ", fmt.Sprintf("%s %s: %s", c.Code, c.Title, c.Found)))
		for _, o := range c.Objects {
			fmt.Fprint(&s, wrapped("    ", "      ", o))
		}
		if c.More > 0 {
			fmt.Fprintf(&s, "    and %d more\n", c.More)
		}
		if c.Next != "" {
			fmt.Fprint(&s, wrapped("    next: ", "    ", c.Next))
		}
	}
	fmt.Fprint(&s, summary(r, shown, all))
	_, err := io.WriteString(w, s.String())
	return err
}

func summary(r *check.Report, shown int, all bool) string {
	total := len(r.Checks)
	switch {
	case r.Summary.Holds == total:
		return fmt.Sprintf("all %d checks hold\n", total)
	case all:
		return fmt.Sprintf("%d of %d checks hold\n", r.Summary.Holds, total)
	}
	return fmt.Sprintf("%d of %d checks shown; the other %d hold (--all)\n", shown, total, r.Summary.Holds)
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
