package demo

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/audit"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/filepolicy"
	"github.com/meshca/meshca/ca/self"
	"github.com/meshca/meshca/ca/server"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/jwks"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
	"github.com/meshca/meshca/policy/policydir"
	"github.com/meshca/meshca/sds"
)

// What the demo's tokens say, as a cluster's would.
const (
	issuerURL = "https://kubernetes.default.svc.cluster.local"
	audience  = "meshca"
	nodeName  = "node-1"
)

// world is the demo's mesh: where everything is.
type world struct {
	dir      string
	td       identity.TrustDomain
	addr     string // of the CA
	anchor   string // file
	auditLog string // file
	policies string // directory
	issuer   *tokenissuer.Issuer
	refused  *refusals // what the CA's log says of refusals
	log      *slog.Logger
}

// workload is one pod's worth of it.
type workload struct {
	namespace, account string
	id                 identity.ID
	tokenFile, socket  string
}

// startCA makes the token issuer and the CA and returns once the CA can sign.
// The keys of the issuer reach the CA as they would in production: by a file.
func startCA(ctx context.Context, g *errgroup.Group, dir string, log *slog.Logger) (*world, error) {
	td, err := identity.ParseTrustDomain(trustDomain)
	if err != nil {
		return nil, err
	}
	refused := newRefusals(log.With("part", "ca").Handler())
	w := &world{dir: dir, td: td, log: log, refused: refused, auditLog: filepath.Join(dir, "audit.jsonl")}
	if w.issuer, err = tokenissuer.New(tokenissuer.Config{URL: issuerURL}); err != nil {
		return nil, err
	}
	keyFile := filepath.Join(dir, "jwks.json")
	if err := os.WriteFile(keyFile, w.issuer.JWKS(), 0o644); err != nil {
		return nil, fmt.Errorf("writing the issuer's keys: %w", err)
	}
	state := filepath.Join(dir, "ca")
	if _, err := self.Init(state, self.InitConfig{TrustDomain: td}); err != nil {
		return nil, err
	}
	w.anchor = self.AnchorPath(state)

	caLog := slog.New(refused)
	keys, err := jwks.New(jwks.Config{Source: jwks.File(keyFile), Issuer: issuerURL, Log: caLog})
	if err != nil {
		return nil, err
	}
	authority, err := w.authority(state, caLog)
	if err != nil {
		return nil, err
	}
	policies, err := w.startPolicies(ctx, g, caLog)
	if err != nil {
		return nil, err
	}
	srv, err := newServer(td, authority, keys, policies, caLog)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listening for the CA: %w", err)
	}
	w.addr = l.Addr().String()
	g.Go(func() error { return keys.Run(ctx) })
	g.Go(func() error { return authority.Run(ctx) })
	g.Go(func() error { return srv.Serve(ctx, l) })
	return w, awaitReady(ctx, srv.Ready)
}

func (w *world) authority(state string, log *slog.Logger) (*ca.Authority, error) {
	upstream, err := self.Open(state, self.Config{TrustDomain: w.td, Log: log})
	if err != nil {
		return nil, err
	}
	trail, err := audit.Open(w.auditLog, time.Now)
	if err != nil {
		return nil, err
	}
	return ca.New(ca.Config{
		TrustDomain: w.td,
		Upstream:    upstream,
		Audit:       trail,
		Leaf:        ca.LeafConfig{Lifetime: leafLifetime, TestLifetimes: true},
		Log:         log,
	})
}

// startPolicies makes the directory that policies are written to, empty for now,
// and the file that says which labels they can select by.
func (w *world) startPolicies(ctx context.Context, g *errgroup.Group, log *slog.Logger) (*filepolicy.Source, error) {
	w.policies = filepath.Join(w.dir, "policies")
	if err := os.Mkdir(w.policies, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory of policies: %w", err)
	}
	labels := filepath.Join(w.dir, "labels.yaml")
	if err := os.WriteFile(labels, []byte("workloads:\n  - {namespace: shop, service_account: cart, labels: {app: cart}}\n"), 0o600); err != nil {
		return nil, fmt.Errorf("writing the labels of workloads: %w", err)
	}
	dir, err := policydir.New(policydir.Config{Dir: w.policies, RootNamespace: "meshca-system", Log: log})
	if err != nil {
		return nil, err
	}
	source, err := filepolicy.New(filepolicy.Config{
		Policies: dir, LabelsFile: labels, Record: filepath.Join(w.dir, "policy.json"),
		Now: time.Now, Log: log, Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		return nil, err
	}
	g.Go(func() error { return dir.Run(ctx) })
	g.Go(func() error { return source.Run(ctx) })
	return source, nil
}

func newServer(td identity.TrustDomain, authority *ca.Authority, keys *jwks.Cache, policies server.Policies, log *slog.Logger) (*server.Server, error) {
	tokens, err := token.New(token.Config{Issuers: []token.Issuer{{
		URL: issuerURL, Keys: keys, Audiences: map[string]time.Duration{audience: time.Hour}, RequirePod: true,
	}}})
	if err != nil {
		return nil, err
	}
	callers, err := caller.New(caller.Config{Tokens: tokens, TrustDomain: td})
	if err != nil {
		return nil, err
	}
	return server.New(server.Config{
		Authority: authority, Authenticator: callers, CallersReady: keys.Ready, Policies: policies, Log: log,
		Names: ca.ServingNames{DNS: []string{"localhost"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}},
	})
}

// awaitReady asks until the CA can sign and knows the issuer's keys, which takes
// one signature by the root.
func awaitReady(ctx context.Context, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the CA: %w", err)
		case <-tick.C:
		}
	}
}

// token mints what the API server would give to the workload's pod.
func (w *world) token(namespace, account, audience string) (string, error) {
	return w.issuer.Issue(tokenissuer.Claims{
		Namespace: namespace, ServiceAccount: account,
		PodName: account + "-0", PodUID: "pod-uid-of-" + account, NodeName: nodeName, NodeUID: "uid-of-" + nodeName,
		Audience: []string{audience}, Lifetime: 10 * time.Minute,
	})
}

// addWorkload makes the token file and runs an agent for it.
func (w *world) addWorkload(ctx context.Context, g *errgroup.Group, namespace, account string) (*workload, error) {
	id, err := identity.WorkloadID(w.td, namespace, account)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(w.dir, account)
	wl := &workload{
		namespace: namespace, account: account, id: id,
		tokenFile: filepath.Join(dir, "token"), socket: filepath.Join(dir, "agent.sock"),
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the folder of %s: %w", account, err)
	}
	if err := w.writeToken(wl); err != nil {
		return nil, err
	}
	g.Go(func() error { return w.refreshToken(ctx, wl) })
	return wl, w.runAgent(ctx, g, wl)
}

func (w *world) writeToken(wl *workload) error {
	tok, err := w.token(wl.namespace, wl.account, audience)
	if err != nil {
		return err
	}
	// Replaced by renaming, as the kubelet does it: the agent never reads half.
	next := wl.tokenFile + ".next"
	if err := os.WriteFile(next, []byte(tok), 0o600); err != nil {
		return fmt.Errorf("writing the token of %s: %w", wl.account, err)
	}
	return os.Rename(next, wl.tokenFile)
}

// refreshToken keeps the token file fresh, as a kubelet does, so that a demo
// that stays goes on.
func (w *world) refreshToken(ctx context.Context, wl *workload) error {
	tick := time.NewTicker(5 * time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := w.writeToken(wl); err != nil {
				return err
			}
		}
	}
}

func (w *world) runAgent(ctx context.Context, g *errgroup.Group, wl *workload) error {
	log := w.log.With("part", "agent of "+wl.account)
	client, err := caclient.New(caclient.Config{
		Addresses: []string{w.addr}, TrustDomain: w.td, AnchorFile: w.anchor, Now: time.Now,
	})
	if err != nil {
		return err
	}
	metrics := prometheus.NewRegistry()
	feed := sds.NewFeed()
	a, err := agent.New(agent.Config{
		CA: client, Token: caclient.TokenFile(wl.tokenFile), Feed: feed,
		Now: time.Now, Log: log, Metrics: metrics,
	})
	if err != nil {
		return err
	}
	s, err := sds.NewServer(sds.Config{Feed: feed, Log: log, Metrics: metrics, Now: time.Now})
	if err != nil {
		return err
	}
	socket, err := sds.Listen(wl.socket, 0o600)
	if err != nil {
		return err
	}
	g.Go(func() error { defer client.Close(); return a.Run(ctx) })
	g.Go(func() error { return s.Serve(ctx, socket) })
	return nil
}

// firstCertificate starts an agent and measures, at the end of its socket, how
// long a program waits for its first certificate.
func (w *world) firstCertificate(ctx context.Context, g *errgroup.Group, p *printer, namespace, account string) (*workload, error) {
	began := time.Now()
	wl, err := w.addWorkload(ctx, g, namespace, account)
	if err != nil {
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(wait, workloadapi.WithAddr("unix://"+wl.socket))
	if err != nil {
		return nil, fmt.Errorf("fetching the first certificate of %s from %s: %w", account, wl.socket, err)
	}
	took := time.Since(began)
	p.step(namespace+"/"+account, Check{
		What: "token → " + svid.ID.String(),
		Saw:  fmt.Sprintf("%s, in %.1f ms", keyName(svid.Certificates[0].PublicKey), float64(took)/float64(time.Millisecond)),
		Held: svid.ID == wl.id.SPIFFE(),
	})
	return wl, nil
}

// keyName is what people call a kind of key.
func keyName(pub crypto.PublicKey) string {
	if k, ok := pub.(*ecdsa.PublicKey); ok {
		return k.Curve.Params().Name
	}
	return fmt.Sprintf("%T", pub)
}
