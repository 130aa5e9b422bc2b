package kubepolicy

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/events"
	"github.com/meshca/meshca/ca/kube/policies"
	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/ca/kube/policies/status"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
	"github.com/meshca/meshca/test/kubetest"
)

// right is one verb on one resource.
type right struct {
	group, resource, verb string
	name                  string // only the object of that name
	own                   bool   // only in the CA's namespace
}

func (r right) String() string {
	full := r.resource
	if r.group != "" {
		main, sub, is := strings.Cut(r.resource, "/")
		full = main + "." + r.group
		if is {
			full += "/" + sub
		}
	}
	return r.verb + " " + full
}

// rights are those that the packages' documents list, and no others.
var rights = []right{
	{"security.istio.io", "peerauthentications", "list", "", false},
	{"security.istio.io", "peerauthentications", "watch", "", false},
	{"security.istio.io", "peerauthentications/status", "patch", "", false},
	{"apiextensions.k8s.io", "customresourcedefinitions", "get", definition.Name, false},
	{"apiextensions.k8s.io", "customresourcedefinitions", "update", definition.Name, false},
	{"apiextensions.k8s.io", "customresourcedefinitions", "create", "", false},
	{"", "configmaps", "get", policies.RecordName, true},
	{"", "configmaps", "update", policies.RecordName, true},
	{"", "configmaps", "create", "", true},
	{"events.k8s.io", "events", "create", "", false},
	{"events.k8s.io", "events", "patch", "", false},
}

func rbac(resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: resource}
}

func rules(rights []right, own bool) []any {
	var all []any
	for _, r := range rights {
		if r.own != own {
			continue
		}
		rule := map[string]any{"apiGroups": []any{r.group}, "resources": []any{r.resource}, "verbs": []any{r.verb}}
		if r.name != "" {
			rule["resourceNames"] = []any{r.name}
		}
		all = append(all, rule)
	}
	return all
}

// grant gives an account other rights.
func (w *world) grant(t *testing.T, name string, rights []right) {
	t.Helper()
	for _, own := range []bool{false, true} {
		role, in := "clusterroles", ""
		if own {
			role, in = "roles", root
		}
		patch, err := json.Marshal(map[string]any{"rules": rules(rights, own)})
		must(t, err)
		_, err = w.admin.Resource(rbac(role)).Namespace(in).Patch(t.Context(), name, types.MergePatchType, patch, meta.PatchOptions{})
		must(t, err)
	}
}

// account makes a ServiceAccount that has these rights and nothing else.
func (w *world) account(t *testing.T, name string, rights []right) *rest.Config {
	t.Helper()
	ctx := t.Context()
	_, err := w.CreateServiceAccount(ctx, root, name)
	must(t, err)
	for _, own := range []bool{false, true} {
		role, binding, kind, in := "clusterroles", "clusterrolebindings", "ClusterRole", ""
		if own {
			role, binding, kind, in = "roles", "rolebindings", "Role", root
		}
		object := func(kind string, content map[string]any) *unstructured.Unstructured {
			content["apiVersion"], content["kind"], content["metadata"] = "rbac.authorization.k8s.io/v1", kind, map[string]any{"name": name}
			return &unstructured.Unstructured{Object: content}
		}
		_, err := w.admin.Resource(rbac(role)).Namespace(in).Create(ctx, object(kind, map[string]any{"rules": rules(rights, own)}), meta.CreateOptions{})
		must(t, err)
		_, err = w.admin.Resource(rbac(binding)).Namespace(in).Create(ctx, object(kind+"Binding", map[string]any{
			"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
			"subjects": []any{map[string]any{"kind": "ServiceAccount", "name": name, "namespace": root}},
		}), meta.CreateOptions{})
		must(t, err)
	}
	token, err := w.Token(ctx, root, name, kubetest.TokenRequest{Seconds: 3600})
	must(t, err)
	conf := restConfig(w.Cluster, token)
	for _, r := range rights { // the API server's own view of them lags
		w.holds(t, conf, r)
	}
	return conf
}

func (w *world) holds(t *testing.T, conf *rest.Config, r right) {
	t.Helper()
	resource, sub, _ := strings.Cut(r.resource, "/")
	attributes := map[string]any{"group": r.group, "resource": resource, "subresource": sub, "verb": r.verb, "name": r.name}
	if r.own {
		attributes["namespace"] = root
	}
	reviews := client(t, conf).Resource(schema.GroupVersionResource{Group: "authorization.k8s.io", Version: "v1", Resource: "selfsubjectaccessreviews"})
	until(t, "the account may "+r.String(), func() bool {
		answer, err := reviews.Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": map[string]any{"resourceAttributes": attributes},
		}}, meta.CreateOptions{})
		must(t, err)
		allowed, _, _ := unstructured.NestedBool(answer.Object, "status", "allowed")
		return allowed
	})
}

// leader is all that a replica which leads runs, with the account's rights.
type leader struct {
	*replica
	events *events.Writer
	later  atomic.Int64 // how far the events' clock is ahead
}

func (w *world) leader(t *testing.T, conf *rest.Config) *leader {
	t.Helper()
	l := &leader{replica: &replica{t: t, log: new(lines), conf: conf}}
	l.logs = textLog(l.log)
	p := newLivePods(w.admin) // who watches pods has its own rights
	c := client(t, conf)
	var err error
	l.Source, err = policies.New(policies.Config{Client: c, Pods: p, RootNamespace: root, Namespace: root, Now: time.Now, Log: l.logs, Metrics: prometheus.NewRegistry()})
	must(t, err)
	now := func() time.Time { return time.Now().Add(time.Duration(l.later.Load())) }
	l.events, err = events.New(events.Config{Client: c, Instance: "meshca-0", Now: now, Log: l.logs, Metrics: prometheus.NewRegistry()})
	must(t, err)
	s, err := status.New(status.Config{
		Client: c, Policies: l, Events: l.events, RootNamespace: root, Now: time.Now, Log: l.logs,
		Pods: func() []manifest.Pod { return []manifest.Pod{{Namespace: w.namespace, Name: "x"}} },
	})
	must(t, err)
	k, err := definition.NewKeeper(c, l.logs)
	must(t, err)
	l.end = background(t, l.Run, p.run, l.Remember, l.events.Run, s.Run, k.Run)
	return l
}

// age makes the definition one of an older meshca.
func (w *world) age(t *testing.T) {
	w.updateDefinition(t, func(d *unstructured.Unstructured) {
		notes := d.GetAnnotations()
		notes["meshca.dev/definition-schema"] = "0"
		d.SetAnnotations(notes)
	})
}

func (w *world) recordIs(t *testing.T, content string) {
	t.Helper()
	in := w.admin.Resource(configMaps).Namespace(root)
	if err := in.Delete(t.Context(), policies.RecordName, meta.DeleteOptions{}); !apierrors.IsNotFound(err) {
		must(t, err)
	}
	if content == "" {
		return
	}
	_, err := in.Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": policies.RecordName}, "data": map[string]any{"record": content},
	}}, meta.CreateOptions{})
	must(t, err)
}

// With exactly the rights that the documents list, everything works.
func TestRightsAreEnough(t *testing.T) {
	w := newWorld(t, "enough")
	l := w.leader(t, w.account(t, "enough", rights))
	l.awaits(w.id(t), "", "known", says(policy.Permissive, policy.LevelDefault))
	w.apply(t, "default", `{"mtls": {"mode": "STRICT"}}`)
	l.awaits(w.id(t), "", "STRICT", says(policy.Strict, policy.LevelNamespace))
	until(t, "it is remembered", func() bool { return strings.Contains(w.remembered(t), `"policies":1`) })
	nobody := w.apply(t, "nobody", `{"selector": {"matchLabels": {"app": "nobody"}}}`)
	until(t, "it is remembered", func() bool { return strings.Contains(w.remembered(t), `"policies":2`) })
	w.conditionSoon(t, "nobody", "False SelectsNoPod", "")
	w.eventSoon(t, string(nobody.GetUID()), "Warning SelectsNoPod", "")
	cart := w.pod(t, "cart", nil)
	l.events.Refused(w.namespace, "cart", cart, "of a test")
	w.eventSoon(t, cart, "Warning CertificateRefused ×1", "")
	l.later.Store(int64(2 * time.Minute))
	l.events.Refused(w.namespace, "cart", cart, "of a test")
	w.eventSoon(t, cart, "Warning CertificateRefused ×2", "")
	w.age(t)
	l.logsSoon("outcome=replaced")
	if s := l.log.String(); strings.Contains(s, "may not") {
		t.Errorf("the log:\n%s", s)
	}
}

// Each of the rights is needed, and who misses it is told the verb and the resource.
func TestF32_EachRightIsNeededAndNamed(t *testing.T) {
	w := newWorld(t, "needed")
	for i, missing := range rights {
		t.Run(strings.ReplaceAll(missing.String(), "/", "-"), func(t *testing.T) {
			w.undefine(t)
			if missing.verb != "create" {
				w.define(t)
			}
			if missing.resource == "configmaps" && missing.verb == "create" {
				w.recordIs(t, "")
			} else {
				w.recordIs(t, "{}")
			}
			l := w.leader(t, w.account(t, fmt.Sprintf("needed-%d", i), slices.Delete(slices.Clone(rights), i, i+1)))
			if missing.verb == "create" && missing.resource == "customresourcedefinitions" {
				l.logsSoon("the CA may not " + missing.String())
				return
			}
			w.served(t)
			w.apply(t, "nobody", `{"selector": {"matchLabels": {"app": "nobody"}}}`)
			cart := w.pod(t, fmt.Sprintf("cart-%d", i), nil)
			l.events.Refused(w.namespace, fmt.Sprintf("cart-%d", i), cart, "of a test")
			if missing.verb == "patch" && missing.resource == "events" {
				w.eventSoon(t, cart, "Warning CertificateRefused ×1", "")
				l.later.Store(int64(2 * time.Minute))
				l.events.Refused(w.namespace, fmt.Sprintf("cart-%d", i), cart, "of a test")
			}
			if missing.verb == "update" && missing.resource == "customresourcedefinitions" {
				w.age(t)
			}
			l.logsSoon("the CA may not " + missing.String())
		})
	}
}

// Rights that are withdrawn while it runs take nothing away that is in force, and what
// was missed is found within 30 s once they are given back.
func TestT10_F32_RightsAreWithdrawnAndGivenBack(t *testing.T) {
	w := newWorld(t, "withdrawn")
	w.define(t)
	w.apply(t, "default", `{"mtls": {"mode": "STRICT"}}`)
	conf := w.account(t, "withdrawn", rights)
	l := w.leader(t, conf)
	l.awaits(w.id(t), "", "STRICT", says(policy.Strict, policy.LevelNamespace))
	w.grant(t, "withdrawn", nil)
	// A watch that goes on is not judged again, one that deletes is held back by the
	// look at the definition.
	until(t, "the right is gone", func() bool {
		_, err := client(t, conf).Resource(definition.Resource).Get(t.Context(), definition.Name, meta.GetOptions{})
		return apierrors.IsForbidden(err)
	})
	w.delete(t, "default")
	l.logsSoon("the CA may not get customresourcedefinitions")
	if p, _ := l.Policy(w.id(t), ""); p.Mode != policy.Strict {
		t.Errorf("without rights: %s", show(p))
	}
	began := time.Now()
	w.grant(t, "withdrawn", rights)
	l.awaits(w.id(t), "", "without policy", says(policy.Permissive, policy.LevelDefault))
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("after %v", took)
	}
}
