package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/census"
	"github.com/meshca/meshca/ca/kube/events"
	"github.com/meshca/meshca/ca/kube/leader"
	"github.com/meshca/meshca/ca/kube/pods"
	"github.com/meshca/meshca/ca/kube/policies"
	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/ca/kube/policies/status"
	"github.com/meshca/meshca/ca/kube/report"
	"github.com/meshca/meshca/ca/kube/review"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/ca/roots"
	"github.com/meshca/meshca/ca/server"
	"github.com/meshca/meshca/cmd/internal/conf"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/jwks"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

// How callers' tokens are judged.
const (
	callersOffline = "offline"
	callersReview  = "tokenreview"
)

// kubernetesConfig makes a cluster of this CA's: it is there if the file has the
// key, if only as "kubernetes: {}".
type kubernetesConfig struct {
	Issuer             string                   `yaml:"issuer" doc:"The exact iss of the cluster's tokens. Default: that of the CA's own token."`
	Agents             []string                 `yaml:"agents" doc:"The ServiceAccounts of node agents, as namespace/name. Whoever runs under one sees the workloads of its own node, and no others."`
	AgentsNamespace    string                   `yaml:"agents_namespace" doc:"The namespace of the agents, which gets the trust bundle for them to know the CA by."`
	Callers            string                   `yaml:"callers" doc:"How tokens are judged. offline: by the API server's keys, with what is known of pods from a watch. tokenreview: the API server is asked about each."`
	ExtraAudiences     map[string]time.Duration `yaml:"extra_audiences" doc:"Accepted audiences beside meshca (1h), each with the longest lifetime that its tokens may have. For Istio's own agents: {istio-ca: 24h}."`
	IstioCompatibility bool                     `yaml:"istio_compatibility" doc:"Write istio-ca-root-cert into namespaces, for workloads that expect it. Not where an istiod does."`
}

func defaultKubernetesConfig() kubernetesConfig {
	return kubernetesConfig{Agents: []string{"meshca-agents/meshca-agent"}, AgentsNamespace: "meshca-agents", Callers: callersOffline}
}

func (c *kubernetesConfig) check(file *conf.File) error {
	if c.Callers != callersOffline && c.Callers != callersReview {
		return file.Errorf("kubernetes.callers", "%q is neither %s nor %s", c.Callers, callersOffline, callersReview)
	}
	if _, err := c.agents(); err != nil {
		return file.Errorf("kubernetes.agents", "%v", err)
	}
	return nil
}

func (c *kubernetesConfig) agents() ([]caller.ServiceAccount, error) {
	var accounts []caller.ServiceAccount
	for _, a := range c.Agents {
		namespace, name, ok := strings.Cut(a, "/")
		if !ok || namespace == "" || name == "" {
			return nil, fmt.Errorf("%q is not namespace/name", a)
		}
		accounts = append(accounts, caller.ServiceAccount{Namespace: namespace, Name: name})
	}
	return accounts, nil
}

// cluster are the parts that deal with an API server.
type cluster struct {
	issuer   string
	keys     *jwks.Cache      // nil where tokens are reviewed
	review   *review.Reviewer // nil where they are not
	state    *state.Store     // nil where the root is an upstream's
	roots    *roots.Keeper    // nil where it is not; made by openForeign
	pods     *pods.Pods
	policies *policies.Source
	keeper   *definition.Keeper
	status   *status.Writer
	events   *events.Writer
	trust    *trust.Distributor // made by distribute
	report   *report.Publisher  // made by tell
	census   *census.Census
	agents   []caller.ServiceAccount

	config    kubernetesConfig
	clients   kubeClients
	namespace string // the CA's own
	instance  string // this replica: its pod's name
	log       *slog.Logger
}

// openCluster makes the parts; nobody is asked yet. namespace is the CA's own, and own
// says that its root is there.
func openCluster(c config, api *rest.Config, namespace string, own bool, td identity.TrustDomain, log *slog.Logger, metrics prometheus.Registerer) (_ *cluster, err error) {
	k := &cluster{census: census.New(), issuer: c.Kubernetes.Issuer, config: c.Kubernetes, namespace: namespace, log: log}
	if k.agents, err = c.Kubernetes.agents(); err != nil {
		return nil, err
	}
	if k.issuer == "" {
		if k.issuer, err = ownIssuer(api.BearerTokenFile); err != nil {
			return nil, err
		}
	}
	if k.clients, err = newKubeClients(api); err != nil {
		return nil, err
	}
	if own {
		k.state, err = state.New(state.Config{
			Client: k.clients.state.CoreV1(), Namespace: namespace, TrustDomain: td, Anchors: k.anchors(td), Now: time.Now, Log: log, Metrics: metrics,
		})
		if err != nil {
			return nil, err
		}
	}
	if k.pods, err = pods.New(pods.Config{API: api, Now: time.Now, Log: log, Metrics: metrics}); err != nil {
		return nil, err
	}
	k.policies, err = policies.New(policies.Config{
		Client: k.clients.policies, Pods: labels{k.pods}, RootNamespace: c.RootNamespace, Namespace: namespace, Now: time.Now, Log: log, Metrics: metrics,
	})
	if err != nil {
		return nil, err
	}
	if k.keeper, err = definition.NewKeeper(k.clients.keeper, log); err != nil {
		return nil, err
	}
	if k.instance, err = os.Hostname(); err != nil {
		return nil, err
	}
	if k.events, err = events.New(events.Config{Client: k.clients.told, Instance: k.instance, Now: time.Now, Log: log, Metrics: metrics}); err != nil {
		return nil, err
	}
	k.status, err = status.New(status.Config{
		Client: k.clients.told, Policies: k.policies, Pods: k.running, Events: k.events, RootNamespace: c.RootNamespace, Now: time.Now, Log: log,
	})
	if err != nil {
		return nil, err
	}
	return k, k.openTokens(c.Kubernetes.Callers, api, log, metrics)
}

// anchors has the state see what was handed out before, which outlives its namespace.
func (k *cluster) anchors(td identity.TrustDomain) func(context.Context) ([]state.Anchor, error) {
	return func(ctx context.Context) ([]state.Anchor, error) {
		found, err := trust.Anchors(ctx, k.clients.state, k.config.AgentsNamespace, td)
		all := make([]state.Anchor, 0, len(found))
		for _, a := range found {
			all = append(all, state.Anchor(a))
		}
		return all, err
	}
}

// distribute makes what hands the authority's bundle to agents and pods.
func (k *cluster) distribute(a *ca.Authority, metrics prometheus.Registerer) (err error) {
	k.trust, err = trust.New(trust.Config{
		Client: k.clients.trust, Namespace: k.config.AgentsNamespace, Replica: k.instance, Bundle: a.Bundle,
		IstioCompatibility: k.config.IstioCompatibility, Log: k.log, Metrics: metrics,
	})
	return err
}

// tell makes what shows operators what this replica knows. Ready is the server's.
func (k *cluster) tell(c config, a *ca.Authority, ready func() error) (err error) {
	k.report, err = report.New(report.Config{
		Client: k.clients.state.CoreV1().ConfigMaps(k.namespace), Replica: k.instance, Log: k.log,
		About: report.Document{TrustDomain: c.TrustDomain, RootNamespace: c.RootNamespace, Agents: k.config.AgentsNamespace},
		Sources: report.Sources{
			Authority: a, Ready: ready, Census: k.census, Policy: k.policies.Status, Problems: k.problems,
			Pod: func(uid string) (report.Pod, bool) {
				p, known := k.pods.Pod(uid)
				return report.Pod{Namespace: p.Namespace, Name: p.Name, Alive: p.Alive(time.Now())}, known
			},
		},
	})
	return err
}

// problems are the parts that do not work at the moment.
func (k *cluster) problems() []report.Problem {
	var all []report.Problem
	rooted := func() error { return k.roots.Trouble() }
	if k.state != nil {
		rooted = k.state.Trouble
	}
	for _, part := range []struct {
		name string
		err  error
	}{{"pods", k.pods.Degraded()}, {"policies", k.policies.Degraded()}, {"roots and shared state", rooted()}} {
		if part.err != nil {
			all = append(all, report.Problem{Part: part.name, Reason: part.err.Error()})
		}
	}
	for _, p := range k.trust.Problems() {
		all = append(all, report.Problem{Part: "trust bundle in " + p.Object, Reason: p.Condition + ": " + p.Reason})
	}
	return all[:min(len(all), maxProblems)]
}

// maxProblems bounds what is shown: a bundle may be missing in each namespace.
const maxProblems = 20

// openTokens makes what judges tokens: their keys, or the API server.
func (k *cluster) openTokens(callers string, api *rest.Config, log *slog.Logger, metrics prometheus.Registerer) (err error) {
	if callers == callersReview {
		k.review, err = review.New(review.Config{API: api, Now: time.Now})
		return err
	}
	source := jwks.APIServer(api.Host, api.CAFile, api.BearerTokenFile)
	k.keys, err = jwks.New(jwks.Config{Source: source, Issuer: k.issuer, Now: time.Now, Log: log, Metrics: metrics})
	return err
}

// tokenIssuer is the cluster's among the issuers that are believed.
func (k *cluster) tokenIssuer(extra map[string]time.Duration) token.Issuer {
	i := token.Issuer{URL: k.issuer, Audiences: map[string]time.Duration{"meshca": time.Hour}, RequirePod: true}
	for name, lifetime := range extra {
		i.Audiences[name] = lifetime
	}
	if k.review != nil {
		i.Review = k.review
	} else {
		i.Keys = k.keys
	}
	return i
}

// ready says whether callers can be judged.
func (k *cluster) ready() error {
	if k.keys != nil {
		if err := k.keys.Ready(); err != nil {
			return err
		}
	}
	return k.pods.Ready()
}

// run runs all parts: those that each replica needs, and what one does for all.
func (k *cluster) run(ctx context.Context, g *errgroup.Group) {
	if k.keys != nil {
		g.Go(func() error { return k.keys.Run(ctx) })
	}
	if k.state != nil {
		g.Go(func() error { return k.state.Run(ctx) })
	}
	g.Go(func() error { return k.pods.Run(ctx) })
	g.Go(func() error { return k.policies.Run(ctx) })
	g.Go(func() error { return k.events.Run(ctx) })
	g.Go(func() error { return k.report.Run(ctx) })
	g.Go(func() error {
		return leader.Run(ctx, leader.Config{Client: k.clients.lease, Namespace: k.namespace, Replica: k.instance, Log: k.log}, k.lead)
	})
}

// lead is what one replica does for all, and two may do by mistake.
func (k *cluster) lead(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return k.keeper.Run(ctx) })
	g.Go(func() error { return k.trust.Run(ctx) })
	g.Go(func() error { return k.policies.Remember(ctx) })
	g.Go(func() error { return k.status.Run(ctx) })
	return g.Wait()
}

// refused tells the owner of a pod.
func (k *cluster) refused(r server.Refusal) { k.events.Refused(r.Namespace, r.Pod, r.PodUID, r.Reason) }

// Policy is what the server asks.
func (k *cluster) Policy(s server.Subject) (*policy.Resolved, <-chan struct{}) {
	return k.policies.Policy(s.ID, s.PodUID)
}

// running is what policies are judged by: whom they select.
func (k *cluster) running() []manifest.Pod {
	all := k.pods.All()
	out := make([]manifest.Pod, 0, len(all))
	for _, p := range all {
		if !p.Finished {
			out = append(out, manifest.Pod{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels})
		}
	}
	return out
}

// labels is what policies need to know of pods.
type labels struct{ *pods.Pods }

func (l labels) Labels(uid string) (namespace string, labels map[string]string, version uint64, known bool) {
	p, known := l.Pod(uid)
	return p.Namespace, p.Labels, p.Version, known
}

// Where a pod finds what it needs to know of itself.
const podNamespace = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// apiServer says how to reach the API server: as the file says, or as every pod
// does.
func apiServer(kubeconfig string) (api *rest.Config, err error) {
	if kubeconfig == "" {
		if api, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("finding the API server as a pod does: %w; outside a pod give --kubeconfig", err)
		}
		api.CAFile = podCA
	} else if api, err = clientcmd.BuildConfigFromFlags("", kubeconfig); err != nil {
		return nil, fmt.Errorf("reading --kubeconfig: %w", err)
	}
	if api.CAFile == "" || api.BearerTokenFile == "" {
		return nil, fmt.Errorf("--kubeconfig %q: the CA takes certificate-authority and tokenFile, both files, since both change while it runs", kubeconfig)
	}
	api.UserAgent = "meshca"
	return api, nil
}

// ownNamespace is where the CA runs.
func ownNamespace(flag string) (string, error) {
	if flag != "" {
		return flag, nil
	}
	content, err := os.ReadFile(podNamespace)
	if err != nil {
		return "", fmt.Errorf("finding out the CA's own namespace as a pod does: %w; outside a pod give --namespace", err)
	}
	return strings.TrimSpace(string(content)), nil
}

// ownIssuer is the issuer of the CA's own token: the kubelet put it there, so
// that nothing is to be verified. It is the issuer of all tokens of the cluster.
func ownIssuer(file string) (string, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("finding the issuer of the cluster's tokens in the CA's own: %w; give kubernetes.issuer", err)
	}
	var claims struct {
		Issuer string `json:"iss"`
	}
	parts := strings.Split(strings.TrimSpace(string(content)), ".")
	if len(parts) == 3 {
		if payload, err := base64.RawURLEncoding.DecodeString(parts[1]); err == nil {
			_ = json.Unmarshal(payload, &claims) // what of it matters is looked at next
		}
	}
	if claims.Issuer == "" {
		return "", fmt.Errorf("finding the issuer of the cluster's tokens: the CA's own token in %q names none; give kubernetes.issuer", file)
	}
	return claims.Issuer, nil
}
