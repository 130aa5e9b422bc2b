package main

import (
	"github.com/spf13/cobra"

	"github.com/meshca/meshca/cmd/internal/cli"
)

// defaultRootNamespace is where the policies for the whole mesh are.
const defaultRootNamespace = "meshca-system"

func newPolicy() *cobra.Command {
	c := &cobra.Command{
		Use:   "policy",
		Short: "say what PeerAuthentications in files mean, and which have no effect",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return cli.Usagef("unknown command %q for %q; see %s --help", args[0], c.CommandPath(), c.CommandPath())
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newPolicyResolve(), newPolicyLint())
	return c
}

// policyFlags are what both commands need to find policies.
type policyFlags struct {
	files         []string
	rootNamespace string
	output        string
}

func (f *policyFlags) register(c *cobra.Command) {
	c.Flags().StringArrayVarP(&f.files, "filename", "f", nil, "a file, a directory of .yaml, .yml and .json files, or - for standard input; repeatable, and paths may follow")
	c.Flags().StringVar(&f.rootNamespace, "root-namespace", defaultRootNamespace, "the namespace whose policies are for the whole mesh; Istio's is istio-system")
	outputFlag(c, &f.output)
}

// load reads what the flags, and the paths that follow them, name.
func (f *policyFlags) load(c *cobra.Command, args []string) (*manifests, error) {
	if f.output != "text" && f.output != "json" {
		return nil, cli.Usagef("-o %q: choose text or json", f.output)
	}
	if f.rootNamespace == "" {
		return nil, cli.Usagef("--root-namespace: give a name")
	}
	if len(f.files) == 0 {
		return nil, cli.Usagef("-f: give at least one file or directory with policies")
	}
	return loadManifests(c.InOrStdin(), append(f.files, args...))
}
