// Meshca is the certificate authority and the operator's command line: it makes
// the root (init), serves certificates to agents and to Istio's clients
// (serve), and shows the whole path in one process (demo).
//
// The package only wires: flags and configuration in, the parts of packages
// ca and identity built bottom-up, run, drain.
package main

import (
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/cmd/internal/cli"
)

func main() {
	os.Exit(cli.Main(newRoot(), os.Args[1:], os.Stdout, os.Stderr))
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "meshca",
		Short: "certificate authority and SPIFFE identity service for service meshes",
		Long: `meshca issues short-lived SPIFFE X.509 certificates to workloads that prove
themselves with a Kubernetes ServiceAccount token. It speaks Istio's CSR API and
xDS; the agent hands the certificates to Envoy and to SPIFFE programs.

Start with "meshca demo", which shows the whole path on this machine.`,
	}
	root.AddCommand(newInit(), newServe(), newDemo(), newPolicy(), newCheck(), newStatus(), newExplain(), newBackup(), newRestore(), newUninstall(), newVersion())
	return root
}

func newVersion() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "version",
		Short: "print the version",
		Args:  cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return printResult(c.OutOrStdout(), output, map[string]string{"version": cli.Version()}, func(w io.Writer) error {
				_, err := io.WriteString(w, "meshca "+cli.Version()+"\n")
				return err
			})
		},
	}
	outputFlag(c, &output)
	return c
}
