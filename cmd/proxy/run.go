package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/ops"
	"github.com/meshca/meshca/proxy"
	"github.com/meshca/meshca/sds/client"
)

// run builds the proxy bottom-up, runs it until ctx ends, and drains.
func run(ctx context.Context, o options, log *slog.Logger) error {
	s, err := o.parse()
	if err != nil {
		return err
	}
	if err := cli.NoCoreDumps(); err != nil {
		return err
	}
	metrics := ops.NewRegistry()
	source, err := client.New(client.Config{Socket: s.socket, Log: log})
	if err != nil {
		return err
	}
	policies, err := client.NewPolicy(client.Config{Socket: s.socket, Log: log})
	if err != nil {
		return err
	}
	modes := modesOf(s, policies)
	if s.live() {
		if err := registerPolicy(metrics, policies); err != nil {
			return err
		}
	}
	p, err := build(s, o, source, modes, log, metrics)
	if err != nil {
		return err
	}

	operations, err := ops.Open(o.opsListen)
	if err != nil {
		return err
	}
	// The agent is followed, and operations are served, until the last
	// connection has ended, so that a drain can be watched.
	g, gctx := errgroup.WithContext(context.WithoutCancel(ctx))
	after, stop := context.WithCancel(gctx)
	g.Go(func() error { return source.Run(after) })
	if s.live() {
		g.Go(func() error { return policies.Run(after) })
	}
	g.Go(func() error {
		return operations.Serve(after, ops.Config{Ready: p.Ready, Metrics: metrics, Profiles: o.pprof, Log: log})
	})
	if s.modes != nil {
		for _, port := range s.modes.unused(s.inbound) {
			log.Warn("--port-mode names a port that no --inbound leads to", "port", port)
		}
	}
	log.Info("starting", "version", cli.Version(), "socket", s.socket, "modes", s.modesFrom(), "ops", operations.Address())
	g.Go(func() error {
		defer stop()
		running, cancel := context.WithCancel(gctx) // ends with ctx, and if operations cannot be served
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		return p.Run(running)
	})
	return g.Wait()
}

// build makes the proxy; nothing runs yet and nobody is contacted.
func build(s settings, o options, id proxy.Identity, modes proxy.Policy, log *slog.Logger, metrics prometheus.Registerer) (*proxy.Proxy, error) {
	p, err := proxy.New(proxy.Config{
		Inbound: s.inbound, Outbound: s.outbound,
		Identity: id, Policy: modes,
		DetectionTime: o.detectionTime, HandshakeTime: o.handshakeTime, DrainTime: o.drainTime,
		MaxConnections: o.maxConnections, MaxHandshakes: o.maxHandshakes,
		Now: time.Now, Log: log, Metrics: metrics,
	})
	if err != nil {
		return nil, &cli.UsageError{Err: err}
	}
	return p, nil
}
