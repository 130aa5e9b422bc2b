package kubecheck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/check"
	"github.com/meshca/meshca/ca/kube/installed"
	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/test/testenv"
)

const (
	system = "meshca-system"
	agents = "meshca-agents"
	node   = "node1"

	deadline = 20 * time.Second
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for a condition and fails with what it said last.
func eventually(t testing.TB, what string, holds func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.After(deadline)
	for {
		err := holds()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// admin is how the cluster's owner reaches it.
func admin(t testing.TB) *rest.Config {
	t.Helper()
	c := cluster.Get(t)
	return &rest.Config{Host: c.URL(), BearerToken: c.AdminToken(), TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile()}, QPS: -1}
}

// clients are both kinds.
type clients struct {
	kubernetes.Interface
	objects dynamic.Interface
}

func dial(t testing.TB) clients {
	t.Helper()
	client, err := kubernetes.NewForConfig(admin(t))
	must(t, err)
	objects, err := dynamic.NewForConfig(admin(t))
	must(t, err)
	return clients{client, objects}
}

var namespaces = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}

// manifest are the objects of deploy/meshca.yaml with what they go by.
func manifest(t testing.TB) []*unstructured.Unstructured {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	must(t, err)
	text, err := os.ReadFile(filepath.Join(root, "deploy", "meshca.yaml"))
	must(t, err)
	var all []*unstructured.Unstructured
	for d := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096); ; {
		o := new(unstructured.Unstructured)
		err := d.Decode(o)
		if errors.Is(err, io.EOF) {
			return all
		}
		must(t, err)
		if len(o.Object) > 0 {
			all = append(all, o)
		}
	}
}

func resourceOf(t testing.TB, o *unstructured.Unstructured) schema.GroupVersionResource {
	t.Helper()
	if o.GetKind() == "Namespace" {
		return namespaces
	}
	for _, known := range installed.Objects(system, agents) {
		if known.Kind == o.GetKind() {
			return known.Resource
		}
	}
	t.Fatalf("%s is of no known kind", o.GetKind())
	return schema.GroupVersionResource{}
}

// apply makes an object as it is, in place of whatever is there.
func (c clients) apply(t testing.TB, resource schema.GroupVersionResource, o *unstructured.Unstructured) {
	t.Helper()
	ctx := context.Background()
	in := c.objects.Resource(resource).Namespace(o.GetNamespace())
	_, err := in.Create(ctx, o, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		if o.GetKind() == "Namespace" {
			return
		}
		must(t, in.Delete(ctx, o.GetName(), metav1.DeleteOptions{}))
		_, err = in.Create(ctx, o, metav1.CreateOptions{})
	}
	must(t, err)
}

// install puts everything into the cluster as after a good installation, and leaves
// alone what is right already.
func install(t testing.TB) clients {
	t.Helper()
	c := dial(t)
	for _, o := range manifest(t) {
		c.apply(t, resourceOf(t, o), o)
	}
	begin(t, c)
	if _, err := c.CoreV1().Nodes().Get(context.Background(), node, metav1.GetOptions{}); err != nil {
		_, err = cluster.Get(t).CreateNode(context.Background(), node)
		must(t, err)
	}
	heartbeat(t, c, node, time.Now())
	c.apply(t, csiNodes, object(`{"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": "node1"},
		"spec": {"drivers": [{"name": "csi.meshca.dev", "nodeID": "node1", "topologyKeys": null}]}}`))
	ready(t, c, "Deployment", "meshca-a")
	ready(t, c, "Deployment", "meshca-b")
	ready(t, c, "DaemonSet", "meshca-agent-x")
	status(t, c, deployments, system, "meshca", `{"status": {"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2}}`)
	return c
}

var (
	csiNodes    = schema.GroupVersionResource{Group: "storage.k8s.io", Version: "v1", Resource: "csinodes"}
	csiDrivers  = schema.GroupVersionResource{Group: "storage.k8s.io", Version: "v1", Resource: "csidrivers"}
	deployments = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}
	pods        = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	configMaps  = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	leases      = schema.GroupVersionResource{Group: "coordination.k8s.io", Version: "v1", Resource: "leases"}
	policies    = schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"}
	clusterTBs  = schema.GroupVersionResource{Group: "certificates.k8s.io", Version: "v1", Resource: "clustertrustbundles"}
	roles       = schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"}
)

func object(text string) *unstructured.Unstructured {
	o := new(unstructured.Unstructured)
	if err := o.UnmarshalJSON([]byte(text)); err != nil {
		panic(err)
	}
	return o
}

// begin makes roots, bundles and definition, by the parts that make them in a CA.
func begin(t testing.TB, c clients) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s, err := state.New(state.Config{Client: c.CoreV1(), Namespace: system, TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Interval: 20 * time.Millisecond})
	must(t, err)
	bundle := make(chan struct{})
	var have *identity.Bundle
	d, err := trust.New(trust.Config{Client: c, Namespace: agents, Replica: "test", Bundle: func() (*identity.Bundle, <-chan struct{}) { return have, bundle }})
	must(t, err)
	k, err := definition.NewKeeper(c.objects, slog.New(slog.DiscardHandler))
	must(t, err)
	var running sync.WaitGroup
	running.Go(func() { _ = s.Run(ctx) })
	running.Go(func() { _ = k.Run(ctx) })
	defer running.Wait()
	defer cancel()
	eventually(t, "a root", func() error {
		in, err := state.Inspect(ctx, c.CoreV1(), system)
		if err == nil {
			have = in.Bundle
		}
		return err
	})
	running.Go(func() { _ = d.Run(ctx) })
	eventually(t, "bundles and a definition", func() error {
		cm, err := c.CoreV1().ConfigMaps(agents).Get(ctx, trust.ConfigMapName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		tb, err := c.CertificatesV1().ClusterTrustBundles().Get(ctx, trust.TrustBundleName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		want := string(have.MarshalPEM())
		if _, sequence, _ := trust.Carried(&cm.ObjectMeta); sequence != have.Sequence() || cm.Data[trust.ConfigMapKey] != want || tb.Spec.TrustBundle != want {
			return errors.New("they are not what they should be")
		}
		_, err = c.objects.Resource(policies).List(ctx, metav1.ListOptions{})
		return err
	})
}

func heartbeat(t testing.TB, c clients, node string, at time.Time) {
	t.Helper()
	c.apply(t, leases, object(fmt.Sprintf(`{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": %q, "namespace": "kube-node-lease"},
		"spec": {"holderIdentity": %q, "renewTime": %q}}`, node, node, at.UTC().Format("2006-01-02T15:04:05.000000Z"))))
}

func status(t testing.TB, c clients, resource schema.GroupVersionResource, namespace, name, patch string) {
	t.Helper()
	_, err := c.objects.Resource(resource).Namespace(namespace).Patch(context.Background(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
	must(t, err)
}

const (
	statusReady = `{"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}`
	statusNot   = `{"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "False", "reason": "ContainersNotReady"}]}}`
)

// ready makes a pod of a Deployment's or DaemonSet's template that is ready, as far
// as objects go: Pod Security judges it as it would a real one.
func ready(t testing.TB, c clients, kind, name string) {
	t.Helper()
	for _, o := range manifest(t) {
		if o.GetKind() != kind {
			continue
		}
		template, found, err := unstructured.NestedMap(o.Object, "spec", "template")
		if err != nil || !found {
			t.Fatalf("%s has no template: %v", kind, err)
		}
		pod := &unstructured.Unstructured{Object: template}
		pod.SetAPIVersion("v1")
		pod.SetKind("Pod")
		pod.SetNamespace(o.GetNamespace())
		pod.SetName(name)
		must(t, unstructured.SetNestedField(pod.Object, node, "spec", "nodeName"))
		c.remove(t, pods, o.GetNamespace(), name)
		c.apply(t, pods, pod)
		status(t, c, pods, o.GetNamespace(), name, statusReady)
	}
}

// remove takes an object away at once; none is fine.
func (c clients) remove(t testing.TB, resource schema.GroupVersionResource, namespace, name string) {
	t.Helper()
	err := c.objects.Resource(resource).Namespace(namespace).Delete(context.Background(), name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
	if err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
}

func (c clients) patch(t testing.TB, resource schema.GroupVersionResource, namespace, name, patch string) {
	t.Helper()
	_, err := c.objects.Resource(resource).Namespace(namespace).Patch(context.Background(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	must(t, err)
}

// app makes a pod of somebody's, with more of a spec: `"volumes": …, "hostPID": true`.
func app(t testing.TB, c clients, namespace, name, container, spec string) {
	t.Helper()
	must(t, cluster.Get(t).CreateNamespace(context.Background(), namespace))
	if spec != "" {
		spec = ", " + spec
	}
	if container != "" {
		container = ", " + container
	}
	c.apply(t, pods, object(fmt.Sprintf(`{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": %q, "namespace": %q},
		"spec": {"nodeName": %q, "automountServiceAccountToken": false, "containers": [{"name": "c", "image": "i"%s}]%s}}`, name, namespace, node, container, spec)))
}

const (
	mounts = `"volumeMounts": [{"name": "v", "mountPath": "/run/meshca"}]`
	volume = `"volumes": [{"name": "v", "csi": {"driver": "csi.meshca.dev", "readOnly": true}}]`
)

// look runs the check; alter may change how.
func look(t testing.TB, alter func(*check.Config)) *check.Report {
	t.Helper()
	c := check.Config{API: admin(t), Namespace: system, AgentsNamespace: agents, RootNamespace: system, KubeletDir: "/var/lib/kubelet", Now: time.Now}
	if alter != nil {
		alter(&c)
	}
	r, err := check.Run(context.Background(), c)
	must(t, err)
	return r
}

func result(t testing.TB, r *check.Report, code string) check.Result {
	t.Helper()
	for _, c := range r.Checks {
		if c.Code == code {
			return c
		}
	}
	t.Fatalf("no %s in %+v", code, r)
	return check.Result{}
}

// allHold demands that everything is right.
func allHold(t testing.TB, r *check.Report) {
	t.Helper()
	for _, c := range r.Checks {
		if c.Status != check.Holds {
			t.Errorf("%+v", c)
		}
	}
}

// wire alters answers of the API server, for what a real one cannot be brought to.
type wire struct {
	next  http.RoundTripper
	alter func(*http.Request, *http.Response)
}

func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := w.next.RoundTrip(r)
	if err == nil {
		w.alter(r, resp)
	}
	return resp, err
}

// answering alters the answers to requests for a path.
func answering(path string, alter func(*http.Response)) func(*check.Config) {
	return func(c *check.Config) {
		c.API.ContentType, c.API.AcceptContentTypes = "application/json", "application/json"
		c.API.Wrap(func(next http.RoundTripper) http.RoundTripper {
			return &wire{next, func(r *http.Request, resp *http.Response) {
				if strings.HasSuffix(r.URL.Path, path) {
					alter(resp)
				}
			}}
		})
	}
}

// replacing changes the text of an answer.
func replacing(old, new string) func(*http.Response) {
	return func(resp *http.Response) {
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		body = bytes.ReplaceAll(body, []byte(old), []byte(new))
		resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		resp.Header.Set("Content-Length", fmt.Sprint(len(body)))
	}
}
