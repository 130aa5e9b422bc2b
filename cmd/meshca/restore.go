package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/cmd/internal/cli"
)

// maxBackup bounds what is read as a backup: a root has two kilobytes.
const maxBackup = 4 << 20

func newRestore() *cobra.Command {
	var (
		cluster      clusterFlags
		file, output string
		asNewest     bool
	)
	c := &cobra.Command{
		Use:   "restore --file FILE",
		Short: "put back the CA's roots and shared state in a cluster from a backup",
		Long: `Restore creates what is missing of the root Secrets, their marker and the shared
state in the CA's namespace, with your own kubeconfig. All is judged before anything
is written: a root that is there and is not the backup's is never replaced, and a newer
state than the backup's is kept. Replicas of the CA may run meanwhile; those that
refuse to sign go on within seconds.

A backup that is older than what the namespace has had is refused, since agents refuse
an older bundle. With --as-newest, what the backup says becomes the newest version:
workloads whose certificates come from a root that it does not know are cut off until
they have renewed.

It needs get and create on Secrets, and get, create and update on ConfigMaps in the
namespace.`,
		Example: "  meshca restore --file meshca-backup.json\n  age -d -i KEY meshca-backup.age | meshca restore --file -",
		Args:    cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			b, err := readBackup(file, c.InOrStdin())
			if err != nil {
				return err
			}
			client, err := cluster.connect()
			if err != nil {
				return err
			}
			done, err := b.Restore(c.Context(), client, cluster.namespace, asNewest)
			if err != nil {
				return restoreHint(err)
			}
			result := struct {
				TrustDomain string `json:"trust_domain"`
				Namespace   string `json:"namespace"`
				*state.Restored
			}{b.TrustDomain().String(), cluster.namespace, done}
			return printResult(c.OutOrStdout(), output, result, func(w io.Writer) error {
				return printRestored(w, b.TrustDomain().String(), cluster.namespace, done)
			})
		},
	}
	cluster.register(c)
	c.Flags().StringVar(&file, "file", "", "the backup; - for standard input")
	c.Flags().BoolVar(&asNewest, "as-newest", false, "make an older backup the newest version")
	outputFlag(c, &output)
	return c
}

func readBackup(file string, stdin io.Reader) (*state.Backup, error) {
	if file == "" {
		return nil, cli.Usagef("--file is not given; name the backup, or - for standard input")
	}
	in, name := stdin, "standard input"
	if file != stdio {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("reading the backup: %w", err)
		}
		defer f.Close()
		in, name = f, file
	}
	data, err := io.ReadAll(io.LimitReader(in, maxBackup+1))
	if err != nil {
		return nil, fmt.Errorf("reading the backup: %w", err)
	}
	if len(data) > maxBackup {
		return nil, fmt.Errorf("reading the backup %q: it has more than %d bytes", name, maxBackup)
	}
	return state.ParseBackup(name, data)
}

func printRestored(w io.Writer, td, namespace string, done *state.Restored) error {
	var s strings.Builder
	if len(done.Created)+len(done.Replaced) == 0 {
		fmt.Fprintf(&s, "all of trust domain %s was there already in namespace %s; nothing is changed\n", td, namespace)
	} else {
		fmt.Fprintf(&s, "restored trust domain %s in namespace %s, bundle %d\n", td, namespace, done.Sequence)
	}
	for _, part := range []struct {
		what    string
		objects []string
	}{{"created", done.Created}, {"replaced", done.Replaced}, {"kept", done.Kept}} {
		for _, o := range part.objects {
			fmt.Fprintf(&s, "  %-9s %s\n", part.what, o)
		}
	}
	if len(done.Created)+len(done.Replaced) > 0 {
		fmt.Fprintf(&s, "  next      replicas of the CA that run sign again within seconds: kubectl -n %s get pods\n", namespace)
	}
	_, err := io.WriteString(w, s.String())
	return err
}

// restoreHint says what to do about a namespace that holds something else.
func restoreHint(err error) error {
	if errors.As(err, new(*state.TrustDomainError)) {
		return &cli.HintError{Err: err, Hint: "the backup is of that other trust domain; give another file, or another --namespace"}
	}
	return err
}
