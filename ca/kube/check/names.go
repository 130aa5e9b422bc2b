package check

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshca/meshca/ca/kube/installed"
	"github.com/meshca/meshca/ca/kube/policies/definition"
)

const (
	enforce = "pod-security.kubernetes.io/enforce"
	// The labels that a level of Pod Security may have.
	privileged, restricted = "privileged", "restricted"
)

// podSecurity judges labels, and not pods that would be created: that takes a
// permission that few who check have.
func (r *run) podSecurity(ctx context.Context) Result {
	var unlabelled []string
	for _, name := range []string{r.Namespace, r.AgentsNamespace} {
		ns, err := r.client.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue // made with its label at the installation
		}
		if err != nil {
			return unknown(fmt.Errorf("reading namespace %q: %w", name, err))
		}
		level, labelled := ns.Labels[enforce]
		switch {
		case !labelled:
			unlabelled = append(unlabelled, name)
		case name == r.AgentsNamespace && level != privileged:
			return broken(fmt.Sprintf("kubectl label --overwrite namespace %s %s=%s", name, enforce, privileged),
				"namespace %s enforces %q, which admits no agent: its one hostPath is the kubelet's folder", name, level)
		}
	}
	if len(unlabelled) > 0 {
		return attention(fmt.Sprintf("label them: %s=%s for the CA's, =%s for the agents'", enforce, restricted, privileged),
			"%s without a level of their own: what the cluster's default admits is not told by the API", plural(len(unlabelled), "namespace")).about(unlabelled)
	}
	return holds("the CA's and the agents' pods are admitted")
}

func (r *run) names(ctx context.Context) Result {
	var foreign []string
	all := installed.Objects(r.Namespace, r.AgentsNamespace)
	for _, o := range all {
		have, err := r.read(ctx, o.Resource, o.Namespace, o.Name)
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return unknown(fmt.Errorf("reading %s: %w", o, err))
		}
		if !installed.Ours(have) {
			foreign = append(foreign, o.String())
		}
	}
	if len(foreign) > 0 {
		return broken("delete or rename them, or choose other namespaces; an installation would take them over",
			"%d of the %d names are taken by somebody else (no label app.kubernetes.io/name=meshca)", len(foreign), len(all)).about(foreign)
	}
	return holds("nobody else has one of the %d", len(all))
}

func (r *run) read(ctx context.Context, resource schema.GroupVersionResource, namespace, name string) (*unstructured.Unstructured, error) {
	if namespace == "" {
		return r.objects.Resource(resource).Get(ctx, name, metav1.GetOptions{})
	}
	return r.objects.Resource(resource).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
}

func (r *run) definition(ctx context.Context) Result {
	d, err := r.read(ctx, definition.Resource, "", definition.Name)
	if apierrors.IsNotFound(err) {
		if r.phase == Before {
			return holds("there is none; the CA makes it at its first start")
		}
		return broken("see the CA's log: kubectl -n "+r.Namespace+" logs deploy/meshca",
			"there is none, and the CA that leads should have made it: no policy can be written")
	}
	if err != nil {
		return unknown(fmt.Errorf("reading the definition of PeerAuthentication: %w", err))
	}
	served, err := r.serves("security.istio.io/v1", "peerauthentications")
	switch {
	case err != nil:
		return unknown(err)
	case !served:
		return broken("upgrade Istio's definitions, or delete this one if nothing needs it",
			"it is there and does not serve security.istio.io/v1, which the CA reads")
	case definition.IsIstios(d):
		return holds("Istio's; it is left alone, and findings about policies go to events")
	case definition.IsOurs(d):
		return holds("meshca's")
	}
	return holds("somebody else's; it is left alone")
}

// istioRoot is where Istio has policies for the mesh.
const istioRoot = "istio-system"

var peerAuthentications = schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"}

// meshPolicies looks for policies that were written for Istio's root namespace and
// would silently be those of one namespace here.
func (r *run) meshPolicies(ctx context.Context) Result {
	s, err := r.readSettings(ctx)
	if err != nil {
		return unknown(err)
	}
	if s.RootNamespace == istioRoot {
		return holds("the root namespace is %s, as Istio's", istioRoot)
	}
	list, err := r.objects.Resource(peerAuthentications).Namespace(istioRoot).List(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return holds("none in %s", istioRoot)
	}
	if err != nil {
		return unknown(fmt.Errorf("reading the PeerAuthentications in %s: %w", istioRoot, err))
	}
	var without []string
	for _, p := range list.Items {
		if labels, _, _ := unstructured.NestedMap(p.Object, "spec", "selector", "matchLabels"); len(labels) == 0 {
			without = append(without, istioRoot+"/"+p.GetName())
		}
	}
	if len(without) > 0 {
		return attention(fmt.Sprintf("set ca.rootNamespace to %s, or move what is meant for the mesh into %s", istioRoot, s.RootNamespace),
			"%d in %s have no selector, and the root namespace is %s: they are not for the mesh", len(without), istioRoot, s.RootNamespace).about(without)
	}
	return holds("none in %s", istioRoot)
}
