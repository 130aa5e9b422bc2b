package installed

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshca/meshca/ca/kube/volumes"
)

// Part is what an object belongs to.
type Part string

// The parts.
const (
	Agents Part = "agents"
	CA     Part = "ca"
)

// Object names one object.
type Object struct {
	Part      Part
	Kind      string
	Resource  schema.GroupVersionResource
	Namespace string // empty: the cluster's
	Name      string
}

func (o Object) String() string {
	if o.Namespace == "" {
		return o.Kind + " " + o.Name
	}
	return fmt.Sprintf("%s %s in namespace %s", o.Kind, o.Name, o.Namespace)
}

// Objects are all, in the order in which they can be taken away: the agents before
// the CA, whose certificates they wait for, and the CSIDriver after the DaemonSet.
func Objects(system, agents string) []Object {
	resource := func(group, version, name string) schema.GroupVersionResource {
		return schema.GroupVersionResource{Group: group, Version: version, Resource: name}
	}
	const rbac = "rbac.authorization.k8s.io"
	return []Object{
		{Agents, "DaemonSet", resource("apps", "v1", "daemonsets"), agents, "meshca-agent"},
		{Agents, "CSIDriver", resource("storage.k8s.io", "v1", "csidrivers"), "", volumes.Driver},
		{Agents, "ConfigMap", resource("", "v1", "configmaps"), agents, "meshca-agent"},
		{Agents, "ServiceAccount", resource("", "v1", "serviceaccounts"), agents, "meshca-agent"},
		{Agents, "NetworkPolicy", resource("networking.k8s.io", "v1", "networkpolicies"), agents, "meshca-agent"},
		{Agents, "ResourceQuota", resource("", "v1", "resourcequotas"), agents, "meshca-priority"},
		{CA, "Deployment", resource("apps", "v1", "deployments"), system, "meshca"},
		{CA, "PodDisruptionBudget", resource("policy", "v1", "poddisruptionbudgets"), system, "meshca"},
		{CA, "Service", resource("", "v1", "services"), system, "meshca"},
		{CA, "NetworkPolicy", resource("networking.k8s.io", "v1", "networkpolicies"), system, "meshca"},
		{CA, "ResourceQuota", resource("", "v1", "resourcequotas"), system, "meshca-priority"},
		{CA, "ConfigMap", resource("", "v1", "configmaps"), system, "meshca-config"},
		{CA, "ClusterRoleBinding", resource(rbac, "v1", "clusterrolebindings"), "", "meshca"},
		{CA, "ClusterRole", resource(rbac, "v1", "clusterroles"), "", "meshca"},
		{CA, "RoleBinding", resource(rbac, "v1", "rolebindings"), system, "meshca"},
		{CA, "Role", resource(rbac, "v1", "roles"), system, "meshca"},
		{CA, "ServiceAccount", resource("", "v1", "serviceaccounts"), system, "meshca"},
	}
}

// Ours reports whether an object was installed by the chart or the manifest.
func Ours(o metav1.Object) bool { return o.GetLabels()["app.kubernetes.io/name"] == "meshca" }

// Release returns the Helm release that an object belongs to. The label managed-by
// says nothing: the manifest is rendered by Helm too.
func Release(o metav1.Object) (name, namespace string, ok bool) {
	name = o.GetAnnotations()["meta.helm.sh/release-name"]
	return name, o.GetAnnotations()["meta.helm.sh/release-namespace"], name != ""
}
