package kubecheck

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/check"
	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/trust"
)

// fault is one thing that is wrong.
type fault struct {
	name   string
	code   string
	want   check.Status
	says   string // in what was found, the objects or what to do
	breaks func(*testing.T, clients)
	alter  func(*check.Config)
	// besides are codes that may fail too, since one thing is the other's cause.
	besides string
}

// TestF64_EachCheckBothWays breaks one thing at a time in an installation that is whole:
// the check for it says so, no other does, and all hold again once it is repaired.
func TestF64_EachCheckBothWays(t *testing.T) {
	c := install(t)
	allHold(t, look(t, nil))
	for _, f := range append(platformFaults(), installationFaults()...) {
		// What a test puts right itself it does at its end, before the rest is.
		t.Run(f.code+" "+f.name, func(t *testing.T) { f.judge(t, c) })
		if f.breaks == nil {
			continue
		}
		c.remove(t, pods, "shop", "p")
		if s := look(t, nil).Summary; s.Attention+s.Broken+s.Unknown > 0 {
			c = install(t)
		}
	}
	allHold(t, look(t, nil))
}

func (f *fault) judge(t *testing.T, c clients) {
	if f.breaks != nil {
		f.breaks(t, c)
	}
	r := look(t, f.alter)
	got := result(t, r, f.code)
	if all := fmt.Sprint(got.Found, got.Objects, got.Next); got.Status != f.want || !strings.Contains(all, f.says) {
		t.Errorf("%+v, want %s and %q", got, f.want, f.says)
	}
	for _, c := range r.Checks {
		if c.Status != check.Holds && c.Next == "" {
			t.Errorf("%s does not say what to do", c.Code)
		}
		if c.Code != f.code && c.Status != check.Holds && !strings.Contains(f.besides, c.Code) {
			t.Errorf("besides: %+v", c)
		}
	}
}

func platformFaults() []fault {
	return []fault{
		{name: "older", code: "MC0101", want: check.Broken, says: "v1.35.9", besides: "MC0104",
			alter: answering("/version", func(r *http.Response) { replacing(`"gitVersion": "v1.37`, `"gitVersion": "v1.35.9+`)(r) })},
		{name: "no version", code: "MC0101", want: check.Unknown, says: "could not be told", besides: "MC0104",
			alter: answering("/version", replacing(`"gitVersion": "v`, `"gitVersion": "x`))},
		{name: "a field that is not known", code: "MC0102", want: check.Broken, says: "serviceAccountTokenInSecrets",
			alter: answering("/openapi/v3/apis/storage.k8s.io/v1", replacing("serviceAccountTokenInSecrets", "other"))},
		{name: "not served", code: "MC0102", want: check.Broken, says: "does not serve",
			alter: answering("/openapi/v3/apis/storage.k8s.io/v1", func(r *http.Response) { r.StatusCode = http.StatusNotFound })},
		{name: "not served", code: "MC0103", want: check.Holds, says: "not served",
			alter: answering("/apis/certificates.k8s.io/v1", replacing(`"clustertrustbundles"`, `"others"`))},
		{name: "no pod", code: "MC0104", want: check.Holds, says: "no pod of the CA runs", besides: "MC0301",
			breaks: func(t *testing.T, c clients) {
				c.remove(t, pods, system, "meshca-a")
				c.remove(t, pods, system, "meshca-b")
			}},
		{name: "another node", code: "MC0104", want: check.Broken, says: `names node "node1"`,
			alter: answering("/namespaces/meshca-system/pods", replacing(`"nodeName":"node1"`, `"nodeName":"node2"`))},
		{name: "no number", code: "MC0105", want: check.Broken, says: "no number", besides: "MC0501",
			alter: answering("/api/v1/namespaces", replacing(`"resourceVersion":"`, `"resourceVersion":"x`))},
		{name: "an hour behind", code: "MC0106", want: check.Attention, says: "behind the API server's",
			alter: func(c *check.Config) { c.Now = func() time.Time { return time.Now().Add(-time.Hour) } }},
		{name: "no date", code: "MC0106", want: check.Unknown, says: "no date", besides: "MC0107",
			alter: answering("", func(r *http.Response) { r.Header.Del("Date") })},
		{name: "no heartbeat", code: "MC0107", want: check.Attention, says: "node1: no heartbeat for 3m",
			breaks: func(t *testing.T, c clients) { heartbeat(t, c, node, time.Now().Add(-3*time.Minute)) }},
		{name: "a clock that is ahead", code: "MC0107", want: check.Attention, says: "node1: its clock is at least",
			breaks: func(t *testing.T, c clients) { heartbeat(t, c, node, time.Now().Add(15*time.Second)) }},
		{name: "a clock that is far ahead", code: "MC0107", want: check.Broken, says: "node1: its clock is at least",
			breaks: func(t *testing.T, c clients) { heartbeat(t, c, node, time.Now().Add(2*time.Minute)) }},
		{name: "never", code: "MC0107", want: check.Attention, says: "never renewed",
			breaks: func(t *testing.T, c clients) { c.remove(t, leases, "kube-node-lease", node) }},
		{name: "agents are not admitted", code: "MC0201", want: check.Broken, says: `"baseline"`,
			breaks: func(t *testing.T, c clients) {
				c.patch(t, namespaces, "", agents, `{"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "baseline"}}}`)
				t.Cleanup(func() {
					c.patch(t, namespaces, "", agents, `{"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}}`)
				})
			}},
		{name: "no definition", code: "MC0203", want: check.Broken, says: "there is none", besides: "MC0204",
			breaks: func(t *testing.T, c clients) {
				c.remove(t, definition.Resource, "", definition.Name)
				eventually(t, "the definition gone", func() error {
					_, err := c.objects.Resource(definition.Resource).Get(context.Background(), definition.Name, metav1.GetOptions{})
					if err == nil {
						return fmt.Errorf("it is there")
					}
					return nil
				})
			}},
		{name: "Istio's", code: "MC0203", want: check.Holds, says: "Istio's",
			breaks: func(t *testing.T, c clients) {
				c.patch(t, definition.Resource, "", definition.Name, `{"metadata": {"labels": {"operator.istio.io/component": "Base"}}}`)
				t.Cleanup(func() {
					c.patch(t, definition.Resource, "", definition.Name, `{"metadata": {"labels": {"operator.istio.io/component": null}}}`)
				})
			}},
		{name: "meant for the mesh", code: "MC0204", want: check.Attention, says: "istio-system/default",
			breaks: func(t *testing.T, c clients) {
				must(t, cluster.Get(t).CreateNamespace(context.Background(), "istio-system"))
				for name, spec := range map[string]string{"default": `{"mtls": {"mode": "STRICT"}}`, "one": `{"selector": {"matchLabels": {"a": "b"}}}`} {
					c.apply(t, policies, object(fmt.Sprintf(`{"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
						"metadata": {"name": %q, "namespace": "istio-system"}, "spec": %s}`, name, spec)))
				}
				t.Cleanup(func() {
					c.remove(t, policies, "istio-system", "default")
					c.remove(t, policies, "istio-system", "one")
				})
			}},
	}
}

func installationFaults() []fault {
	driver := func(patch string) func(*testing.T, clients) {
		return func(t *testing.T, c clients) {
			for _, o := range manifest(t) {
				if o.GetKind() != "CSIDriver" {
					continue
				}
				spec := o.Object["spec"].(map[string]any)
				for k, v := range object(`{"apiVersion": "v1", "kind": "X", "spec": ` + patch + `}`).Object["spec"].(map[string]any) {
					spec[k] = v
				}
				c.apply(t, csiDrivers, o)
			}
		}
	}
	gone := func(kind string) func(*testing.T, clients) {
		return func(t *testing.T, c clients) {
			for _, o := range manifest(t) {
				if o.GetKind() == kind {
					c.remove(t, resourceOf(t, o), o.GetNamespace(), o.GetName())
				}
			}
		}
	}
	pod := func(container, spec string) func(*testing.T, clients) {
		return func(t *testing.T, c clients) { app(t, c, "shop", "p", container, spec) }
	}
	host := func(path string) func(*testing.T, clients) {
		return pod("", fmt.Sprintf(`"volumes": [{"name": "h", "hostPath": {"path": %q}}]`, path))
	}
	return []fault{
		{name: "somebody else's", code: "MC0202", want: check.Broken, says: "ClusterRole meshca",
			breaks: func(t *testing.T, c clients) {
				c.patch(t, roles, "", "meshca", `{"metadata": {"labels": {"app.kubernetes.io/name": "other"}}}`)
			}},
		{name: "none", code: "MC0301", want: check.Broken, says: "no Deployment", breaks: gone("Deployment")},
		{name: "none ready", code: "MC0301", want: check.Broken, says: "0 of 2",
			breaks: func(t *testing.T, c clients) {
				status(t, c, pods, system, "meshca-a", statusNot)
				status(t, c, pods, system, "meshca-b", statusNot)
			}},
		{name: "one ready", code: "MC0301", want: check.Attention, says: "meshca-b (node1): ContainersNotReady",
			breaks: func(t *testing.T, c clients) { status(t, c, pods, system, "meshca-b", statusNot) }},
		{name: "two versions", code: "MC0301", want: check.Attention, says: "2 versions",
			breaks: func(t *testing.T, c clients) {
				_, err := c.objects.Resource(pods).Namespace(system).Patch(context.Background(), "meshca-b", types.JSONPatchType,
					[]byte(`[{"op": "replace", "path": "/spec/containers/0/image", "value": "meshca:2"}]`), metav1.PatchOptions{})
				must(t, err)
			}},
		{name: "scaled to none", code: "MC0301", want: check.Broken, says: "nothing signs",
			breaks: func(t *testing.T, c clients) {
				c.patch(t, deployments, system, "meshca", `{"spec": {"replicas": 0}}`)
			}},
		{name: "no ClusterRole", code: "MC0302", want: check.Broken, says: "list pods", breaks: gone("ClusterRole")},
		{name: "no Role", code: "MC0302", want: check.Broken, says: `get secrets "meshca-root-1" in namespace meshca-system`, breaks: gone("Role")},
		{name: "no marker", code: "MC0303", want: check.Broken, says: "meshca-roots", besides: "MC0304 MC0501 MC0502",
			breaks: func(t *testing.T, c clients) {
				saved := c.take(t, system, state.MarkerName)
				t.Cleanup(func() { c.apply(t, configMaps, saved) })
			}},
		{name: "no key", code: "MC0303", want: check.Broken, says: "meshca restore", besides: "MC0304",
			breaks: func(t *testing.T, c clients) {
				saved := c.save(t, secrets, system, state.SecretName(1))
				c.remove(t, secrets, system, state.SecretName(1))
				t.Cleanup(func() { c.apply(t, secrets, saved) })
			}},
		{name: "can be edited", code: "MC0304", want: check.Broken, says: "meshca-root-1",
			breaks: func(t *testing.T, c clients) {
				saved := c.save(t, secrets, system, state.SecretName(1))
				changeable := saved.DeepCopy()
				changeable.Object["immutable"] = false
				c.apply(t, secrets, changeable)
				t.Cleanup(func() { c.apply(t, secrets, saved) })
			}},
		{name: "none", code: "MC0401", want: check.Broken, says: "no DaemonSet", breaks: gone("DaemonSet")},
		{name: "a node without", code: "MC0401", want: check.Broken, says: "node2: no agent",
			breaks: func(t *testing.T, c clients) {
				_, err := cluster.Get(t).CreateNode(context.Background(), "node2")
				must(t, err)
				heartbeat(t, c, "node2", time.Now())
				t.Cleanup(func() {
					must(t, c.CoreV1().Nodes().Delete(context.Background(), "node2", metav1.DeleteOptions{}))
				})
			}},
		{name: "not ready", code: "MC0401", want: check.Broken, says: "meshca-agent-x",
			breaks: func(t *testing.T, c clients) { status(t, c, pods, agents, "meshca-agent-x", statusNot) }},
		{name: "none", code: "MC0402", want: check.Broken, says: "no pod gets an identity", breaks: gone("CSIDriver")},
		{name: "tokens in logs", code: "MC0402", want: check.Broken, says: "serviceAccountTokenInSecrets", breaks: driver(`{"serviceAccountTokenInSecrets": false}`)},
		{name: "no renewal", code: "MC0402", want: check.Broken, says: "requiresRepublish", breaks: driver(`{"requiresRepublish": false}`)},
		{name: "no pod named", code: "MC0402", want: check.Broken, says: "podInfoOnMount", breaks: driver(`{"podInfoOnMount": false}`)},
		{name: "attached", code: "MC0402", want: check.Broken, says: "attachRequired", breaks: driver(`{"attachRequired": true}`)},
		{name: "persistent", code: "MC0402", want: check.Broken, says: "Persistent", breaks: driver(`{"volumeLifecycleModes": ["Ephemeral", "Persistent"]}`)},
		{name: "another audience", code: "MC0402", want: check.Broken, says: `"vault"`, breaks: driver(`{"tokenRequests": [{"audience": "meshca"}, {"audience": "vault"}]}`)},
		{name: "not our audience", code: "MC0402", want: check.Broken, says: `not "meshca"`, breaks: driver(`{"tokenRequests": [{"audience": ""}]}`)},
		{name: "not registered", code: "MC0403", want: check.Broken, says: "node1",
			breaks: func(t *testing.T, c clients) { c.patch(t, csiNodes, "", node, `{"spec": {"drivers": null}}`) }},
		{name: "missing", code: "MC0501", want: check.Broken, says: "shop: it is missing",
			breaks: func(t *testing.T, c clients) {
				must(t, cluster.Get(t).CreateNamespace(context.Background(), "shop"))
				c.patch(t, namespaces, "", "shop", `{"metadata": {"labels": {"meshca.dev/trust-bundle": "enabled"}}}`)
				t.Cleanup(func() {
					c.patch(t, namespaces, "", "shop", `{"metadata": {"labels": {"meshca.dev/trust-bundle": null}}}`)
				})
			}},
		{name: "an older one", code: "MC0501", want: check.Broken, says: "carries bundle 0, and the state says 1",
			breaks: func(t *testing.T, c clients) {
				c.patch(t, configMaps, agents, trust.ConfigMapName, `{"metadata": {"annotations": {"meshca.dev/bundle-sequence": "0"}}}`)
			}},
		{name: "other roots", code: "MC0501", want: check.Broken, says: "has other roots",
			breaks: func(t *testing.T, c clients) {
				saved := c.save(t, configMaps, agents, trust.ConfigMapName)
				c.patch(t, configMaps, agents, trust.ConfigMapName, `{"data": {"root.pem": ""}}`)
				t.Cleanup(func() { c.apply(t, configMaps, saved) })
			}},
		{name: "missing", code: "MC0502", want: check.Broken, says: "is missing",
			breaks: func(t *testing.T, c clients) { c.remove(t, clusterTBs, "", trust.TrustBundleName) }},
		{name: "privileged", code: "MC0601", want: check.Attention, says: "shop/p: container \"c\" is privileged", breaks: pod(`"securityContext": {"privileged": true}`, "")},
		{name: "a strong capability", code: "MC0601", want: check.Attention, says: "SYS_ADMIN", breaks: pod(`"securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}`, "")},
		{name: "hostPID", code: "MC0601", want: check.Attention, says: "hostPID", breaks: pod("", `"hostPID": true`)},
		{name: "in the kubelet's folder", code: "MC0601", want: check.Attention, says: "hostPath /var/lib/kubelet/pods", breaks: host("/var/lib/kubelet/pods")},
		{name: "around the kubelet's folder", code: "MC0601", want: check.Attention, says: "hostPath /var", breaks: host("/var/")},
		{name: "the root", code: "MC0601", want: check.Attention, says: "hostPath /", breaks: host("/")},
		{name: "the agent's tokens", code: "MC0601", want: check.Attention, says: "hostPath /var/run/meshca-agent", breaks: host("/var/run/meshca-agent")},
		{name: "another folder", code: "MC0601", want: check.Holds, says: "none", breaks: host("/var/lib/kubelet-other")},
		{name: "kube-system", code: "MC0601", want: check.Holds, says: "1 in kube-system beside, as is expected",
			breaks: func(t *testing.T, c clients) {
				app(t, c, "kube-system", "proxy", `"securityContext": {"privileged": true}`, "")
				t.Cleanup(func() { c.remove(t, pods, "kube-system", "proxy") })
			}},
		{name: "not read-only", code: "MC0602", want: check.Broken, says: `shop/p: volume "v"`, breaks: pod(mounts, strings.Replace(volume, "true", "false", 1))},
		{name: "not mounted", code: "MC0603", want: check.Attention, says: `shop/p: volume "v"`, breaks: pod("", volume)},
		{name: "a pod that is right", code: "MC0603", want: check.Holds, says: "none", breaks: pod(mounts, volume)},
		{name: "no agent", code: "MC0604", want: check.Broken, says: "shop/p (node1)", besides: "MC0401",
			breaks: func(t *testing.T, c clients) {
				app(t, c, "shop", "p", mounts, volume)
				status(t, c, pods, agents, "meshca-agent-x", statusNot)
			}},
	}
}

// TestF32_WhatCannotBeToldIsUnknown asks as somebody who may read nothing but whether
// meshca is there.
func TestF32_WhatCannotBeToldIsUnknown(t *testing.T) {
	c := install(t)
	bindViewer(t, c)
	r := look(t, func(c *check.Config) {
		c.API.Impersonate = rest.ImpersonationConfig{UserName: "viewer", Groups: []string{"system:authenticated"}}
	})
	for _, code := range []string{"MC0105", "MC0107", "MC0108", "MC0201", "MC0202", "MC0203", "MC0204", "MC0301", "MC0302", "MC0303", "MC0304", "MC0401",
		"MC0403", "MC0501", "MC0502", "MC0601", "MC0602", "MC0603", "MC0604"} {
		if got := result(t, r, code); got.Status != check.Unknown || got.Next == "" {
			t.Errorf("%+v", got)
		}
	}
	if r.Summary.Broken > 0 {
		t.Errorf("something counts as broken that could only not be told: %+v", r)
	}
}

// TestBefore judges a cluster where nothing of ours is.
func TestBefore(t *testing.T) {
	c := install(t)
	c.remove(t, pods, agents, "meshca-agent-x") // one of another installation has no business here
	other := func(c *check.Config) { c.Namespace, c.AgentsNamespace = "before", "before-agents" }
	r := look(t, other)
	if r.Phase != check.Before {
		t.Fatalf("%+v", r)
	}
	allHold(t, r)
	// The namespaces are made by somebody, and have no labels.
	must(t, cluster.Get(t).CreateNamespace(context.Background(), "before"))
	if got := result(t, look(t, other), "MC0201"); got.Status != check.Attention || got.Objects[0] != "before" {
		t.Errorf("%+v", got)
	}
	c.apply(t, configMaps, object(`{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "meshca-config", "namespace": "before"}}`))
	if got := result(t, look(t, other), "MC0202"); got.Status != check.Broken || !strings.Contains(got.Objects[0], "meshca-config") {
		t.Errorf("%+v", got)
	}
	c.remove(t, configMaps, "before", "meshca-config")
}

// A list is as long as is read.
func TestManyPodsAreBounded(t *testing.T) {
	c := install(t)
	for i := range 13 {
		app(t, c, "shop", fmt.Sprintf("p-%02d", i), "", `"hostPID": true`)
		defer c.remove(t, pods, "shop", fmt.Sprintf("p-%02d", i))
	}
	if got := result(t, look(t, nil), "MC0601"); len(got.Objects) != 10 || got.More != 3 || !strings.HasPrefix(got.Objects[0], "shop/p-00") {
		t.Errorf("%+v", got)
	}
}
