package pods

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca/kube/apitest"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// What a token says is held against what the API server says of the pod.
func TestT2_V39_V59_F30_F31_WhatATokenSaysMustBeSo(t *testing.T) {
	other := "99999999-0000-4000-8000-000000000009"
	tests := map[string]struct {
		change func(*rig)
		claims func(*tokenissuer.Claims)
		reason string // empty: it lives
	}{
		"all as it was":           {},
		"another service account": {claims: func(c *tokenissuer.Claims) { c.ServiceAccount = "other" }, reason: `runs under service account "cart"`},
		"another node": {
			change: func(r *rig) { r.api.Put("nodes", apitest.Named("", "node-2", other)) },
			claims: func(c *tokenissuer.Claims) { c.NodeName, c.NodeUID = "node-2", other }, reason: `is on node "node-1"`,
		},
		"another name":                          {claims: func(c *tokenissuer.Claims) { c.PodName = "cart-1" }, reason: `is "shop/cart-0" in truth`},
		"another namespace":                     {claims: func(c *tokenissuer.Claims) { c.Namespace = "bank" }, reason: `is "shop/cart-0" in truth`},
		"no such pod":                           {claims: func(c *tokenissuer.Claims) { c.PodName, c.PodUID = "cart-9", other }, reason: "does not exist any more"},
		"another pod of that name":              {claims: func(c *tokenissuer.Claims) { c.PodUID = other }, reason: "has UID " + cartUID + " now"},
		"it has succeeded":                      {change: func(r *rig) { r.api.Put("pods", cart().InPhase("Succeeded")) }, reason: "it has finished"},
		"it has failed":                         {change: func(r *rig) { r.api.Put("pods", cart().InPhase("Failed")) }, reason: "it has finished"},
		"it has not started":                    {change: func(r *rig) { r.api.Put("pods", cart().InPhase("Pending")) }},
		"it drains":                             {change: func(r *rig) { r.api.Put("pods", cart().Deleting(time.Now().Add(-59*time.Second))) }},
		"it should have been gone":              {change: func(r *rig) { r.api.Put("pods", cart().Deleting(time.Now().Add(-61*time.Second))) }, reason: "should have been gone"},
		"its node is gone":                      {change: func(r *rig) { r.api.Delete("nodes", "", "node-1") }, reason: `nodes "node-1" with UID ` + nodeUID + " does not exist"},
		"its node is another of that name":      {change: func(r *rig) { r.api.Put("nodes", apitest.Named("", "node-1", other)) }, reason: "has UID " + other + " now"},
		"its account is gone":                   {change: func(r *rig) { r.api.Delete("serviceaccounts", "shop", "cart") }, reason: `serviceaccounts "shop/cart"`},
		"its account is another of that name":   {change: func(r *rig) { r.api.Put("serviceaccounts", apitest.Named("shop", "cart", other)) }, reason: "has UID " + other + " now"},
		"a node says something of the pod else": {change: func(r *rig) { r.api.Put("pods", apitest.Pod("shop", "cart-0", cartUID, "cart", "node-9")) }, reason: `is on node "node-9"`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				r.run()
				r.alive("at first")
				if tt.change != nil {
					tt.change(r)
					synctest.Wait()
				}
				err := r.check(tt.claims)
				if tt.reason == "" {
					r.must(err)
					return
				}
				r.refused(name, err, tt.reason)
			})
		})
	}
}

// A pod has its identity until it should be gone, however long it drains: with a
// grace of 10 min and certificates of 5 min it renews several times.
func TestT2_DrainingPodRenews(t *testing.T) {
	bubble(t, func(r *rig) {
		r.run()
		r.api.Put("pods", cart().Deleting(time.Now().Add(10*time.Minute)))
		for i := range 11 {
			r.alive("draining for " + (time.Duration(i) * time.Minute).String())
			if _, _, ok := r.pods.Live(cartUID, "node-1"); !ok {
				t.Errorf("after %d min it is not shown as alive", i)
			}
			r.pass(time.Minute)
		}
		r.pass(time.Second)
		r.refused("a minute after its end", r.check(nil), "should have been gone")
		if _, _, ok := r.pods.Live(cartUID, "node-1"); ok {
			t.Error("a minute after its end it is shown as alive")
		}
	})
}

// A name says nothing: the token of the pod that had it before is refused at once,
// without asking the API server.
func TestF30_RecreatedUnderItsName(t *testing.T) {
	bubble(t, func(r *rig) {
		r.run()
		r.api.Delete("pods", "shop", "cart-0")
		const next = "11111111-0000-4000-8000-000000000001"
		r.api.Put("pods", apitest.Pod("shop", "cart-0", next, "cart", "node-1"))
		synctest.Wait()
		r.refused("the old pod", r.check(nil), "does not exist any more")
		r.must(r.check(func(c *tokenissuer.Claims) { c.PodUID = next }))
		if n := r.api.Requests("get pods"); n != 0 {
			t.Errorf("%d lookups", n)
		}
	})
}

// In a namespace that goes nothing new begins, and what drains renews.
func TestF31_NamespaceTerminating(t *testing.T) {
	bubble(t, func(r *rig) {
		r.run()
		r.api.Put("namespaces", apitest.Named("", "shop", "ns-1").Deleting(time.Now()))
		synctest.Wait()
		r.refused("not deleted yet", r.check(nil), `namespace "shop" is being terminated`)
		r.api.Put("pods", cart().Deleting(time.Now().Add(10*time.Minute)))
		r.pass(5 * time.Minute)
		r.alive("draining")
		r.api.Delete("namespaces", "", "shop")
		synctest.Wait()
		r.refused("no namespace", r.check(nil), `namespace "shop" does not exist`)
	})
}
