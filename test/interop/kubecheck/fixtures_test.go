package kubecheck

import (
	"context"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var (
	secrets  = schema.GroupVersionResource{Version: "v1", Resource: "secrets"}
	bindings = schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings"}
)

// save returns an object so that apply can make it again.
func (c clients) save(t testing.TB, resource schema.GroupVersionResource, namespace, name string) *unstructured.Unstructured {
	t.Helper()
	o, err := c.objects.Resource(resource).Namespace(namespace).Get(context.Background(), name, metav1.GetOptions{})
	must(t, err)
	o.SetResourceVersion("")
	o.SetUID("")
	o.SetManagedFields(nil)
	return o
}

// take saves a ConfigMap and takes it away.
func (c clients) take(t testing.TB, namespace, name string) *unstructured.Unstructured {
	t.Helper()
	o := c.save(t, configMaps, namespace, name)
	c.remove(t, configMaps, namespace, name)
	return o
}

// bindViewer lets the user "viewer" see whether meshca is there, and nothing else.
func bindViewer(t testing.TB, c clients) {
	t.Helper()
	c.apply(t, roles, object(`{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "viewer"},
		"rules": [{"apiGroups": ["apps"], "resources": ["deployments", "daemonsets"], "verbs": ["get"]}]}`))
	c.apply(t, bindings, object(`{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "viewer"},
		"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "viewer"},
		"subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "viewer"}]}`))
}
