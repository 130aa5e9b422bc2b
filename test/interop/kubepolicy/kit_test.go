package kubepolicy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/policies"
	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/test/kubetest"
)

const (
	root     = "meshca-system" // the root namespace, and the CA's own
	deadline = time.Minute     // for what should take far less, on a machine that is busy
)

var (
	configMaps    = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	podResource   = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	eventResource = schema.GroupVersionResource{Group: "events.k8s.io", Version: "v1", Resource: "events"}
)

// restConfig is for whoever has the token.
func restConfig(c *kubetest.Cluster, token string) *rest.Config {
	return &rest.Config{Host: c.URL(), BearerToken: token, TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile()}, QPS: -1}
}

func client(t testing.TB, conf *rest.Config) dynamic.Interface {
	t.Helper()
	// A connection pool of its own, so that it can be closed at the end.
	transport, err := rest.TransportFor(conf)
	must(t, err)
	h := &http.Client{Transport: transport}
	d, err := dynamic.NewForConfigAndClient(conf, h)
	must(t, err)
	t.Cleanup(h.CloseIdleConnections)
	return d
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a cluster without policies, with one namespace for a test.
type world struct {
	*kubetest.Cluster
	admin     dynamic.Interface
	namespace string
}

// newWorld makes a namespace of its own; and everything about policies that other
// tests have left is gone.
func newWorld(t *testing.T, namespace string) *world {
	t.Helper()
	c := cluster.Get(t)
	w := &world{c, client(t, restConfig(c, c.AdminToken())), namespace}
	ctx := t.Context()
	for _, name := range []string{root, namespace} {
		must(t, c.CreateNamespace(ctx, name))
	}
	w.undefine(t)
	if err := w.admin.Resource(configMaps).Namespace(root).Delete(ctx, policies.RecordName, meta.DeleteOptions{}); !apierrors.IsNotFound(err) {
		must(t, err)
	}
	return w
}

// undefine deletes the definition and all policies, and waits until they are gone.
func (w *world) undefine(t *testing.T) {
	t.Helper()
	all := w.admin.Resource(definition.Resource)
	if err := all.Delete(t.Context(), definition.Name, meta.DeleteOptions{}); !apierrors.IsNotFound(err) {
		must(t, err)
	}
	until(t, "the definition is gone", func() bool {
		_, err := all.Get(t.Context(), definition.Name, meta.GetOptions{})
		return apierrors.IsNotFound(err)
	})
}

// define makes our definition, and waits until it is served.
func (w *world) define(t *testing.T) {
	t.Helper()
	k, err := definition.NewKeeper(w.admin, slog.New(slog.DiscardHandler))
	must(t, err)
	outcome, err := k.Ensure(t.Context())
	must(t, err)
	if outcome != definition.Made {
		t.Fatalf("the definition was %s", outcome)
	}
	w.served(t)
}

func (w *world) served(t *testing.T) {
	t.Helper()
	until(t, "PeerAuthentication is served", func() bool {
		_, err := w.policies().List(t.Context(), meta.ListOptions{})
		return err == nil
	})
}

func (w *world) policies() dynamic.ResourceInterface {
	return w.admin.Resource(policies.Resource("v1")).Namespace(w.namespace)
}

// apply makes a policy, or replaces its spec, which is JSON.
func (w *world) apply(t *testing.T, name, spec string) *unstructured.Unstructured {
	t.Helper()
	return w.applyIn(t, w.namespace, name, spec)
}

func (w *world) applyIn(t *testing.T, namespace, name, spec string) *unstructured.Unstructured {
	t.Helper()
	object := fmt.Sprintf(`{"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": %q, "namespace": %q}, "spec": %s}`, name, namespace, spec)
	var o *unstructured.Unstructured
	until(t, "policy "+name+" is applied", func() bool {
		// Just after its definition the API server may still answer that there is none.
		var err error
		o, err = w.admin.Resource(policies.Resource("v1")).Namespace(namespace).
			Patch(t.Context(), name, types.ApplyPatchType, []byte(object), meta.PatchOptions{FieldManager: "test", Force: new(true)})
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsMethodNotSupported(err) {
			t.Fatal(err)
		}
		return err == nil
	})
	return o
}

func (w *world) delete(t *testing.T, name string) {
	t.Helper()
	must(t, w.policies().Delete(t.Context(), name, meta.DeleteOptions{}))
}

// pod makes a pod with labels, and returns its UID.
func (w *world) pod(t *testing.T, name string, labels map[string]string) string {
	t.Helper()
	_, err := w.CreateServiceAccount(t.Context(), w.namespace, "sa-"+name)
	must(t, err)
	uid, err := w.CreatePod(t.Context(), w.namespace, name, "sa-"+name, "node-1")
	must(t, err)
	w.label(t, name, labels)
	return uid
}

func (w *world) label(t *testing.T, name string, labels map[string]string) {
	t.Helper()
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": labels}})
	must(t, err)
	_, err = w.admin.Resource(podResource).Namespace(w.namespace).Patch(t.Context(), name, types.MergePatchType, patch, meta.PatchOptions{})
	must(t, err)
}

func (w *world) id(t *testing.T) identity.ID {
	t.Helper()
	td, err := identity.ParseTrustDomain("cluster.local")
	must(t, err)
	id, err := identity.WorkloadID(td, w.namespace, "cart")
	must(t, err)
	return id
}

// until polls what has no channel to wait on.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	end := time.NewTimer(deadline)
	defer end.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-end.C:
			t.Fatalf("after %v it is still not so that %s", deadline, what)
		}
	}
}

// lines is a log that can be read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func textLog(to *lines) *slog.Logger { return slog.New(slog.NewTextHandler(to, nil)) }

// replica is one CA's view of policies and pods.
type replica struct {
	*policies.Source
	t    *testing.T
	log  *lines
	end  func()
	logs *slog.Logger
	conf *rest.Config
}

// replica starts one, with the rights of whoever conf is for.
func (w *world) replica(t *testing.T, conf *rest.Config) *replica {
	t.Helper()
	r := &replica{t: t, log: new(lines), conf: conf}
	r.logs = textLog(r.log)
	p := newLivePods(client(t, conf))
	var err error
	r.Source, err = policies.New(policies.Config{
		Client: client(t, conf), Pods: p, RootNamespace: root, Namespace: root,
		Now: time.Now, Log: r.logs, Metrics: prometheus.NewRegistry(),
	})
	must(t, err)
	r.end = background(t, r.Run, p.run)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the log:\n%s", r.log)
		}
	})
	return r
}

// background runs until the end of the test, or until what it returns is called.
func background(t *testing.T, run ...func(context.Context) error) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for _, f := range run {
		all.Go(func() {
			if err := f(ctx); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("it ended by itself: %v", err)
			}
		})
	}
	end = func() {
		cancel()
		all.Wait()
	}
	t.Cleanup(end)
	return end
}

func (w *world) asAdmin() *rest.Config { return restConfig(w.Cluster, w.AdminToken()) }

// awaits follows a workload's policy until it is as wanted.
func (r *replica) awaits(id identity.ID, pod, what string, is func(*policy.Resolved) bool) *policy.Resolved {
	r.t.Helper()
	end := time.NewTimer(deadline)
	defer end.Stop()
	for {
		p, changed := r.Policy(id, pod)
		if is(p) {
			return p
		}
		select {
		case <-changed:
		case <-end.C:
			r.t.Fatalf("never %s; the last: %s", what, show(p))
		}
	}
}

func show(p *policy.Resolved) string {
	if p == nil {
		return "none"
	}
	return fmt.Sprintf("version %d, labels %d: %v by %v, ports %s", p.Version, p.WorkloadVersion, p.Mode, p.Source, p.DescribePorts())
}

func says(mode policy.Mode, level policy.Level) func(*policy.Resolved) bool {
	return func(p *policy.Resolved) bool { return p != nil && p.Mode == mode && p.Source.Level == level }
}

func (r *replica) logsSoon(what string) {
	r.t.Helper()
	until(r.t, fmt.Sprintf("the log says %q", what), func() bool { return strings.Contains(r.log.String(), what) })
}
