package check

import (
	"context"
	"fmt"
	"net/http"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/state"
)

// Config says what to judge.
type Config struct {
	API             *rest.Config // of the person who asks
	Namespace       string       // of the CA
	AgentsNamespace string
	RootNamespace   string // of policies, where no installation says it
	KubeletDir      string
	Now             func() time.Time
	// Progress is told what is being looked at. It may be nil.
	Progress func(what string)
}

// kind is one check.
type kind struct {
	code, title string
	phases      []Phase
	judge       func(*run, context.Context) Result
}

var always, after = []Phase{Before, After}, []Phase{After}

// kinds are all checks, by code.
var kinds = []kind{
	{"MC0101", "Kubernetes version", always, (*run).version},
	{"MC0102", "CSI drivers that get tokens in secrets", always, (*run).csiAPI},
	{"MC0103", "ClusterTrustBundle", always, (*run).trustBundleAPI},
	{"MC0104", "tokens name their node", always, (*run).tokens},
	{"MC0105", "resource versions can be compared", always, (*run).versions},
	{"MC0106", "this machine's clock", always, (*run).clock},
	{"MC0107", "nodes' heartbeats and clocks", always, (*run).heartbeats},
	{"MC0108", "your permissions for this check", always, (*run).permissions},
	{"MC0201", "Pod Security of the namespaces", always, (*run).podSecurity},
	{"MC0202", "names that meshca uses", always, (*run).names},
	{"MC0203", "definition of PeerAuthentication", always, (*run).definition},
	{"MC0204", "policies for the whole mesh", always, (*run).meshPolicies},
	{"MC0301", "CA replicas", after, (*run).replicas},
	{"MC0302", "permissions of the CA", after, (*run).rights},
	{"MC0303", "roots, marker and shared state", after, (*run).authority},
	{"MC0304", "root Secrets cannot be changed", after, (*run).immutable},
	{"MC0305", "upstream", after, (*run).upstream},
	{"MC0401", "agents", after, (*run).agents},
	{"MC0402", "CSI driver", after, (*run).driver},
	{"MC0403", "agents are known to kubelets", after, (*run).registered},
	{"MC0501", "trust bundle in namespaces", after, (*run).bundles},
	{"MC0502", "trust bundle of the cluster", after, (*run).clusterBundle},
	{"MC0601", "pods that are root on their node", always, (*run).rootPods},
	{"MC0602", "volumes that are not read-only", always, (*run).writable},
	{"MC0603", "volumes that no container mounts", always, (*run).unmounted},
	{"MC0604", "pods with a volume and no agent", after, (*run).orphans},
}

// Code is a check's code and title.
type Code struct{ Code, Title string }

// Codes are those of all checks, in order.
func Codes() []Code {
	var all []Code
	for _, k := range kinds {
		all = append(all, Code{k.code, k.title})
	}
	return all
}

// run is one round of checks. What several checks need is read once.
type run struct {
	Config
	client  kubernetes.Interface
	objects dynamic.Interface
	times   *times
	phase   Phase

	kubernetes string
	settings   once[*settings]
	deployment once[*appsv1.Deployment]
	daemonSet  once[*appsv1.DaemonSet]
	nodes      once[[]corev1.Node]
	namespaces once[[]corev1.Namespace]
	pods       once[*pods]
	inspection once[*state.Inspection]
}

// once holds what was read, or why it could not be.
type once[T any] struct {
	done  bool
	value T
	err   error
}

func (o *once[T]) get(read func() (T, error)) (T, error) {
	if !o.done {
		o.value, o.err = read()
		o.done = true
	}
	return o.value, o.err
}

// Run judges. An error means that nothing could be judged at all.
func Run(ctx context.Context, c Config) (*Report, error) {
	r := &run{Config: c, times: &times{now: c.Now}}
	api := rest.CopyConfig(c.API)
	api.Wrap(func(next http.RoundTripper) http.RoundTripper { return &timed{next, r.times} })
	var err error
	if r.client, err = kubernetes.NewForConfig(api); err != nil {
		return nil, err
	}
	if r.objects, err = dynamic.NewForConfig(api); err != nil {
		return nil, err
	}
	r.tell("the version")
	version, err := r.client.Discovery().ServerVersion()
	if err != nil {
		return nil, &UnreachableError{c.API.Host, err}
	}
	r.kubernetes = version.GitVersion
	if r.phase, err = r.installed(ctx); err != nil {
		return nil, err
	}
	report := &Report{Version: 1, Namespace: c.Namespace, Phase: r.phase, Kubernetes: r.kubernetes, Checks: []Result{}}
	for _, k := range kinds {
		if !k.in(r.phase) {
			continue
		}
		r.tell(k.title)
		result := k.judge(r, ctx)
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("checking %s: %w", k.title, err)
		}
		result.Code, result.Title = k.code, k.title
		report.add(result)
	}
	return report, nil
}

func (k *kind) in(p Phase) bool {
	for _, phase := range k.phases {
		if phase == p {
			return true
		}
	}
	return false
}

func (r *run) tell(what string) {
	if r.Progress != nil {
		r.Progress(what)
	}
}

func (r *Report) add(result Result) {
	r.Checks = append(r.Checks, result)
	switch result.Status {
	case Holds:
		r.Summary.Holds++
	case Attention:
		r.Summary.Attention++
	case Broken:
		r.Summary.Broken++
	default:
		r.Summary.Unknown++
	}
}

// installed tells the phase by the two things that nobody else has. If neither may be
// read, the rest of an installation would only look missing: then there is nothing
// to judge.
func (r *run) installed(ctx context.Context) (Phase, error) {
	_, caErr := r.readDeployment(ctx)
	_, agentErr := r.readDaemonSet(ctx)
	if caErr == nil || agentErr == nil {
		return After, nil
	}
	for _, err := range []error{caErr, agentErr} {
		if !missing(err) {
			return "", fmt.Errorf("finding out whether meshca is installed: %w", err)
		}
	}
	return Before, nil
}

func (r *run) readDeployment(ctx context.Context) (*appsv1.Deployment, error) {
	return r.deployment.get(func() (*appsv1.Deployment, error) {
		return r.client.AppsV1().Deployments(r.Namespace).Get(ctx, "meshca", metav1.GetOptions{})
	})
}

func (r *run) readDaemonSet(ctx context.Context) (*appsv1.DaemonSet, error) {
	return r.daemonSet.get(func() (*appsv1.DaemonSet, error) {
		return r.client.AppsV1().DaemonSets(r.AgentsNamespace).Get(ctx, "meshca-agent", metav1.GetOptions{})
	})
}

func (r *run) readNodes(ctx context.Context) ([]corev1.Node, error) {
	return r.nodes.get(func() ([]corev1.Node, error) {
		list, err := r.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("reading nodes: %w", err)
		}
		return list.Items, nil
	})
}

func (r *run) readNamespaces(ctx context.Context) ([]corev1.Namespace, error) {
	return r.namespaces.get(func() ([]corev1.Namespace, error) {
		list, err := r.client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("reading namespaces: %w", err)
		}
		return list.Items, nil
	})
}
