package main

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/cmd/internal/cli"
)

// common are the flags that the agent has for one identity and for a node's:
// where things are.
type common struct {
	config      string
	addresses   []string
	trustAnchor string
	tokenFile   string
	opsListen   string
	pprof       bool
	log         cli.LogFlags
}

func (o *common) register(c *cobra.Command, tokenFile string) {
	f := c.Flags()
	f.StringVar(&o.config, "config", "", "the configuration file; none is needed")
	f.StringSliceVar(&o.addresses, "ca", nil, "a CA's address as host:port; repeat it for more")
	f.StringVar(&o.trustAnchor, "trust-anchor", "", "the file with the root that the CA's own certificate must chain to (root.pem of meshca init)")
	f.StringVar(&o.tokenFile, "token-file", "", tokenFile)
	f.StringVar(&o.opsListen, "ops-listen", "", "where to serve /readyz, /livez and /metrics; empty for nowhere")
	f.BoolVar(&o.pprof, "pprof", false, "serve /debug/pprof/ on --ops-listen too")
	o.log.Register(c)
}

// options are the agent's flags for one identity.
type options struct {
	common
	socket     string
	socketMode string
	version    bool
}

func newRoot() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use:   "agent",
		Short: "keep one workload's certificate fresh and hand it out on a socket",
		Long: `Agent holds one identity, that of the ServiceAccount token in --token-file. It gets
a certificate from the first CA that answers, renews it between a third and half
of its life, and serves it on --socket: to Envoy over SDS v3 (secrets "default" and
"ROOTCA", or by SPIFFE ID), to programs over the SPIFFE Workload API.

Whoever can connect to the socket gets the identity; --socket-mode and the folder
around it are the boundary. Keys stay in memory and are new at every renewal. The
token and the trust anchor are read again whenever they are used, so that whatever
keeps them fresh need not tell the agent.

While no CA can be reached the current certificate is served to its end.

On a Kubernetes node, agent node does this for all pods at once.`,
		Example: `  agent --ca 127.0.0.1:15012 --trust-anchor root.pem --token-file token --socket agent.sock
  SPIFFE_ENDPOINT_SOCKET=unix://$PWD/agent.sock my-program`,
		Args: cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.version {
				fmt.Fprintln(c.OutOrStdout(), "agent "+cli.Version())
				return nil
			}
			return o.log.Run(c, func(ctx context.Context, log *slog.Logger) error { return run(ctx, o, log) })
		},
	}
	f := c.Flags()
	o.register(c, "the file with the ServiceAccount token")
	f.StringVar(&o.socket, "socket", "agent.sock", "where to make the socket")
	f.StringVar(&o.socketMode, "socket-mode", "0600", "the socket's permissions, octal")
	f.BoolVar(&o.version, "version", false, "print the version and end")
	c.AddCommand(newNode())
	return c
}

// check finds what is missing or does not go together before anything starts.
func (o *common) check() error {
	switch {
	case o.trustAnchor == "":
		return cli.Usagef("--trust-anchor is missing; it is the file by which the CA is recognised before it gets the token")
	case o.tokenFile == "":
		return cli.Usagef("--token-file is missing; the token in it is what proves the identity")
	case strings.HasPrefix(o.tokenFile, "eyJ") && strings.Count(o.tokenFile, ".") == 2:
		// Errors name the file, and must not name the token.
		return cli.Usagef("--token-file was given a token; write it to a file and give the path of that")
	case o.pprof && o.opsListen == "":
		return cli.Usagef("--pprof is served on --ops-listen, which is empty; give an address or leave --pprof out")
	}
	return nil
}

func (o *options) check() (fs.FileMode, error) {
	if err := o.common.check(); err != nil {
		return 0, err
	}
	if o.socket == "" {
		return 0, cli.Usagef("--socket is empty; give the path to make it at")
	}
	mode, err := strconv.ParseUint(o.socketMode, 8, 32)
	if err != nil || mode > 0o777 {
		return 0, cli.Usagef("--socket-mode %q: give octal permissions such as 0600 or 0666", o.socketMode)
	}
	return fs.FileMode(mode), nil
}
