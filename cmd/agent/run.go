package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/ops"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/sds"
)

// parts are the pieces of an agent that run.
type parts struct {
	client *caclient.Client
	agent  *agent.Agent
	socket *sds.Server
}

// run builds the agent bottom-up, runs it until ctx ends, and drains.
func run(ctx context.Context, o options, log *slog.Logger) error {
	mode, err := o.check()
	if err != nil {
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
	p, err := build(c, o, log, metrics)
	if err != nil {
		return err
	}
	defer p.client.Close()

	operations, err := ops.Open(o.opsListen)
	if err != nil {
		return err
	}
	socket, err := sds.Listen(o.socket, mode)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.agent.Run(ctx) })
	g.Go(func() error { return p.socket.Serve(ctx, socket) })
	g.Go(func() error {
		return operations.Serve(ctx, ops.Config{Ready: p.agent.Ready, Metrics: metrics, Profiles: o.pprof, Log: log})
	})
	log.Info("serving", "version", cli.Version(), "socket", o.socket, "ca", c.CA.Addresses, "ops", operations.Address())
	return g.Wait()
}

// build makes the parts; nothing runs yet and nobody is contacted.
func build(c config, o options, log *slog.Logger, metrics prometheus.Registerer) (parts, error) {
	client, err := newClient(c, o.common, false)
	if err != nil {
		return parts{}, err
	}
	feed := sds.NewFeed()
	a, err := agent.New(agent.Config{
		CA:      client,
		Token:   caclient.TokenFile(o.tokenFile),
		Feed:    feed,
		KeyType: agent.KeyType(c.KeyType),
		Now:     time.Now,
		Log:     log,
		Metrics: metrics,
	})
	if err != nil {
		return parts{}, err
	}
	s, err := sds.NewServer(sds.Config{Feed: feed, Log: log, Metrics: metrics, Now: time.Now})
	if err != nil {
		return parts{}, err
	}
	return parts{client: client, agent: a, socket: s}, nil
}

// newClient makes what speaks to the CA, for one workload or for several.
func newClient(c config, o common, shared bool) (*caclient.Client, error) {
	td, err := identity.ParseTrustDomain(c.TrustDomain)
	if err != nil {
		return nil, err
	}
	client, err := caclient.New(caclient.Config{
		Addresses:   c.CA.Addresses,
		ServerName:  c.CA.ServerName,
		TrustDomain: td,
		AnchorFile:  o.trustAnchor,
		Shared:      shared,
		Now:         time.Now,
	})
	if err != nil {
		return nil, &cli.UsageError{Err: err}
	}
	return client, nil
}
