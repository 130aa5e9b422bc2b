package main

import (
	"errors"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/meshca/demo"
)

var errDidNotHold = errors.New("a step of the demo did not hold; run it with --verbose to see why")

func newDemo() *cobra.Command {
	var (
		stay, verbose bool
		output        string
	)
	c := &cobra.Command{
		Use:   "demo",
		Short: "show the whole path in one process",
		Long: `Demo runs a small mesh in this process, on loopback: an issuer of
Kubernetes-shaped tokens, the CA, two agents with their sockets, programs that talk
mutual TLS through go-spiffe, and a proxy before one that knows no TLS. Policies are
written to disk, and obeyed. Certificates live 12 s, so that renewals can be watched. Everything is in a temporary directory that is removed at the end.

Each step is judged at the other end of a socket. The exit code is 0 if every step
held and 1 if one did not.`,
		Example: "  meshca demo\n  meshca demo --stay      # then try curl, openssl and grpcurl on it",
		Args:    cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if stay && output == "json" {
				return cli.Usagef("--stay and -o json do not go together: a report is printed at the end, and --stay has none")
			}
			log := slog.New(slog.DiscardHandler)
			if verbose {
				log = slog.New(slog.NewTextHandler(c.ErrOrStderr(), nil))
			}
			report, err := demo.Run(c.Context(), demo.Config{
				Out: c.OutOrStdout(), Err: c.ErrOrStderr(), Log: log, Stay: stay, JSON: output == "json",
			})
			if err != nil {
				return err
			}
			if output == "json" {
				if err := printResult(c.OutOrStdout(), output, report, func(io.Writer) error { return nil }); err != nil {
					return err
				}
			}
			if !report.Held {
				return errDidNotHold
			}
			return nil
		},
	}
	f := c.Flags()
	f.BoolVar(&stay, "stay", false, "keep everything up afterwards, and print what to try, until interrupted")
	f.BoolVar(&verbose, "verbose", false, "show the log of all parts on standard error")
	outputFlag(c, &output)
	return c
}
