package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/cmd/internal/agentpolicy"
	"github.com/meshca/meshca/proxy"
	"github.com/meshca/meshca/sds/client"
)

// shop is a program that knows no TLS, on two ports, with a proxy before it.
type shop struct {
	world     *world
	ports     [2]string // that the program listens on
	addresses [2]string // of the proxy, before each port
	log       *accessLog
}

// startShop runs the program, and a proxy that takes its identity and its policy
// from the workload's agent. It returns once the proxy listens.
func (w *world) startShop(ctx context.Context, g *errgroup.Group, wl *workload) (*shop, error) {
	s := &shop{world: w, log: &accessLog{Handler: w.log.With("part", "proxy of "+wl.account).Handler()}}
	log := slog.New(s.log)
	conf := proxy.Config{
		Now: time.Now, Log: log, Metrics: prometheus.NewRegistry(), DrainTime: time.Second,
	}
	inbound := make(map[string]net.Listener)
	for i := range s.ports {
		app, err := serveShop(ctx, g)
		if err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("listening for the proxy: %w", err)
		}
		_, s.ports[i], _ = net.SplitHostPort(app)
		s.addresses[i] = l.Addr().String()
		inbound[s.addresses[i]] = l
		conf.Inbound = append(conf.Inbound, proxy.Inbound{Listen: s.addresses[i], App: app})
	}
	conf.Listen = func(_, address string) (net.Listener, error) { return inbound[address], nil }
	source, err := client.New(client.Config{Socket: wl.socket, Log: log})
	if err != nil {
		return nil, err
	}
	policies, err := client.NewPolicy(client.Config{Socket: wl.socket, Log: log})
	if err != nil {
		return nil, err
	}
	conf.Identity, conf.Policy = source, agentpolicy.Policy{Agent: policies}
	p, err := proxy.New(conf)
	if err != nil {
		return nil, err
	}
	for _, run := range []func(context.Context) error{source.Run, policies.Run, p.Run} {
		g.Go(func() error { return run(ctx) })
	}
	return s, awaitReady(ctx, p.Ready)
}

// serveShop answers plain HTTP until ctx ends.
func serveShop(ctx context.Context, g *errgroup.Group) (address string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("the shop listening: %w", err)
	}
	server := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, shopSays) }),
		ReadHeaderTimeout: 5 * time.Second,
		ErrorLog:          discardLog(),
	}
	g.Go(func() error {
		defer context.AfterFunc(ctx, func() { _ = server.Close() })()
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("the shop serving: %w", err)
		}
		return nil
	})
	return l.Addr().String(), nil
}

const shopSays = "hello from the shop\n"

func (s *shop) policyFile(name string) string {
	return filepath.Join(s.world.policies, name+".yaml")
}

// write puts a policy of namespace shop to disk, and returns when.
func (s *shop) write(name, spec string) (time.Time, error) {
	content := fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: %s\n  namespace: shop\nspec:\n%s", name, spec)
	next := filepath.Join(s.world.dir, "next.yaml")
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		return time.Time{}, fmt.Errorf("writing policy shop/%s: %w", name, err)
	}
	now := time.Now()
	return now, os.Rename(next, s.policyFile(name))
}

// accessLog is a log handler that remembers why the proxy ended the last
// connection that it ended by itself.
type accessLog struct {
	slog.Handler
	mu  sync.Mutex
	why string
}

// Enabled implements slog.Handler.
func (l *accessLog) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements slog.Handler.
func (l *accessLog) Handle(ctx context.Context, rec slog.Record) error {
	found := make(map[string]string)
	rec.Attrs(func(a slog.Attr) bool {
		found[a.Key] = a.Value.String()
		return true
	})
	if end := found["end"]; end == "refused" || end == "policy" {
		l.mu.Lock()
		l.why = fmt.Sprintf("the proxy's log: %s, since %s says %s", end, found["policy"], found["mode"])
		l.mu.Unlock()
	}
	if !l.Handler.Enabled(ctx, rec.Level) {
		return nil
	}
	return l.Handler.Handle(ctx, rec)
}

// reason is why the proxy ended a connection last; empty if it never did.
func (l *accessLog) reason() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.why
}
