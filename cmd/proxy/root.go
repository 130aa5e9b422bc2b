package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/proxy"
)

// options are the proxy's flags. It has no configuration file: each flag is a
// place, a mode or a limit.
type options struct {
	inbound, outbound []string
	mode              string
	fixed             bool // --mode was given
	portModes         []string
	socket            string
	socketGiven       bool
	detectionTime     time.Duration
	handshakeTime     time.Duration
	drainTime         time.Duration
	maxConnections    int
	maxHandshakes     int
	opsListen         string
	pprof             bool
	version           bool
	log               cli.LogFlags
}

func newRoot() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use:   "proxy",
		Short: "let mutual TLS in to a workload, and carry its connections out over mutual TLS",
		Long: `Proxy stands beside a workload. What peers send to an --inbound address goes to
the app behind it, as the mode of the app's port allows:

  STRICT      mutual TLS or nothing
  PERMISSIVE  mutual TLS if the client's ALPN offers an istio name; any other TLS goes to
              the app as it came; so does plaintext
  DISABLE     all bytes go to the app as they came

What the workload sends to an --outbound address goes to the target over mutual TLS, if the
target proves to be exactly the SPIFFE ID that was given, and nowhere otherwise.

The certificate and the trust bundles come from the agent's socket, over the SPIFFE Workload
API, and are followed for as long as the proxy runs; an agent that restarts takes nothing
away. The mode of each port comes from there too: it is what the CA's PeerAuthentications come
to for this workload, and a change is in force at once, on open connections as well. Where
there are no policies, --mode and --port-mode decide instead, and for good.

TLS is 1.3 only. The proxy listens once it has a certificate and a mode for each port.
SIGTERM stops accepting and gives open connections --drain-time to end.`,
		Example: `  proxy --socket agent.sock --inbound :8443=127.0.0.1:8080
  proxy --socket agent.sock --inbound :8443=127.0.0.1:8080 --mode PERMISSIVE
  proxy --socket agent.sock --outbound 127.0.0.1:15001=10.0.3.7:8443,spiffe://example.org/ns/shop/sa/cart`,
		Args: cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.version {
				fmt.Fprintln(c.OutOrStdout(), "proxy "+cli.Version())
				return nil
			}
			o.socketGiven = c.Flags().Changed("socket")
			o.fixed = c.Flags().Changed("mode")
			return o.log.Run(c, func(ctx context.Context, log *slog.Logger) error { return run(ctx, o, log) })
		},
	}
	f := c.Flags()
	f.StringArrayVar(&o.inbound, "inbound", nil, "ADDR=APP: listen for peers on ADDR, hand what is allowed to APP, both host:port; repeat it for more")
	f.StringArrayVar(&o.outbound, "outbound", nil, "LISTEN=TARGET,SPIFFE-ID: listen for the workload on LISTEN (loopback), carry to TARGET, which must be SPIFFE-ID; repeat it for more")
	f.StringVar(&o.mode, "mode", "", "the mode of every app port, instead of the agent's policies: STRICT, PERMISSIVE or DISABLE")
	f.StringArrayVar(&o.portModes, "port-mode", nil, "PORT=MODE: with --mode, another mode for one app port; repeat it for more")
	f.StringVar(&o.socket, "socket", "", "the agent's socket; by default that of SPIFFE_ENDPOINT_SOCKET, or else agent.sock")
	f.DurationVar(&o.detectionTime, "detection-time", proxy.DefaultDetectionTime, "how long a PERMISSIVE port waits for a client's first byte before it dials the app; detection goes on after that")
	f.DurationVar(&o.handshakeTime, "handshake-time", proxy.DefaultHandshakeTime, "how long a TLS handshake may take")
	f.DurationVar(&o.drainTime, "drain-time", proxy.DefaultDrainTime, "how long open connections may go on after SIGTERM")
	f.IntVar(&o.maxConnections, "max-connections", proxy.DefaultMaxConnections, "how many connections may be open at once")
	f.IntVar(&o.maxHandshakes, "max-handshakes-per-source", proxy.DefaultMaxHandshakes, "how many inbound connections of one address may be open before they have proved who, or shown what, they are")
	f.StringVar(&o.opsListen, "ops-listen", "", "where to serve /readyz, /livez and /metrics; empty for nowhere")
	f.BoolVar(&o.pprof, "pprof", false, "serve /debug/pprof/ on --ops-listen too")
	f.BoolVar(&o.version, "version", false, "print the version and end")
	o.log.Register(c)
	return c
}
