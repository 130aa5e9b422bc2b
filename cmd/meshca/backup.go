package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/cmd/internal/cli"
)

// stdio is the name of a file that means standard input or output.
const stdio = "-"

func newBackup() *cobra.Command {
	var (
		cluster      clusterFlags
		file, output string
	)
	c := &cobra.Command{
		Use:   "backup --file FILE",
		Short: "write the CA's roots and shared state in a cluster into a file",
		Long: `Backup reads the root Secrets, their marker and the shared state in the CA's
namespace with your own kubeconfig, and writes them into one new file that only you
can read. It never overwrites a file, and refuses to back up what the CA itself would
refuse.

The file holds the root key: whoever reads it can be any workload. Encrypt it, for
instance with age or gpg, and keep it where the cluster's own backups are not:

  meshca backup --file - | age -r KEY > meshca-backup.age

It is not printed on a terminal. Take one after the first start and after each rotation of the root. It needs get on
Secrets and ConfigMaps in the namespace.`,
		Example: "  meshca backup --file meshca-backup.json",
		Args:    cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if file == "" {
				return cli.Usagef("--file is not given; name a new file, or - for standard output")
			}
			if file == stdio && isTerminal(c.OutOrStdout()) {
				return cli.Usagef("--file - would print the root key on this terminal, where it stays in the scrollback; pipe it into what encrypts it, such as age -r KEY > meshca-backup.age, or name a new file")
			}
			client, err := cluster.connect()
			if err != nil {
				return err
			}
			b, err := state.TakeBackup(c.Context(), client, cluster.namespace, time.Now())
			if err != nil {
				return backupHint(err)
			}
			if file == stdio {
				_, err := c.OutOrStdout().Write(b.Encode())
				return err
			}
			if err := writeNew(file, b.Encode()); err != nil {
				return fmt.Errorf("writing the backup: %w", err)
			}
			result := map[string]any{
				"file": file, "trust_domain": b.TrustDomain().String(), "namespace": cluster.namespace,
				"roots": len(b.Roots), "sequence": b.State.Sequence, "epoch": b.State.Epoch,
			}
			return printResult(c.OutOrStdout(), output, result, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "backed up trust domain %s: %s, bundle %d\n  file  %s, which holds the root key: encrypt it (age, gpg), and keep it apart from the cluster\n  next  to try it: meshca restore --file %s, which changes nothing while all is there\n",
					b.TrustDomain(), plural(len(b.Roots), "root"), b.State.Sequence, file, file)
				return err
			})
		},
	}
	cluster.register(c)
	c.Flags().StringVar(&file, "file", "", "the file to write, which must not exist; - for standard output, which must be no terminal")
	outputFlag(c, &output)
	return c
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// writeNew writes a file that was not there before, for its owner alone, and has
// it on the disk before it returns. What could not be written whole is removed.
func writeNew(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// backupHint says what to do about a namespace that cannot be backed up.
func backupHint(err error) error {
	if errors.As(err, new(*state.NothingError)) {
		return &cli.HintError{Err: err, Hint: "give the namespace of the CA with --namespace"}
	}
	return err
}
