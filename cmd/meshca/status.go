package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/ca/kube/overview"
	"github.com/meshca/meshca/cmd/internal/cli"
)

func newStatus() *cobra.Command {
	var (
		flags     watchingFlags
		namespace string
		all       bool
	)
	c := &cobra.Command{
		Use:   "status",
		Short: "show a running mesh: the CA, and each workload's certificate, bundle and policy",
		Long: `Status shows the mesh of a cluster as its CA sees it, with your own kubeconfig: which
replicas can sign, and of each pod that mounts the CSI volume, whether a stream shows it,
which bundle and policy it has acknowledged, and when its certificate ends. Workloads that
need attention come first. The CA's replicas report every 5 s; what is older than 15 s
does not count.

A replica lists those that need attention (as many as fit into 200 KiB, usually all of
some hundreds) and 100 others; for the rest it vouches without details, and they are
counted. When a certificate ends is known to the replica that issued it, while it runs:
after a restart of the CA "not known" is shown until the next renewal.

It needs list on ConfigMaps and Pods in the CA's namespace, and list on Pods of the
cluster, or of the one namespace given.

The exit code is 0 if all holds, 1 if something needs attention, and 3 if that could not
be told.`,
		Example: "  meshca status\n  meshca status --namespace shop --all\n  meshca status -o json | jq '.workloads[] | select(.state != \"holds\")'",
		Args:    cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(flags.output); err != nil {
				return err
			}
			a, err := flags.open()
			if err != nil {
				return untold(err)
			}
			picture, err := lookAt(c.Context(), c.ErrOrStderr(), a, flags.cluster.namespace, namespace)
			if err != nil {
				return untold(err)
			}
			view := statusView{picture, namespace, all, localMarks()}
			if err := printResult(c.OutOrStdout(), flags.output, picture, view.text); err != nil {
				return err
			}
			return verdict(picture.Worst())
		},
	}
	flags.register(c)
	c.Flags().StringVarP(&namespace, "namespace", "n", "", "show the workloads of this namespace only")
	c.Flags().BoolVar(&all, "all", false, "show all workloads that are listed, and not just the first")
	return c
}

// verdict is how a command ends that has written its result.
func verdict(finding, unknown bool) error {
	switch {
	case finding:
		return cli.ErrFound
	case unknown:
		return cli.ErrUntold
	}
	return nil
}

// lookAt reads what there is to see.
func lookAt(ctx context.Context, w io.Writer, a *api, system, namespace string) (*overview.Picture, error) {
	p := newProgress(ctx, w, "reading what the CA's replicas report")
	defer p.stop()
	docs, err := a.reports(ctx, system)
	if err != nil {
		return nil, err
	}
	replicas, err := overview.Replicas(ctx, a.CoreV1(), system)
	if err != nil {
		return nil, err
	}
	p.say("reading the cluster's pods")
	pods, err := overview.Pods(ctx, a.CoreV1(), namespace, func(n int) { p.say("reading the cluster's pods: %d so far", n) })
	if err != nil {
		return nil, err
	}
	return overview.Merge(docs, replicas, pods, namespace, a.now()), nil
}
