package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/ca/self"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/identity"
)

func newInit() *cobra.Command {
	var (
		stateDir, trustDomain, output string
		lifetime                      time.Duration
	)
	c := &cobra.Command{
		Use:   "init",
		Short: "make the root of a new trust domain",
		Long: `Init makes the root key and certificate of a new trust domain in --state-dir, and
beside them root.pem, the certificate alone, which agents take as their trust
anchor. It may be interrupted at any instant and run again.

It never replaces a root: a directory that holds one, or the traces of one whose
key is lost, is refused. The key is readable by the current user only; run
"meshca serve" as that user, and keep a backup of the directory offline.`,
		Example: "  meshca init --state-dir state --trust-domain example.org",
		Args:    cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err // before anything is made that cannot be made twice
			}
			td, err := identity.ParseTrustDomain(trustDomain)
			if err != nil {
				return cli.Usagef("--trust-domain: %w", err)
			}
			root, err := self.Init(stateDir, self.InitConfig{TrustDomain: td, Lifetime: lifetime, Now: time.Now})
			if err != nil {
				return initHint(err)
			}
			result := map[string]string{
				"trust_domain": td.String(),
				"state_dir":    stateDir,
				"trust_anchor": self.AnchorPath(stateDir),
				"not_after":    root.NotAfter.UTC().Format(time.RFC3339),
				"subject":      root.Subject.String(),
			}
			return printResult(c.OutOrStdout(), output, result, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "made the root of trust domain %s, good until %s\n  agents trust  %s\n  next          meshca serve --state-dir %s --config meshca.yaml\n",
					td, result["not_after"], result["trust_anchor"], stateDir)
				return err
			})
		},
	}
	f := c.Flags()
	f.StringVar(&stateDir, "state-dir", "state", "the directory to make the root in")
	f.StringVar(&trustDomain, "trust-domain", "cluster.local", "the trust domain; it cannot be changed later")
	f.DurationVar(&lifetime, "root-lifetime", 10*365*24*time.Hour, "how long the root is good")
	outputFlag(c, &output)
	return c
}

// stateHint says what to do about a state directory that cannot be used.
func stateHint(err error, dir string, td identity.TrustDomain) error {
	var missing *self.NotInitializedError
	if errors.As(err, &missing) {
		return &cli.HintError{Err: err, Hint: fmt.Sprintf("to make a root there: meshca init --state-dir %s --trust-domain %s", dir, td)}
	}
	var other *self.TrustDomainError
	if errors.As(err, &other) {
		return &cli.HintError{Err: err, Hint: `set "trust_domain" to the one the root was made for, or give another --state-dir`}
	}
	return err
}

// initHint says what to do about a root that is there already.
func initHint(err error) error {
	var exists *self.ExistsError
	if errors.As(err, &exists) {
		return &cli.HintError{Err: err, Hint: `to use it: meshca serve; for another trust domain: give another --state-dir`}
	}
	return err
}
