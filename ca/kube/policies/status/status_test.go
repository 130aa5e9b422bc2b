package status

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/kube/policies"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

func object(namespace, name string, age int, mode policy.Mode, app string) policies.Object {
	o := policies.Object{UID: namespace + "/" + name, Generation: 3}
	o.Ref, o.Created, o.Mode = policy.Ref{Namespace: namespace, Name: name}, time.Unix(int64(1000-age), 0), mode
	if app != "" {
		o.Selector = map[string]string{"app": app}
	}
	return o
}

// Each policy has one verdict, whose reason is the gravest of what was found, and
// whose message has all of it.
func TestVerdicts(t *testing.T) {
	odd := object("shop", "odd", 1, policy.Unknown, "odd")
	odd.Problems = []manifest.Problem{{Code: "PV1", Verdict: manifest.Newer, Text: "a mode that is new"}}
	late := object("shop", "late", 1, policy.Disable, "cart")
	late.Problems = []manifest.Problem{{Code: "PA6", Verdict: manifest.Warned, Text: "a port with a zero"}}
	objects := []policies.Object{
		object("meshca-system", "default", 1, policy.Strict, ""),
		object("meshca-system", "chooses", 1, policy.Strict, "cart"),
		object("shop", "old", 9, policy.Strict, ""),
		object("shop", "new", 1, policy.Disable, ""),
		object("shop", "cart", 9, policy.Strict, "cart"),
		object("shop", "nobody", 1, policy.Strict, "nobody"),
		late, odd,
	}
	pods := []manifest.Pod{{Namespace: "shop", Name: "cart-0", Labels: map[string]string{"app": "cart"}}, {Namespace: "shop", Name: "odd-0", Labels: map[string]string{"app": "odd"}}}
	got := judge(objects, pods, "meshca-system")
	for name, want := range map[string]string{
		"meshca-system/default": "InForce: the policy does what it says",
		"meshca-system/chooses": "SelectorInRootNamespace: PL1: ",
		"shop/old":              "InForce: ",
		"shop/new":              "OlderPolicyForTheSame: PL2: ",
		"shop/cart":             "InForce: ",
		"shop/nobody":           "SelectsNoPod: PL6: ",
		"shop/late":             "OlderPolicyWins: PA6: a port with a zero; PL3: ",
		"shop/odd":              "NotUnderstood: PV1: a mode that is new",
	} {
		namespace, n, _ := strings.Cut(name, "/")
		v := got[policy.Ref{Namespace: namespace, Name: n}]
		if s := v.reason + ": " + v.message; !strings.HasPrefix(s, want) || v.effective != (v.reason == inForce) {
			t.Errorf("%s: %v %s, want %s", name, v.effective, s, want)
		}
	}
	if v := judge(objects[5:6], nil, "meshca-system")[policy.Ref{Namespace: "shop", Name: "nobody"}]; !v.effective {
		t.Errorf("without pods: %+v", v)
	}
}

func TestMessagesAreBounded(t *testing.T) {
	for _, part := range []string{"x", "ä", "漢"} {
		if got := cut(strings.Repeat(part, 2000)); len(got) > maxMessage || len(got) < maxMessage-8 || strings.Contains(got, "\ufffd") {
			t.Errorf("%d bytes, ends %q", len(got), got[len(got)-8:])
		}
	}
}

// A condition is written only if it says something else, the conditions of others
// stay, and the time of transition is that of the last one.
func TestConditions(t *testing.T) {
	at := time.Unix(1_800_000_000, 0)
	o := object("shop", "cart", 1, policy.Strict, "cart")
	o.Conditions = []any{map[string]any{"type": "other", "status": "Odd"}, "no object"}
	bad, good := verdict{false, "SelectsNoPod", "PL6: none"}, verdict{true, inForce, "fine"}
	var changed bool
	step := func(v verdict, generation int64, later time.Duration, want bool, transition time.Duration) {
		t.Helper()
		o.Generation = generation
		before := fmt.Sprint(o.Conditions)
		o.Conditions, changed = withCondition(o, v, at.Add(later))
		if changed != want || changed == (fmt.Sprint(o.Conditions) == before) {
			t.Errorf("%+v after %v: changed %v", v, later, changed)
		}
		c, _ := find(o.Conditions)
		if got, _ := heldBy(o); got != v || c["lastTransitionTime"] != at.Add(transition).UTC().Format(time.RFC3339) || len(o.Conditions) != 3 {
			t.Errorf("%+v after %v: %v", v, later, o.Conditions)
		}
	}
	step(bad, 1, 0, true, 0)
	step(bad, 1, time.Hour, false, 0)
	step(bad, 2, time.Hour, true, 0)
	step(verdict{false, "SelectsNoPod", "PL6: none at all"}, 2, 2*time.Hour, true, 0)
	step(good, 2, 3*time.Hour, true, 3*time.Hour)
	step(good, 2, 4*time.Hour, false, 3*time.Hour)
}
