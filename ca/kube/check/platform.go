package check

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	utilversion "k8s.io/apimachinery/pkg/util/version"
)

// oldest is the oldest Kubernetes that meshca is for.
var oldest = utilversion.MustParseGeneric("1.36.0")

func (r *run) version(context.Context) Result {
	v, err := utilversion.ParseGeneric(r.kubernetes)
	if err != nil {
		return unknown(fmt.Errorf("reading the version %q: %w", r.kubernetes, err))
	}
	if v.LessThan(oldest) {
		return broken("upgrade the cluster; agents get no tokens from older kubelets in the way that they need",
			"Kubernetes %s; meshca is for 1.36 and newer", r.kubernetes)
	}
	return holds("Kubernetes %s", r.kubernetes)
}

// csiAPI asks for the schema and not for an object, since there may be none yet, and
// a field that the API server does not know is dropped in silence: tokens would then
// go where logs show them.
func (r *run) csiAPI(ctx context.Context) Result {
	body, err := r.client.Discovery().RESTClient().Get().AbsPath("/openapi/v3/apis/storage.k8s.io/v1").Do(ctx).Raw()
	if apierrors.IsNotFound(err) {
		return broken("enable storage.k8s.io/v1 in the API server", "the API server does not serve storage.k8s.io/v1")
	}
	if err != nil {
		return unknown(fmt.Errorf("reading the schema of CSIDriver: %w", err))
	}
	var schema struct {
		Components struct {
			Schemas map[string]struct {
				Properties map[string]json.RawMessage `json:"properties"`
			} `json:"schemas"`
		} `json:"components"`
	}
	if err := json.Unmarshal(body, &schema); err != nil {
		return unknown(fmt.Errorf("reading the schema of CSIDriver: %w", err))
	}
	spec := schema.Components.Schemas["io.k8s.api.storage.v1.CSIDriverSpec"].Properties
	var lacks []string
	for _, field := range []string{"podInfoOnMount", "requiresRepublish", "serviceAccountTokenInSecrets", "tokenRequests"} {
		if _, ok := spec[field]; !ok {
			lacks = append(lacks, field)
		}
	}
	if len(lacks) > 0 {
		return broken("upgrade the cluster, or enable what its API server has switched off", "CSIDriver lacks %s here", strings.Join(lacks, ", "))
	}
	return holds("served, with all that the agents need")
}

const groupCertificates = "certificates.k8s.io/v1"

// serves reports whether a resource is served.
func (r *run) serves(groupVersion, resource string) (bool, error) {
	list, err := r.client.Discovery().ServerResourcesForGroupVersion(groupVersion)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("asking which kinds %s has: %w", groupVersion, err)
	}
	return slices.ContainsFunc(list.APIResources, func(a metav1.APIResource) bool { return a.Name == resource }), nil
}

func (r *run) trustBundleAPI(context.Context) Result {
	served, err := r.serves(groupCertificates, "clustertrustbundles")
	if err != nil {
		return unknown(err)
	}
	if !served {
		return holds("v1 is not served; trust bundles go by ConfigMap alone, which is enough")
	}
	return holds("v1 is served")
}

// probeAudience is one that nothing accepts: a token for it opens nothing.
const probeAudience = "check.meshca.dev"

// tokens looks at a token of this cluster if there is a pod to ask for one, and goes
// by the version if there is none: since 1.32 it cannot be switched off that tokens
// of pods name the node.
func (r *run) tokens(ctx context.Context) Result {
	byVersion := r.version(ctx)
	if byVersion.Status != Holds {
		return unknown(errors.New("the version says nothing about it"))
	}
	pod, err := r.caPod(ctx)
	if err != nil {
		return unknown(err)
	}
	if pod == nil {
		return holds("every Kubernetes from 1.32 has them (no pod of the CA runs to ask a token for)")
	}
	seconds := int64(600)
	answer, err := r.client.CoreV1().ServiceAccounts(r.Namespace).CreateToken(ctx, pod.Spec.ServiceAccountName, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{
			Audiences:         []string{probeAudience},
			ExpirationSeconds: &seconds,
			BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
		},
	}, metav1.CreateOptions{})
	if apierrors.IsForbidden(err) {
		return holds("every Kubernetes from 1.32 has them (you may not ask for a token, to see one)")
	}
	if err != nil {
		return unknown(fmt.Errorf("asking for a token to look at: %w", err))
	}
	return judgeToken(answer.Status.Token, pod.Spec.NodeName)
}

// judgeToken reads claims only. Nobody is let in by this token, so its signature is
// of no interest.
func judgeToken(token, node string) Result {
	var claims struct {
		Kubernetes struct {
			Node struct{ Name, UID string } `json:"node"`
		} `json:"kubernetes.io"`
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return unknown(errors.New("the API server gave a token that is no JWT"))
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return unknown(errors.New("the API server gave a token whose claims cannot be read"))
	}
	if claims.Kubernetes.Node.Name != node || claims.Kubernetes.Node.UID == "" {
		return broken("upgrade the API server; without it the CA cannot tell which node an agent is of, and refuses agents",
			"a token of a pod on node %q names node %q", node, claims.Kubernetes.Node.Name)
	}
	return holds("seen in a token for a pod of the CA on node %s", node)
}

// caPod returns a running pod of the CA, or nil.
func (r *run) caPod(ctx context.Context) (*corev1.Pod, error) {
	list, err := r.client.CoreV1().Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: caLabels})
	if err != nil {
		return nil, fmt.Errorf("reading the pods of the CA: %w", err)
	}
	for _, p := range list.Items {
		if p.Spec.NodeName != "" && p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
			return &p, nil
		}
	}
	return nil, nil
}

// versions looks at two that the API server gives: policies are ordered by them.
func (r *run) versions(ctx context.Context) Result {
	list, err := r.client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return unknown(fmt.Errorf("reading namespaces: %w", err))
	}
	for _, v := range append([]string{list.ResourceVersion}, versionsOf(list.Items)...) {
		if _, err := resourceversion.CompareResourceVersion(v, v); err != nil {
			return broken("use an API server that conforms: the CA orders policies by these numbers, and refuses what it cannot order",
				"the API server gives the resource version %q, which is no number", v)
		}
	}
	return holds("they are numbers")
}

func versionsOf(namespaces []corev1.Namespace) []string {
	var all []string
	for _, n := range namespaces {
		all = append(all, n.ResourceVersion)
	}
	return all
}
