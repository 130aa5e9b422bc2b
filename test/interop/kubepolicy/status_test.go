package kubepolicy

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/events"
	"github.com/meshca/meshca/ca/kube/policies/status"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

// events starts a writer of events.
func (w *world) events(t *testing.T, conf *rest.Config, log *lines) *events.Writer {
	t.Helper()
	e, err := events.New(events.Config{Client: client(t, conf), Instance: "meshca-0", Now: time.Now, Log: textLog(log), Metrics: prometheus.NewRegistry()})
	must(t, err)
	background(t, e.Run)
	return e
}

// tells starts a writer of conditions and events, for what the replica knows.
func (w *world) tells(t *testing.T, r *replica, conf *rest.Config, pods func() []manifest.Pod) (end func()) {
	t.Helper()
	s, err := status.New(status.Config{
		Client: client(t, conf), Policies: r, Pods: pods, Events: w.events(t, conf, r.log),
		RootNamespace: root, Now: time.Now, Log: r.logs,
	})
	must(t, err)
	return background(t, s.Run)
}

// condition is our condition of a policy, as "status reason: message"; "" if it
// has none.
func (w *world) condition(t *testing.T, name string) string {
	t.Helper()
	o, err := w.policies().Get(t.Context(), name, meta.GetOptions{})
	must(t, err)
	conditions, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, c := range conditions {
		if c := c.(map[string]any); c["type"] == status.ConditionType {
			if fmt.Sprint(c["observedGeneration"]) != fmt.Sprint(o.GetGeneration()) {
				return "of an older generation"
			}
			return fmt.Sprintf("%s %s: %s", c["status"], c["reason"], c["message"])
		}
	}
	return ""
}

func (w *world) conditionSoon(t *testing.T, name, prefix, text string) {
	t.Helper()
	last := ""
	defer func() {
		if t.Failed() {
			t.Logf("policy %s: %s", name, last)
		}
	}()
	until(t, fmt.Sprintf("policy %s is %s, %q", name, prefix, text), func() bool {
		last = w.condition(t, name)
		return strings.HasPrefix(last, prefix+": ") && strings.Contains(last, text)
	})
}

// eventsAbout are the events about an object, as "type reason ×count: note".
func (w *world) eventsAbout(t *testing.T, uid string) []string {
	t.Helper()
	list, err := w.admin.Resource(eventResource).Namespace(w.namespace).List(t.Context(), meta.ListOptions{})
	must(t, err)
	var all []string
	for _, e := range list.Items {
		if about, _, _ := unstructured.NestedString(e.Object, "regarding", "uid"); about != uid {
			continue
		}
		count, found, _ := unstructured.NestedInt64(e.Object, "series", "count")
		if !found {
			count = 1
		}
		all = append(all, fmt.Sprintf("%s %s ×%d: %s", e.Object["type"], e.Object["reason"], count, e.Object["note"]))
	}
	return all
}

func (w *world) eventSoon(t *testing.T, uid, prefix, text string) {
	t.Helper()
	until(t, fmt.Sprintf("there is an event %s, %q", prefix, text), func() bool {
		for _, e := range w.eventsAbout(t, uid) {
			if strings.HasPrefix(e, prefix) && strings.Contains(e, text) {
				return true
			}
		}
		return false
	})
}

// What is ineffective says so, and why, on the object and by an event; and no more
// once it is effective. A condition that is written changes nothing for proxies.
func TestConditionsSayWhatIsIneffective(t *testing.T) {
	w := newWorld(t, "conditions")
	w.define(t)
	r := w.replica(t, w.asAdmin())
	pay := w.pod(t, "pay", map[string]string{"app": "pay"})
	r.awaits(w.id(t), pay, "known", says(policy.Permissive, policy.LevelDefault))
	pods := func() []manifest.Pod {
		return []manifest.Pod{{Namespace: w.namespace, Name: "cart-0", Labels: map[string]string{"app": "cart", "v": "1"}}}
	}
	w.tells(t, r, w.asAdmin(), pods)
	w.apply(t, "first", `{"mtls": {"mode": "STRICT"}}`)
	w.conditionSoon(t, "first", "True InForce", "does what it says")
	// The creation order decides, and it counts in seconds.
	first, err := w.policies().Get(t.Context(), "first", meta.GetOptions{})
	must(t, err)
	until(t, "a second has passed", func() bool { return time.Since(first.GetCreationTimestamp().Time) > time.Second })
	second := w.apply(t, "second", `{"mtls": {"mode": "DISABLE"}}`)
	w.conditionSoon(t, "second", "False OlderPolicyForTheSame", "PL2: it is not the only policy for namespace")
	w.conditionSoon(t, "second", "False OlderPolicyForTheSame", "conditions/first is older")
	w.eventSoon(t, string(second.GetUID()), "Warning OlderPolicyForTheSame", "conditions/first is older")
	w.apply(t, "nobody", `{"selector": {"matchLabels": {"app": "nobody"}}, "mtls": {"mode": "DISABLE"}}`)
	w.conditionSoon(t, "nobody", "False SelectsNoPod", "PL6: ")
	w.apply(t, "cart", `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}}`)
	w.conditionSoon(t, "cart", "True InForce", "")

	// The second one takes the first's place, and its owner is told.
	before, changed := r.Policy(w.id(t), pay)
	w.delete(t, "first")
	w.conditionSoon(t, "second", "True InForce", "")
	w.eventSoon(t, string(second.GetUID()), "Normal InForce", "does what it says")
	<-changed
	after := r.awaits(w.id(t), pay, "DISABLE", says(policy.Disable, policy.LevelNamespace))
	if after.Version <= before.Version {
		t.Errorf("%s after %s", show(after), show(before))
	}

	// A condition of somebody else stays, and so does the time of the last transition
	// where there is none.
	_, changed = r.Policy(w.id(t), pay)
	_, err = w.policies().Patch(t.Context(), "second", types.JSONPatchType,
		[]byte(`[{"op": "add", "path": "/status/conditions/0", "value": {"type": "example.org/Reviewed", "status": "True"}}]`), meta.PatchOptions{}, "status")
	must(t, err)
	o, err := w.policies().Get(t.Context(), "second", meta.GetOptions{})
	must(t, err)
	w.apply(t, "unrelated", `{"selector": {"matchLabels": {"app": "x"}}}`)
	w.conditionSoon(t, "unrelated", "False SelectsNoPod", "")
	o2, err := w.policies().Get(t.Context(), "second", meta.GetOptions{})
	must(t, err)
	if o.GetResourceVersion() != o2.GetResourceVersion() {
		t.Errorf("the status was written again: %v", o2.Object["status"])
	}
	<-changed // by the unrelated policy, not by conditions
	now, changed := r.Policy(w.id(t), pay)
	w.applyStatus(t, "second")
	until(t, "the version has risen silently", func() bool {
		p, c := r.Policy(w.id(t), pay)
		if c != changed {
			t.Fatalf("a status was pushed as a change: %s, then %s", show(now), show(p))
		}
		return p.Version > now.Version
	})
}

// applyStatus changes a policy's status and nothing else.
func (w *world) applyStatus(t *testing.T, name string) {
	t.Helper()
	_, err := w.policies().Patch(t.Context(), name, types.MergePatchType, []byte(`{"status": {"note": "by another"}}`), meta.PatchOptions{}, "status")
	must(t, err)
}

// Under Istio's definition there are events, and no status of ours.
func TestConditionsAreNotForIstios(t *testing.T) {
	w := newWorld(t, "istios")
	must(t, w.CreateYAML(t.Context(), definitionsPath, istios(t)))
	w.served(t)
	r := w.replica(t, w.asAdmin())
	r.awaits(w.id(t), "", "known", says(policy.Permissive, policy.LevelDefault))
	end := w.tells(t, r, w.asAdmin(), func() []manifest.Pod { return []manifest.Pod{{Namespace: w.namespace, Name: "x"}} })
	nobody := w.apply(t, "nobody", `{"selector": {"matchLabels": {"app": "nobody"}}, "mtls": {"mode": "DISABLE"}}`)
	w.eventSoon(t, string(nobody.GetUID()), "Warning SelectsNoPod", "PL6: ")
	end()
	if c := w.condition(t, "nobody"); c != "" {
		t.Errorf("condition %s", c)
	}
}

// An event about a pod is one, however often it is said, and text of others cannot
// break it. Nobody waits for it.
func TestT14_EventsAboutPods(t *testing.T) {
	w := newWorld(t, "events")
	log := new(lines)
	e := w.events(t, w.asAdmin(), log)
	cart := w.pod(t, "cart", nil)
	reason := "its node claim \"n\x00\n\" is not its node; " + strings.Repeat("ä", 2000)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 100 {
				e.Refused(w.namespace, "cart", cart, reason)
			}
		})
	}
	all.Wait()
	w.eventSoon(t, cart, "Warning CertificateRefused", `its node claim "n\x00\n" is not its node; ää`)
	got := w.eventsAbout(t, cart)
	if len(got) != 1 {
		t.Errorf("%d events: %q", len(got), got)
	}
	_, note, _ := strings.Cut(got[0], ": ")
	if len(note) > 1024 || !strings.HasSuffix(note, "…") {
		t.Errorf("the note has %d bytes: %q", len(note), note)
	}
	// A pod whose events have no end is cut off, and others are heard.
	for i := range 100 {
		e.Refused(w.namespace, "cart", cart, fmt.Sprintf("for reason %d", i))
	}
	pay := w.pod(t, "pay", nil)
	e.Refused(w.namespace, "pay", pay, "it is not there any more")
	w.eventSoon(t, pay, "Warning CertificateRefused ×1", "meshca refuses this pod a certificate: it is not there any more; what it has stays until it ends")
	if n := len(w.eventsAbout(t, cart)); n > 11 {
		t.Errorf("one pod has %d events", n)
	}
	if s := log.String(); s != "" {
		t.Errorf("the log:\n%s", s)
	}
}
