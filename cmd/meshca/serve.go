package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/conf"
	"github.com/meshca/meshca/cmd/internal/ops"
)

// serveOptions are the flags of `meshca serve`: where things are.
type serveOptions struct {
	config        string
	stateDir      string
	listen        string
	opsListen     string
	bundleListen  string
	auditLog      string
	policyDir     string
	labelsFile    string
	kubeconfig    string
	namespace     string
	pprof         bool
	testLifetimes bool
	log           cli.LogFlags
}

func newServe() *cobra.Command {
	var o serveOptions
	c := &cobra.Command{
		Use:   "serve",
		Short: "run the certificate authority",
		Long: `Serve runs the certificate authority: Istio's CSR API and delta xDS over TLS on
--listen, and readiness, liveness and metrics over plain HTTP on --ops-listen.

It signs with an intermediate that it makes at the start and keeps in memory; the
root in --state-dir (see "meshca init") signs only that. /readyz is ok while the
CA can sign, once it has read the keys of every token issuer. Each signature leaves
one audit record before and one after it; when a record cannot be written, nothing
is signed.

With --policy-dir, the PeerAuthentications in the directory's YAML files are resolved
for each workload and sent to its agent, again at each change. Workloads are selected by
the labels that --workload-labels gives them:

  workloads:
    - {namespace: shop, service_account: cart, labels: {app: cart}}

A file that is broken keeps what it said last; "meshca policy lint" says what is wrong with
it. If one is broken at the start, workloads keep the policy that they have, and those that
never had one are STRICT, until it is mended. Without --policy-dir no policy is sent, and
proxies that wait for one do not listen.

With "kubernetes" in the configuration the API server takes the place of --state-dir and
--policy-dir: the first replica makes the root in a Secret of the CA's namespace,
PeerAuthentications are the cluster's, pods are selected by the labels that they have now,
and a token counts only while its pod lives.

With "upstream" in the configuration the root is not meshca's own: what is named there signs
the intermediates, no "meshca init" is needed, and --state-dir holds only which roots the
mesh was told of.

SIGTERM drains: no new connections, running calls finish.`,
		Example: "  meshca init --state-dir state --trust-domain example.org\n  meshca serve --state-dir state --config meshca.yaml",
		Args:    cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return o.log.Run(c, func(ctx context.Context, log *slog.Logger) error {
				return serve(ctx, o, log, c.OutOrStdout())
			})
		},
	}
	f := c.Flags()
	f.StringVar(&o.config, "config", "meshca.yaml", "the configuration file")
	f.StringVar(&o.stateDir, "state-dir", "state", "the directory that holds the root")
	f.StringVar(&o.listen, "listen", ":15012", "where to serve the CSR API and xDS")
	f.StringVar(&o.opsListen, "ops-listen", "127.0.0.1:15014", "where to serve /readyz, /livez and /metrics; empty for nowhere")
	f.StringVar(&o.bundleListen, "bundle-listen", "", "where to serve the trust bundle to other trust domains over https, such as :8443; needs bundle_endpoint in the configuration; empty for nowhere")
	f.StringVar(&o.auditLog, "audit-log", "-", "the file that audit records are appended to; - for standard output")
	f.StringVar(&o.policyDir, "policy-dir", "", "the directory whose YAML files hold the PeerAuthentications; empty for none")
	f.StringVar(&o.labelsFile, "workload-labels", "", "the file that says which labels workloads have; needs --policy-dir")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach the API server, if not as the pod's own ServiceAccount")
	f.StringVar(&o.namespace, "namespace", "", "the CA's own namespace; that of its pod unless set")
	f.BoolVar(&o.pprof, "pprof", false, "serve /debug/pprof/ on --ops-listen too")
	f.BoolVar(&o.testLifetimes, "test-lifetimes", false, "allow certificates of 10 s, for tests; refused with an issuer that is a cluster (kubernetes: true)")
	o.log.Register(c)
	return c
}

// serve builds the CA bottom-up, runs it until ctx ends, and drains.
func serve(ctx context.Context, o serveOptions, log *slog.Logger, stdout io.Writer) error {
	if o.pprof && o.opsListen == "" {
		return cli.Usagef("--pprof is served on --ops-listen, which is empty; give an address or leave --pprof out")
	}
	if o.labelsFile != "" && o.policyDir == "" {
		return cli.Usagef("--workload-labels says what policies select by, and there are none; give --policy-dir too, or leave it out")
	}
	if err := cli.NoCoreDumps(); err != nil {
		return err
	}
	c, file, err := loadConfig(o.config, o.testLifetimes)
	if err != nil {
		return &cli.UsageError{Err: err}
	}
	metrics := ops.NewRegistry()

	trail, err := openAudit(o.auditLog, stdout)
	if err != nil {
		return err
	}
	defer trail.Close()
	p, err := build(c, file, o, log, metrics, trail)
	var mistake *conf.Error
	switch {
	case errors.As(err, &mistake):
		return &cli.UsageError{Err: err}
	case err != nil:
		return err
	}
	l, err := net.Listen("tcp", o.listen)
	if err != nil {
		return fmt.Errorf("listening for the CSR API: %w; choose another --listen", err)
	}
	operations, err := ops.Open(o.opsListen)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	bundles, err := p.openBundles(c, file, o.bundleListen, log)
	if err != nil {
		err = errors.Join(err, l.Close(), operations.Close())
		if errors.As(err, &mistake) {
			err = &cli.UsageError{Err: err}
		}
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return bundles(ctx) })
	for _, k := range p.keys {
		g.Go(func() error { return k.Run(ctx) })
	}
	if p.policies != nil {
		g.Go(func() error { return p.policyDir.Run(ctx) })
		g.Go(func() error { return p.policies.Run(ctx) })
	}
	if p.cluster != nil {
		p.cluster.run(ctx, g)
	}
	if p.foreign != nil {
		g.Go(func() error { return p.foreign.run(ctx) })
		g.Go(func() error { return p.foreign.roots.Run(ctx) })
	}
	g.Go(func() error { return p.authority.Run(ctx) })
	g.Go(func() error { return p.server.Serve(ctx, l) })
	g.Go(func() error {
		return operations.Serve(ctx, ops.Config{Ready: p.server.Ready, Metrics: metrics, Profiles: o.pprof, Log: log})
	})
	if p.policies == nil && p.cluster == nil {
		log.Info("no policies are handed out; proxies that wait for one need --policy-dir here, or --mode of their own")
	}
	log.Info("serving", "version", cli.Version(), "trust_domain", c.TrustDomain, "listen", l.Addr().String(), "ops", operations.Address())
	return g.Wait()
}
