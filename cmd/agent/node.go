package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/agent/csi"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/ops"
	"github.com/meshca/meshca/cmd/internal/supervise"
)

// nodeOptions are the flags of agent node.
type nodeOptions struct {
	common
	kubeletDir  string
	csiSocket   string
	stateDir    string
	stateOnDisk bool
	supervise   bool
	restarts    int // told by the supervisor
}

func newNode() *cobra.Command {
	var o nodeOptions
	c := &cobra.Command{
		Use:   "node",
		Short: "give each pod of a node its identity, as a CSI node plugin",
		Long: `Agent node serves the volumes of the CSI driver csi.meshca.dev on one Kubernetes node. The
kubelet hands it each pod's own ServiceAccount token; the pod gets a folder with agent.sock
in it, on which it has its identity: over SDS v3 for Envoy, over the SPIFFE Workload API for
programs. In the pod:

  volumes:
  - name: meshca
    csi: {driver: csi.meshca.dev, readOnly: true}

The volume must be read-only: whoever can write into the folder could put another socket in
the place of the agent's.

One stream to the CA, by the token in --token-file, brings bundle and policy for all pods
of the node. The agent needs no permission in Kubernetes, no capability and no mount, only to
write to --kubelet-dir, which must have the same path for it as for the kubelet. Volumes and
each pod's last token are kept in --node-state-dir, which must be in memory and outlive the
agent's pod, such as a folder below the node's /run; keys are kept nowhere. An agent that was
killed or replaced serves the same sockets again at once.

The first start of a pod waits up to 3 s for its certificate. If the CA refuses the pod, its
FailedMount event says so; if no CA can be reached, the pod starts, and its programs wait.`,
		Example: `  agent node --ca meshca.meshca-system.svc:15012 --trust-anchor /etc/meshca/root.pem \
    --token-file /var/run/secrets/meshca/token --ops-listen :15020`,
		Args: cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return o.log.Run(c, func(ctx context.Context, log *slog.Logger) error {
				if o.supervise {
					return superviseNode(ctx, c, log)
				}
				return runNode(ctx, o, log)
			})
		},
	}
	f := c.Flags()
	o.register(c, "the file with the agent's own ServiceAccount token, of the audience meshca")
	f.StringVar(&o.kubeletDir, "kubelet-dir", "/var/lib/kubelet", "the kubelet's folder (its --root-dir)")
	f.StringVar(&o.csiSocket, "csi-socket", "", "where to take the kubelet's calls; empty for plugins/csi.meshca.dev/csi.sock in --kubelet-dir")
	f.StringVar(&o.stateDir, "node-state-dir", "/run/meshca-agent/state", "where volumes and tokens outlive the agent: a folder in memory, for the agent alone")
	f.BoolVar(&o.stateOnDisk, "allow-state-on-disk", false, "take a --node-state-dir that is not in memory, for trying things out: tokens then lie on a disk")
	f.BoolVar(&o.supervise, supervised, false, "run the agent as a second process and start that again at once if it is killed or crashes, which takes the kubelet a second, and longer each time; for the first process of a container")
	f.IntVar(&o.restarts, restarted, 0, "")
	_ = f.MarkHidden(restarted) // it is there
	return c
}

// Flags of the supervisor, and of its child.
const (
	supervised = "supervise"
	restarted  = "restarts"
)

// superviseNode runs this very command in a process that may be killed.
func superviseNode(ctx context.Context, c *cobra.Command, log *slog.Logger) error {
	args := childArgs(c)
	return supervise.Run(ctx, supervise.Config{
		// Whatever has become of the file since: it is this program that is to run.
		Path: "/proc/self/exe",
		Args: func(restarts int) []string {
			return append(slices.Clip(args), fmt.Sprintf("--%s=%d", restarted, restarts))
		},
		Stdout: c.OutOrStdout(), Stderr: c.ErrOrStderr(), Log: log,
	})
}

// childArgs is the command line without what makes it a supervisor's.
func childArgs(c *cobra.Command) []string {
	args := []string{c.Name()}
	c.Flags().Visit(func(f *pflag.Flag) {
		if f.Name == supervised || f.Name == restarted {
			return
		}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			for _, v := range list.GetSlice() {
				args = append(args, "--"+f.Name+"="+v)
			}
			return
		}
		args = append(args, "--"+f.Name+"="+f.Value.String())
	})
	return args
}

func (o *nodeOptions) check() error {
	for _, p := range []struct{ flag, path string }{
		{"--kubelet-dir", o.kubeletDir}, {"--node-state-dir", o.stateDir}, {"--csi-socket", o.csiSocket},
	} {
		if p.path == "" && p.flag == "--csi-socket" {
			continue
		}
		if !filepath.IsAbs(p.path) || filepath.Clean(p.path) != p.path {
			return cli.Usagef("%s %q: give an absolute path without dots and doubled slashes", p.flag, p.path)
		}
	}
	if o.stateDir == o.kubeletDir || strings.HasPrefix(o.stateDir, o.kubeletDir+"/") {
		return cli.Usagef("--node-state-dir %q is in the kubelet's folder; choose one that nothing else cleans up", o.stateDir)
	}
	return o.common.check()
}

// nodeParts are the pieces of a node's agent that run.
type nodeParts struct {
	client *caclient.Client
	host   *agent.Host
	plugin *csi.Plugin
}

// runNode builds a node's agent bottom-up, runs it until ctx ends, and drains.
func runNode(ctx context.Context, o nodeOptions, log *slog.Logger) error {
	if err := o.check(); err != nil {
		return err
	}
	if err := cli.NoCoreDumps(); err != nil {
		return err
	}
	c, err := loadConfig(o.config, o.addresses)
	if err != nil {
		return err
	}
	metrics := ops.NewRegistry()
	if err := metrics.Register(restartsGauge(o.restarts)); err != nil {
		return err
	}
	p, err := buildNode(c, o, log, metrics)
	if err != nil {
		return err
	}
	defer p.client.Close()
	operations, err := ops.Open(o.opsListen)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.host.Run(ctx) })
	g.Go(func() error { return hinted(p.plugin.Run(ctx)) })
	g.Go(func() error {
		return operations.Serve(ctx, ops.Config{Ready: p.plugin.Ready, Metrics: metrics, Profiles: o.pprof, Log: log})
	})
	log.Info("serving the node's volumes", "version", cli.Version(), "driver", csi.DriverName, "kubelet_dir", o.kubeletDir,
		"state", o.stateDir, "ca", c.CA.Addresses, "ops", operations.Address(), "restarts", o.restarts)
	return g.Wait()
}

// restartsGauge tells of what Kubernetes does not see and count.
func restartsGauge(n int) prometheus.Gauge {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "meshca_agent_restarts",
		Help: "How often the supervisor has started the agent again in this container.",
	})
	g.Set(float64(n))
	return g
}

// hinted says which flag is about a folder that cannot be used for the state.
func hinted(err error) error {
	var state *csi.StateError
	if errors.As(err, &state) {
		return &cli.HintError{Err: err, Hint: "the folder is --node-state-dir's"}
	}
	return err
}

// buildNode makes the parts; nothing runs yet and nobody is contacted.
func buildNode(c config, o nodeOptions, log *slog.Logger, metrics prometheus.Registerer) (nodeParts, error) {
	client, err := newClient(c, o.common, true)
	if err != nil {
		return nodeParts{}, err
	}
	host, err := agent.NewHost(agent.HostConfig{
		CA:      client,
		Token:   caclient.TokenFile(o.tokenFile),
		KeyType: agent.KeyType(c.KeyType),
		Now:     time.Now,
		Log:     log,
		Metrics: metrics,
	})
	if err != nil {
		return nodeParts{}, err
	}
	plugin, err := csi.New(csi.Config{
		Host:        host,
		KubeletDir:  o.kubeletDir,
		Socket:      o.csiSocket,
		StateDir:    o.stateDir,
		StateOnDisk: o.stateOnDisk,
		Version:     cli.Version(),
		Now:         time.Now,
		Log:         log,
		Metrics:     metrics,
	})
	if err != nil {
		return nodeParts{}, err
	}
	return nodeParts{client: client, host: host, plugin: plugin}, nil
}
