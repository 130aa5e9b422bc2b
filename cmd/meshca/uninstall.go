package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/meshca/meshca/ca/kube/uninstall"
	"github.com/meshca/meshca/ca/kube/volumes"
	"github.com/meshca/meshca/cmd/internal/cli"
)

// uninstallOptions are the command's flags.
type uninstallOptions struct {
	cluster    clusterFlags
	agents     string
	output     string
	dryRun     bool
	wait       bool
	onlyPods   bool
	ignoreHelm bool
	timeout    time.Duration
	deleteRoot string
}

func newUninstall() *cobra.Command {
	var o uninstallOptions
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "take meshca out of a cluster: agents, then the CA; the root stays",
		Long: `Uninstall takes away what the manifest has installed, with your own kubeconfig: the
agents, then the CA. It refuses while a pod has a volume of csi.meshca.dev, and names
the pods: without an agent their certificates end, and they cannot be deleted cleanly.
With --wait it waits until there is none.

The root stays: its Secrets, marker and shared state, the trust bundles that carry it,
and both namespaces. An installation that comes later goes on with it. To delete it
too, give its trust domain to --delete-root; every certificate of that domain is
worthless from then on, so take a backup first (meshca backup). The definition of
PeerAuthentication and all policies stay in any case.

What Helm has installed is uninstalled by Helm, which asks the same first. Nothing is
ever asked on the terminal. It can be repeated after whatever went wrong.`,
		Example: "  meshca uninstall --dry-run\n  meshca uninstall --wait --timeout 30m\n  meshca uninstall --delete-root cluster.local",
		Args:    cli.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return o.run(c) },
	}
	o.cluster.register(c)
	f := c.Flags()
	f.StringVar(&o.agents, "agents-namespace", "meshca-agents", "the namespace of the agents")
	f.BoolVar(&o.dryRun, "dry-run", false, "say what would be deleted, and delete nothing")
	f.BoolVar(&o.wait, "wait", false, "wait until no pod has a volume any more")
	f.BoolVar(&o.onlyPods, "only-pods", false, "say only whether pods are in the way; this is what the chart's hook runs")
	f.BoolVar(&o.ignoreHelm, "ignore-helm", false, "go on where Helm has installed; its release then has to be removed by hand")
	f.DurationVar(&o.timeout, "timeout", 0, "give up after this long (0: never)")
	f.StringVar(&o.deleteRoot, "delete-root", "", "delete also the root of this trust domain, which must be the root's own")
	outputFlag(c, &o.output)
	return c
}

func (o *uninstallOptions) run(c *cobra.Command) error {
	if err := checkOutput(o.output); err != nil {
		return err
	}
	if o.onlyPods && (o.dryRun || o.deleteRoot != "") {
		return cli.Usagef("--only-pods deletes nothing; it goes with neither --dry-run nor --delete-root")
	}
	if o.dryRun && o.wait {
		return cli.Usagef("--dry-run waits for nothing; give it or --wait")
	}
	config, err := o.config()
	if err != nil {
		return err
	}
	ctx := c.Context()
	if o.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("--timeout %v is over", o.timeout))
		defer cancel()
	}
	progress := newProgress(ctx, c.ErrOrStderr(), "looking at what is installed")
	config.Progress = func(what string) { progress.say("%s", what) }
	result, err := o.do(ctx, config)
	progress.stop()
	doc := newUninstalled(result, err)
	// A refusal has a document too: scripts want the pods.
	if doc != nil {
		if err := printResult(c.OutOrStdout(), o.output, doc, func(w io.Writer) error { return doc.text(w, o) }); err != nil {
			return err
		}
	}
	return uninstallHint(err)
}

func (o *uninstallOptions) config() (uninstall.Config, error) {
	api, err := o.cluster.config()
	if err != nil {
		return uninstall.Config{}, err
	}
	client, err := kubernetes.NewForConfig(api)
	if err != nil {
		return uninstall.Config{}, err
	}
	objects, err := dynamic.NewForConfig(api)
	if err != nil {
		return uninstall.Config{}, err
	}
	return uninstall.Config{
		Client: client, Objects: objects, Namespace: o.cluster.namespace, AgentsNamespace: o.agents, Now: time.Now,
		DryRun: o.dryRun, IgnoreRelease: o.ignoreHelm, DeleteRoot: o.deleteRoot,
	}, nil
}

// do is the command without what it prints.
func (o *uninstallOptions) do(ctx context.Context, c uninstall.Config) (*uninstall.Result, error) {
	if o.wait {
		if err := uninstall.Wait(ctx, c); err != nil {
			return nil, err
		}
	}
	if !o.onlyPods {
		return uninstall.Run(ctx, c)
	}
	users, err := volumes.Users(ctx, c.Client, c.Now())
	if err == nil && len(users) > 0 {
		err = &uninstall.MountedError{Pods: users}
	}
	return nil, err
}

// uninstalled is the command's document.
type uninstalled struct {
	*uninstall.Result
	// Pods have a volume and are in the way: at most 500, and More how many more.
	Pods []volumes.Pod `json:"pods,omitempty"`
	More int           `json:"more_pods,omitempty"`
}

// mostPods bounds the document.
const mostPods = 500

func newUninstalled(r *uninstall.Result, err error) *uninstalled {
	doc := &uninstalled{Result: r}
	if r == nil {
		doc.Result = &uninstall.Result{Deleted: []string{}}
	}
	var mounted *uninstall.MountedError
	if errors.As(err, &mounted) {
		doc.Pods = mounted.Pods[:min(len(mounted.Pods), mostPods)]
		doc.More = len(mounted.Pods) - len(doc.Pods)
	} else if err != nil && len(doc.Deleted) == 0 {
		return nil // nothing was done, and the error says why
	}
	return doc
}

func (d *uninstalled) text(w io.Writer, o *uninstallOptions) error {
	var s strings.Builder
	for i, p := range d.Pods {
		if i == shownPods {
			fmt.Fprintf(&s, "  and %d more (-o json)\n", len(d.Pods)-i+d.More)
			break
		}
		node := "not on a node yet"
		if p.Node != "" {
			node = "on " + p.Node
		}
		if p.Ending {
			node += ", ending"
		}
		fmt.Fprintf(&s, "  %s  %s\n", p, node)
	}
	switch {
	case len(d.Pods) > 0:
	case o.onlyPods:
		fmt.Fprintf(&s, "no pod has a volume of %s\n", volumes.Driver)
	case len(d.Deleted) == 0:
		fmt.Fprintf(&s, "nothing of meshca is installed in namespaces %s and %s\n", o.cluster.namespace, o.agents)
	case d.DryRun:
		fmt.Fprintf(&s, "would delete %s, in this order:\n", plural(len(d.Deleted), "object"))
	default:
		fmt.Fprintf(&s, "deleted %s, in this order:\n", plural(len(d.Deleted), "object"))
	}
	for _, name := range d.Deleted {
		fmt.Fprintf(&s, "  %s\n", name)
	}
	for _, name := range d.Foreign {
		fmt.Fprintf(&s, "left alone, since it is somebody else's: %s\n", name)
	}
	if len(d.Pods) == 0 && !o.onlyPods {
		d.kept(&s, o)
	}
	_, err := io.WriteString(w, s.String())
	return err
}

// shownPods is how many the text names.
const shownPods = 10

// kept says what is left, and what it would mean to delete that too.
func (d *uninstalled) kept(s *strings.Builder, o *uninstallOptions) {
	for _, k := range d.Kept {
		s.WriteString(wrapped("kept: ", "  ", k))
	}
	if len(d.Kept) > 0 {
		s.WriteString(wrapped("next: ", "  ", fmt.Sprintf("to go on with this root, install again; to delete it, meshca backup -n %s --file FILE, and then meshca uninstall -n %s --delete-root DOMAIN: every certificate of the domain is worthless from then on",
			o.cluster.namespace, o.cluster.namespace)))
	} else if !d.DryRun {
		s.WriteString(wrapped("kept: ", "  ", fmt.Sprintf("the namespaces; when nothing in them is needed: kubectl delete namespace %s %s", o.cluster.namespace, o.agents)))
	}
	if d.Release != "" {
		namespace, name, _ := strings.Cut(d.Release, "/")
		s.WriteString(wrapped("next: ", "  ", fmt.Sprintf("Helm still lists its release: helm uninstall %s -n %s --no-hooks", name, namespace)))
	}
}

// uninstallHint says what to do about a refusal, and which errors mean that nothing
// could be told.
func uninstallHint(err error) error {
	var release *uninstall.ReleaseError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &release):
		return &cli.HintError{Err: err, Hint: fmt.Sprintf("run: helm uninstall %s -n %s (it refuses while pods have volumes, too), or give --ignore-helm", release.Name, release.Namespace)}
	case errors.As(err, new(*uninstall.MountedError)):
		return &cli.HintError{Err: err, Hint: "take the volume out of their workloads, or delete those, and try again; --wait waits for it"}
	case errors.As(err, new(*uninstall.DomainError)):
		return err
	}
	return unreadable(err)
}
