package kubepolicy

import (
	"testing"
	"time"

	"github.com/meshca/meshca/policy"
)

// What is written to the API server holds within a second, for whom it concerns;
// every change has a higher version for everybody.
func TestT10_V22_ChangesHoldWithinASecond(t *testing.T) {
	w := newWorld(t, "follow")
	w.define(t)
	cart := w.pod(t, "cart", map[string]string{"app": "cart"})
	r := w.replica(t, w.asAdmin())
	id := w.id(t)
	last := r.awaits(id, cart, "known, and without policy", says(policy.Permissive, policy.LevelDefault))
	step := func(what string, change func(), is func(*policy.Resolved) bool) {
		t.Helper()
		began := time.Now()
		change()
		next := r.awaits(id, cart, what, is)
		if took := time.Since(began); took > time.Second {
			t.Errorf("%s: after %v", what, took)
		}
		if newer, err := next.Succeeds(last); !newer || err != nil {
			t.Errorf("%s: %s does not follow %s (%v)", what, show(next), show(last), err)
		}
		last = next
	}
	step("STRICT for the namespace", func() { w.apply(t, "default", `{"mtls": {"mode": "STRICT"}}`) }, says(policy.Strict, policy.LevelNamespace))
	step("DISABLE for the app", func() {
		w.apply(t, "cart", `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}, "portLevelMtls": {"8080": {"mode": "PERMISSIVE"}}}`)
	}, says(policy.Disable, policy.LevelWorkload))
	if last.ForPort(8080) != policy.Permissive {
		t.Errorf("port 8080: %v", last.ForPort(8080))
	}
	step("another label", func() { w.label(t, "cart", map[string]string{"app": "pay"}) }, says(policy.Strict, policy.LevelNamespace))
	step("the first label again", func() { w.label(t, "cart", map[string]string{"app": "cart"}) }, says(policy.Disable, policy.LevelWorkload))
	step("the app's policy has another mode", func() {
		w.apply(t, "cart", `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "STRICT"}}`)
	}, says(policy.Strict, policy.LevelWorkload))
	step("the app's policy deleted", func() { w.delete(t, "cart") }, says(policy.Strict, policy.LevelNamespace))
	step("the namespace's policy deleted", func() { w.delete(t, "default") }, says(policy.Permissive, policy.LevelDefault))
	step("a policy of the mesh", func() { w.applyIn(t, root, "default", `{"mtls": {"mode": "STRICT"}}`) }, says(policy.Strict, policy.LevelMesh))
}

// A pod that has not been heard of may be one that a policy selects.
func TestT10_UnknownPodIsStrictWhereLabelsCount(t *testing.T) {
	w := newWorld(t, "unknown")
	w.define(t)
	r := w.replica(t, w.asAdmin())
	const nobody = "00000000-0000-4000-8000-000000000000"
	r.awaits(w.id(t), nobody, "known", says(policy.Permissive, policy.LevelDefault))
	w.apply(t, "cart", `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}}`)
	p := r.awaits(w.id(t), nobody, "closed", says(policy.Strict, policy.LevelClosed))
	if p.Version == 0 || p.WorkloadVersion != 0 {
		t.Errorf("%s", show(p))
	}
	// Of a pod that is there, but in another namespace than its identity is, the same.
	other := w.pod(t, "cart", map[string]string{"app": "cart"})
	w.namespace = "another"
	must(t, w.CreateNamespace(t.Context(), w.namespace))
	w.apply(t, "cart", `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}}`)
	r.awaits(w.id(t), other, "closed", says(policy.Strict, policy.LevelClosed))
}
