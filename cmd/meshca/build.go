package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/audit"
	"github.com/meshca/meshca/ca/bundle"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/filepolicy"
	"github.com/meshca/meshca/ca/self"
	"github.com/meshca/meshca/ca/server"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/conf"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/jwks"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/policy/policydir"
)

// parts are the pieces of a CA that run.
type parts struct {
	keys      []*jwks.Cache
	authority *ca.Authority
	server    *server.Server
	policyDir *policydir.Source  // nil without policies
	policies  *filepolicy.Source // likewise
	cluster   *cluster           // nil outside Kubernetes
	foreign   *foreign           // nil with a root of our own
}

// build makes the parts, bottom-up; nothing runs yet.
func build(c config, file *conf.File, o serveOptions, log *slog.Logger, metrics prometheus.Registerer, trail *audit.Log) (parts, error) {
	td, err := identity.ParseTrustDomain(c.TrustDomain)
	if err != nil {
		return parts{}, err
	}
	var p parts
	upstream, err := p.openUpstream(c, file, o, td, log, metrics)
	if err != nil {
		return parts{}, err
	}
	var maySign func() error
	if p.cluster != nil && p.cluster.state != nil {
		maySign = p.cluster.state.MaySign
	}
	var keeper ca.RootKeeper
	if p.foreign != nil {
		keeper = p.foreign.roots
	}
	authority, err := ca.New(ca.Config{
		MaySign:              maySign,
		TrustDomain:          td,
		Upstream:             upstream,
		Roots:                keeper,
		Audit:                trail,
		Leaf:                 c.Leaf.settings(o.testLifetimes),
		IntermediateLifetime: c.IntermediateLifetime,
		Now:                  time.Now,
		Log:                  log,
		Metrics:              metrics,
	})
	if err != nil {
		return parts{}, file.Errorf("leaf, intermediate_lifetime", "%v", err)
	}
	if p.cluster != nil {
		if err := p.cluster.distribute(authority, metrics); err != nil {
			return parts{}, err
		}
	}
	keys, issuers, err := tokenKeys(c.TokenIssuers, log, metrics)
	if err != nil {
		return parts{}, file.Errorf("token_issuers", "%v", err)
	}
	clusters := make(map[string]caller.Cluster)
	if k := p.cluster; k != nil {
		issuers = append(issuers, k.tokenIssuer(c.Kubernetes.ExtraAudiences))
		clusters[k.issuer] = caller.Cluster{Liveness: k.pods, Agents: k.agents}
	}
	tokens, err := token.New(token.Config{Issuers: issuers, Now: time.Now})
	if err != nil {
		return parts{}, file.Errorf("token_issuers", "%v", err)
	}
	byCertificate, err := parseIDs(c.RenewByCertificate)
	if err != nil {
		return parts{}, file.Errorf("renew_by_certificate", "%v", err)
	}
	callers, err := caller.New(caller.Config{
		Tokens:        tokens,
		TrustDomain:   td,
		ByCertificate: byCertificate,
		Bundles:       authority.Bundles(),
		Clusters:      clusters,
		Now:           time.Now,
	})
	if err != nil {
		return parts{}, file.Errorf("renew_by_certificate", "%v", err)
	}
	p.keys, p.authority = keys, authority
	if err := p.addPolicies(c, o, log, metrics); err != nil {
		return parts{}, err
	}
	conf := server.Config{
		Authority:     authority,
		Authenticator: callers,
		Names:         servingNames(o.listen, p.serverNames(c)),
		CallersReady:  p.callersReady,
		Now:           time.Now,
		Log:           log,
		Metrics:       metrics,
	}
	if p.policies != nil {
		conf.Policies = p.policies
	}
	if k := p.cluster; k != nil {
		conf.Policies, conf.Pods, conf.Refused, conf.Census = k, k.pods, k.refused, k.census
	}
	if p.server, err = server.New(conf); err != nil {
		return parts{}, file.Errorf("server_names", "%v", err)
	}
	if p.cluster != nil {
		if err := p.cluster.tell(c, authority, p.server.Ready); err != nil {
			return parts{}, err
		}
	}
	return p, nil
}

// openUpstream opens what signs our intermediates: a root of our own, in the cluster or
// in a directory, or what the configuration names.
func (p *parts) openUpstream(c config, file *conf.File, o serveOptions, td identity.TrustDomain, log *slog.Logger, metrics prometheus.Registerer) (_ ca.Upstream, err error) {
	own := !file.Has("upstream")
	if file.Has("kubernetes") {
		if err := p.openCluster(c, file, o, own, td, log, metrics); err != nil {
			return nil, err
		}
	}
	switch {
	case !own:
		if p.foreign, err = p.openForeign(c, file, o, td, log, metrics); err != nil {
			return nil, err
		}
		if p.cluster != nil {
			p.cluster.roots = p.foreign.roots
		}
		return p.foreign.Upstream, nil
	case p.cluster != nil:
		return p.cluster.state, nil
	}
	upstream, err := self.Open(o.stateDir, self.Config{TrustDomain: td, Now: time.Now, Log: log})
	if err != nil {
		return nil, stateHint(err, o.stateDir, td)
	}
	return upstream, nil
}

// openCluster finds the API server and makes what reads it. own says that the root is
// there too.
func (p *parts) openCluster(c config, file *conf.File, o serveOptions, own bool, td identity.TrustDomain, log *slog.Logger, metrics prometheus.Registerer) error {
	if o.policyDir != "" {
		return cli.Usagef("--policy-dir is for policies in files; with kubernetes in the configuration they come from the API server, so leave it out")
	}
	api, err := apiServer(o.kubeconfig)
	if err != nil {
		return err
	}
	namespace, err := ownNamespace(o.namespace)
	if err != nil {
		return err
	}
	if p.cluster, err = openCluster(c, api, namespace, own, td, log, metrics); err != nil {
		return file.Errorf("kubernetes", "%v", err)
	}
	return nil
}

// openBundles opens the bundle endpoint, and returns what serves it.
func (p *parts) openBundles(c config, file *conf.File, listen string, log *slog.Logger) (serve func(context.Context) error, err error) {
	e := c.BundleEndpoint
	if listen == "" {
		if e.CertFile != "" || e.KeyFile != "" {
			return nil, file.Errorf("bundle_endpoint", "it is configured and served nowhere; give --bundle-listen, such as :8443")
		}
		return func(context.Context) error { return nil }, nil
	}
	if e.CertFile == "" || e.KeyFile == "" {
		return nil, file.Errorf("bundle_endpoint", "--bundle-listen needs cert_file and key_file")
	}
	s, err := bundle.New(bundle.Config{Source: p.authority.Bundle, CertFile: e.CertFile, KeyFile: e.KeyFile, Refresh: e.RefreshHint, Now: time.Now, Log: log})
	if err != nil {
		return nil, file.Errorf("bundle_endpoint", "%v", err)
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, fmt.Errorf("listening for the bundle endpoint: %w; choose another --bundle-listen", err)
	}
	return func(ctx context.Context) error { return s.Serve(ctx, l) }, nil
}

// checkPolicyPaths refuses a start with paths that lead nowhere: a mistyped one
// would be found out by proxies that never get a policy.
func checkPolicyPaths(o serveOptions) error {
	if info, err := os.Stat(o.policyDir); err != nil {
		return &cli.HintError{Err: fmt.Errorf("reading the policies: %w", err), Hint: "make the directory, which may be empty, or correct --policy-dir"}
	} else if !info.IsDir() {
		return cli.Usagef("--policy-dir %q is not a directory", o.policyDir)
	}
	if o.labelsFile == "" {
		return nil
	}
	if _, err := os.Stat(o.labelsFile); err != nil {
		return &cli.HintError{Err: fmt.Errorf("reading the labels of workloads: %w", err), Hint: `write the file ("workloads: []" for none), or correct --workload-labels`}
	}
	return nil
}

// policyRecord is the file in the state directory that keeps the policies' version.
const policyRecord = "policy.json"

// addPolicies makes what says which policy holds, if there are any.
func (p *parts) addPolicies(c config, o serveOptions, log *slog.Logger, metrics prometheus.Registerer) (err error) {
	if o.policyDir == "" {
		return nil
	}
	if err := checkPolicyPaths(o); err != nil {
		return err
	}
	p.policyDir, err = policydir.New(policydir.Config{Dir: o.policyDir, RootNamespace: c.RootNamespace, Log: log, Metrics: metrics})
	if err != nil {
		return err
	}
	p.policies, err = filepolicy.New(filepolicy.Config{
		Policies: p.policyDir, LabelsFile: o.labelsFile, Record: filepath.Join(o.stateDir, policyRecord),
		Now: time.Now, Log: log, Metrics: metrics,
	})
	return err
}

// tokenKeys makes the source of keys of each issuer. loadConfig has seen to it
// that each names exactly one.
func tokenKeys(issuers []issuerConfig, log *slog.Logger, metrics prometheus.Registerer) ([]*jwks.Cache, []token.Issuer, error) {
	var caches []*jwks.Cache
	var out []token.Issuer
	for _, i := range issuers {
		var source jwks.Source
		switch {
		case i.JWKSFile != "":
			source = jwks.File(i.JWKSFile)
		case i.JWKSURL != "":
			source = jwks.HTTPS{URL: i.JWKSURL, CAFile: i.JWKSCAFile}
		default:
			source = jwks.APIServer(i.APIServer, i.APIServerCA, i.APIServerToken)
		}
		cache, err := jwks.New(jwks.Config{Source: source, Issuer: i.Issuer, Now: time.Now, Log: log, Metrics: metrics})
		if err != nil {
			return nil, nil, err
		}
		caches = append(caches, cache)
		out = append(out, token.Issuer{URL: i.Issuer, Keys: cache, Audiences: i.Audiences, RequirePod: !i.WithoutPod})
	}
	return caches, out, nil
}

// callersReady says whether the tokens of every issuer can be verified.
func (p *parts) callersReady() error {
	for _, k := range p.keys {
		if err := k.Ready(); err != nil {
			return err
		}
	}
	if p.cluster != nil {
		return p.cluster.ready()
	}
	return nil
}

func parseIDs(texts []string) ([]identity.ID, error) {
	var ids []identity.ID
	for _, t := range texts {
		id, err := identity.ParseID(t)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// serverNames are those of the operator, and the one that the CA has in its cluster.
func (p *parts) serverNames(c config) []string {
	if p.cluster == nil {
		return c.ServerNames
	}
	return append([]string{"meshca." + p.cluster.namespace + ".svc"}, c.ServerNames...)
}

// servingNames are the names of the CA's own certificate: the ones that its
// clients use without being told, those of the operator, and the address that
// it listens on.
func servingNames(listen string, configured []string) ca.ServingNames {
	names := ca.ServingNames{
		DNS: []string{"localhost", "meshca.meshca-system.svc", "istiod.istio-system.svc"},
		IPs: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	host, _, err := net.SplitHostPort(listen)
	if err == nil && host != "" {
		configured = append([]string{host}, configured...)
	}
	for _, n := range configured {
		ip := net.ParseIP(n)
		switch {
		case ip == nil && !slices.Contains(names.DNS, n):
			names.DNS = append(names.DNS, n)
		case ip != nil && !ip.IsUnspecified() && !ip.IsLoopback():
			names.IPs = append(names.IPs, ip)
		}
	}
	return names
}

// openAudit opens the file that records go to, or standard output for "-".
func openAudit(path string, stdout io.Writer) (*audit.Log, error) {
	if path != "-" {
		l, err := audit.Open(path, time.Now)
		if err != nil {
			return nil, fmt.Errorf("opening the audit log: %w; nothing is signed without one, give a writable --audit-log", err)
		}
		return l, nil
	}
	return audit.New("standard output", nopCloser{stdout}, time.Now)
}

// nopCloser keeps the audit log from closing the standard output.
type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
