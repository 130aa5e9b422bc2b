package kube

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/kube/pods"
	"github.com/meshca/meshca/ca/kube/review"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/test/kubetest"
)

// The whole life of a pod, with the permissions that are documented and no others.
func TestT2_F30_LifeOfAPod(t *testing.T) {
	c := cluster.Get(t)
	config, _ := identify(t, c, "life", grants())
	w := newWorkload(t, c, "life")
	p, _ := follow(t, pods.Config{API: config})
	within(t, 20*time.Second, "reading the cluster", p.Ready)
	first := w.claims(t, c)
	must(t, p.Check(t.Context(), first))

	// A pod made this moment is as good, whether the watch has reported it or not.
	for range 20 {
		next := w.another(t, c, "new")
		must(t, p.Check(t.Context(), next.claims(t, c)))
		must(t, c.DeletePod(t.Context(), w.namespace, "new"))
	}

	must(t, c.DeletePod(t.Context(), w.namespace, w.pod))
	second := w.another(t, c, w.pod)
	within(t, 5*time.Second, "refusing the old pod", func() error {
		return refused(p.Check(t.Context(), first), "does not exist any more")
	})
	must(t, p.Check(t.Context(), second.claims(t, c)))
	must(t, p.Degraded())
}

// A deletionTimestamp is when the pod should be gone, its grace included.
func TestT2_DeletionTimestampHasTheGraceInIt(t *testing.T) {
	c := cluster.Get(t)
	config, _ := identify(t, c, "drain", grants())
	w := newWorkload(t, c, "drain")
	var ahead atomicDuration
	p, _ := follow(t, pods.Config{API: config, Now: ahead.now})
	within(t, 20*time.Second, "reading the cluster", p.Ready)
	claims := w.claims(t, c)
	must(t, c.Delete(t.Context(), "/api/v1/namespaces/drain/pods/"+w.pod+"?gracePeriodSeconds=600"))
	within(t, 5*time.Second, "hearing of the deletion", func() error {
		if pod, _ := p.Pod(w.podUID); pod.Deletion.IsZero() {
			return errors.New("not yet")
		}
		return nil
	})
	pod, _ := p.Pod(w.podUID)
	if left := time.Until(pod.Deletion); left < 590*time.Second || left > 601*time.Second {
		t.Errorf("the pod should be gone in %v; its grace is 600 s", left)
	}
	// A token can still be had, and the pod renews, until a minute after its end.
	_ = w.rawToken(t, c)
	for _, passed := range []time.Duration{0, 5 * time.Minute, 10 * time.Minute, 10*time.Minute + 50*time.Second} {
		ahead.set(passed)
		if err := p.Check(t.Context(), claims); err != nil {
			t.Errorf("%v after its deletion: %v", passed, err)
		}
	}
	ahead.set(11*time.Minute + 5*time.Second)
	must(t, refused(p.Check(t.Context(), claims), "should have been gone"))
}

// Node, ServiceAccount and namespace are part of what a token was made for.
func TestF31_NodeAccountAndNamespaceGo(t *testing.T) {
	c := cluster.Get(t)
	config, _ := identify(t, c, "around", grants())
	p, _ := follow(t, pods.Config{API: config})
	within(t, 20*time.Second, "reading the cluster", p.Ready)
	for name, tt := range map[string]struct{ path, reason string }{
		"around-node":      {"/api/v1/nodes/node-of-around-node", `nodes "node-of-around-node"`},
		"around-account":   {"/api/v1/namespaces/around-account/serviceaccounts/cart", `serviceaccounts "around-account/cart"`},
		"around-namespace": {"/api/v1/namespaces/around-namespace", "is being terminated"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorkload(t, c, name)
			claims := w.claims(t, c)
			must(t, p.Check(t.Context(), claims))
			must(t, c.Delete(t.Context(), tt.path))
			within(t, 5*time.Second, "refusing", func() error { return refused(p.Check(t.Context(), claims), tt.reason) })
		})
	}
}

// Each permission is needed: without it something does not work, and what says so
// names the verb and the resource.
func TestF32_EachPermissionIsNeeded(t *testing.T) {
	c := cluster.Get(t)
	w := newWorkload(t, c, "needed")
	verified := w.claims(t, c)
	raw := w.rawToken(t, c)
	missing := ghosts(t, c)
	for _, without := range grants() {
		t.Run(without.verb+" "+without.resource, func(t *testing.T) {
			rest := slices.DeleteFunc(grants(), func(g grant) bool { return g == without })
			config, _ := identify(t, c, "without-"+without.verb+"-"+without.resource, rest)
			names := `the verb "` + without.verb + `" on the resource "` + without.resource + `"`
			switch without.verb {
			case "create":
				r, err := review.New(review.Config{API: config})
				must(t, err)
				defer r.Close()
				if err := r.Review(t.Context(), raw, verified); err == nil || !strings.Contains(err.Error(), names) {
					t.Errorf("%v; want %q in it", err, names)
				}
				return
			case "get":
				p, _ := follow(t, pods.Config{API: config})
				within(t, 20*time.Second, "reading the cluster", p.Ready)
				must(t, p.Check(t.Context(), verified))
				must(t, unknown(p.Check(t.Context(), missing[without.resource]), names))
				return
			}
			p, _ := follow(t, pods.Config{API: config})
			within(t, 20*time.Second, "saying what is missing", func() error {
				if err := p.Degraded(); err == nil || !strings.Contains(err.Error(), names) {
					return errors.Join(errors.New("not named"), err)
				}
				return nil
			})
			if without.verb == "list" {
				if err := p.Ready(); err == nil {
					t.Error("it is ready without having read the cluster")
				}
			}
		})
	}
}

// ghosts makes pods without one of what they need, by resource, and returns claims of
// their tokens. Whoever begins to follow the cluster afterwards has never heard of
// what is gone, and has to ask.
func ghosts(t *testing.T, c *kubetest.Cluster) map[string]*token.Claims {
	t.Helper()
	claims := make(map[string]*token.Claims)
	for resource, path := range map[string]string{
		"pods":            "/api/v1/namespaces/no-pods/pods/cart-0?gracePeriodSeconds=0",
		"nodes":           "/api/v1/nodes/node-of-no-nodes",
		"serviceaccounts": "/api/v1/namespaces/no-serviceaccounts/serviceaccounts/cart",
		"namespaces":      "/api/v1/namespaces/no-namespaces",
	} {
		claims[resource] = newWorkload(t, c, "no-"+resource).claims(t, c)
		must(t, c.Delete(t.Context(), path))
	}
	// What the namespace controller does when a namespace is empty; this one is not.
	must(t, c.Update(t.Context(), "/api/v1/namespaces/no-namespaces/finalize", map[string]any{
		"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": "no-namespaces"}, "spec": map[string]any{"finalizers": []string{}},
	}))
	return claims
}

// The API server's own judgement, of its own tokens.
func TestF27_TokenReview(t *testing.T) {
	c := cluster.Get(t)
	config, _ := identify(t, c, "review", []grant{{"authentication.k8s.io", "tokenreviews", "create"}})
	r, err := review.New(review.Config{API: config})
	must(t, err)
	t.Cleanup(r.Close)
	v, err := token.New(token.Config{Issuers: []token.Issuer{{
		URL: kubetest.Issuer, Review: r, Audiences: map[string]time.Duration{"meshca": time.Hour}, RequirePod: true,
	}}})
	must(t, err)
	w := newWorkload(t, c, "review")
	raw := w.rawToken(t, c)
	claims, err := v.Verify(t.Context(), raw)
	must(t, err)
	if _, uid := claims.Pod(); uid != w.podUID {
		t.Errorf("claims of pod %s", uid)
	}
	var invalid *token.InvalidError
	// The same claims under another signature: the API server knows its own.
	forged := raw[:strings.LastIndex(raw, ".")+1] + strings.Repeat("A", len(raw)-strings.LastIndex(raw, ".")-1)
	if _, err := v.Verify(t.Context(), forged); !errors.As(err, &invalid) || !strings.Contains(err.Error(), "the API server does not take it") {
		t.Errorf("a forged token: %v", err)
	}
	must(t, c.DeletePod(t.Context(), w.namespace, w.pod))
	within(t, 20*time.Second, "refusing the token of a deleted pod", func() error {
		if _, err := v.Verify(t.Context(), raw); !errors.As(err, &invalid) {
			return errors.Join(errors.New("not yet"), err)
		}
		return nil
	})
}
