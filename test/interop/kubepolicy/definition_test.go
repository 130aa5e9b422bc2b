package kubepolicy

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshca/meshca/ca/kube/policies"
	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/policy"
)

const definitionsPath = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"

func (w *world) definition(t *testing.T) *unstructured.Unstructured {
	t.Helper()
	d, err := w.admin.Resource(definition.Resource).Get(t.Context(), definition.Name, meta.GetOptions{})
	must(t, err)
	return d
}

// updateDefinition changes the definition; the API server itself changes its status
// at any time.
func (w *world) updateDefinition(t *testing.T, change func(*unstructured.Unstructured)) {
	t.Helper()
	until(t, "the definition is changed", func() bool {
		d := w.definition(t)
		change(d)
		_, err := w.admin.Resource(definition.Resource).Update(t.Context(), d, meta.UpdateOptions{})
		return err == nil
	})
}

func (w *world) keeper(t *testing.T) *definition.Keeper {
	t.Helper()
	k, err := definition.NewKeeper(w.admin, slog.New(slog.DiscardHandler))
	must(t, err)
	return k
}

func (w *world) ensure(t *testing.T, want definition.Outcome) {
	t.Helper()
	got, err := w.keeper(t).Ensure(t.Context())
	must(t, err)
	if got != want {
		t.Errorf("the definition was %s, want %s", got, want)
	}
}

// istios is Istio's own definition, unchanged.
func istios(t *testing.T) []byte {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api").Output()
	must(t, err)
	all, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "kubernetes", "customresourcedefinitions.gen.yaml"))
	must(t, err)
	for d := range bytes.SplitSeq(all, []byte("\n---\n")) {
		if bytes.Contains(d, []byte("\n  name: "+definition.Name+"\n")) {
			return d
		}
	}
	t.Fatal("Istio does not define PeerAuthentication")
	return nil
}

// Without a definition nothing is known; once the leader has made one, and policies
// can be listed, they are. Both versions of the API say the same.
func TestT10_DefinitionIsMadeWhereThereIsNone(t *testing.T) {
	w := newWorld(t, "absent")
	r := w.replica(t, w.asAdmin())
	r.awaits(w.id(t), "", "not known", says(policy.Strict, policy.LevelClosed))
	r.logsSoon("the API server has no PeerAuthentication")
	background(t, w.keeper(t).Run)
	r.awaits(w.id(t), "", "known, and without policy", says(policy.Permissive, policy.LevelDefault))
	w.apply(t, "default", `{"mtls": {"mode": "STRICT"}}`)
	r.awaits(w.id(t), "", "STRICT", says(policy.Strict, policy.LevelNamespace))
	o, err := w.admin.Resource(policies.Resource("v1beta1")).Namespace(w.namespace).Get(t.Context(), "default", meta.GetOptions{})
	must(t, err)
	if mode, _, _ := unstructured.NestedString(o.Object, "spec", "mtls", "mode"); mode != "STRICT" {
		t.Errorf("v1beta1 says %q", mode)
	}
}

// A definition of somebody else is left as it is; one of ours is replaced by a newer
// meshca, and left alone by an older one and by one of the same age.
func TestDefinitionOfOthersIsLeftAlone(t *testing.T) {
	w := newWorld(t, "foreign")
	same := func(before *unstructured.Unstructured) {
		t.Helper()
		after := w.definition(t)
		if !reflect.DeepEqual(before.Object["spec"], after.Object["spec"]) || !reflect.DeepEqual(before.GetLabels(), after.GetLabels()) {
			t.Errorf("the definition was changed")
		}
	}
	must(t, w.CreateYAML(t.Context(), definitionsPath, istios(t)))
	d := w.definition(t)
	w.ensure(t, definition.Foreign)
	same(d)
	w.undefine(t)

	w.ensure(t, definition.Made)
	w.ensure(t, definition.Kept)
	schema := func(number string) {
		w.updateDefinition(t, func(d *unstructured.Unstructured) {
			notes := d.GetAnnotations()
			notes["meshca.dev/definition-schema"], notes["example.org/note"] = number, "stays"
			d.SetAnnotations(notes)
			must(t, unstructured.SetNestedStringSlice(d.Object, []string{"pa", "peerauth"}, "spec", "names", "shortNames"))
		})
	}
	schema("0")
	w.ensure(t, definition.Replaced)
	d = w.definition(t)
	if names, _, _ := unstructured.NestedStringSlice(d.Object, "spec", "names", "shortNames"); len(names) != 1 || d.GetAnnotations()["example.org/note"] != "stays" {
		t.Errorf("short names %q, annotations %v", names, d.GetAnnotations())
	}
	schema("999")
	d = w.definition(t)
	w.ensure(t, definition.Kept)
	same(d)
	w.updateDefinition(t, func(d *unstructured.Unstructured) {
		labels := d.GetLabels()
		labels["istio"] = "security" // Istio has taken it over
		d.SetLabels(labels)
		notes := d.GetAnnotations()
		notes["meshca.dev/definition-schema"] = "0"
		d.SetAnnotations(notes)
	})
	d = w.definition(t)
	w.ensure(t, definition.Foreign)
	same(d)
}

func TestDefinitionIsMadeByOneOfMany(t *testing.T) {
	w := newWorld(t, "race")
	k := w.keeper(t)
	outcomes := make([]definition.Outcome, 16)
	var all sync.WaitGroup
	for i := range outcomes {
		all.Go(func() {
			var err error
			if outcomes[i], err = k.Ensure(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	made := 0
	for _, o := range outcomes {
		if o == definition.Made {
			made++
		} else if o != definition.Kept {
			t.Errorf("outcome %s", o)
		}
	}
	if made != 1 {
		t.Errorf("%d have made the definition", made)
	}
}

// With a definition that is deleted the API server deletes all policies. What was in
// force stays, with whoever knew it; a replica that starts then knows no policies,
// until they are there again or somebody says that they are meant to be gone.
func TestT10_PoliciesOutliveTheirDefinition(t *testing.T) {
	w := newWorld(t, "outlive")
	w.define(t)
	w.apply(t, "default", `{"mtls": {"mode": "STRICT"}}`)
	w.apply(t, "cart", `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}}`)
	r := w.replica(t, w.asAdmin())
	cart := w.pod(t, "cart", map[string]string{"app": "cart"})
	r.awaits(w.id(t), cart, "DISABLE", says(policy.Disable, policy.LevelWorkload))
	background(t, r.Remember)
	until(t, "it is remembered that there are two policies", func() bool { return strings.Contains(w.remembered(t), `"policies":2`) })

	w.undefine(t)
	r.logsSoon("and the policies with it")
	kept := func(when string) {
		t.Helper()
		for pod, want := range map[string]policy.Mode{cart: policy.Disable, "": policy.Strict} {
			if p, _ := r.Policy(w.id(t), pod); p == nil || p.Version == 0 || p.Mode != want {
				t.Errorf("%s, pod %q: %s", when, pod, show(p))
			}
		}
	}
	kept("without a definition")
	w.define(t)
	r.logsSoon("was replaced, and of 2 policies there are 0")
	kept("with another definition")
	fresh := w.replica(t, w.asAdmin())
	fresh.awaits(w.id(t), cart, "not known", says(policy.Strict, policy.LevelClosed))
	fresh.logsSoon("was replaced, and of 2 policies there are 0")

	// All are there again.
	w.apply(t, "default", `{"mtls": {"mode": "PERMISSIVE"}}`)
	r.logsSoon("of 2 policies there are 1")
	kept("with one policy of two")
	w.apply(t, "cart", `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "STRICT"}}`)
	for _, r := range []*replica{r, fresh} {
		r.awaits(w.id(t), cart, "STRICT", says(policy.Strict, policy.LevelWorkload))
	}
	// Deleted by hand, one counts at once.
	w.delete(t, "cart")
	for _, r := range []*replica{r, fresh} {
		r.awaits(w.id(t), cart, "PERMISSIVE", says(policy.Permissive, policy.LevelNamespace))
	}
	until(t, "it is remembered that there is one policy", func() bool { return strings.Contains(w.remembered(t), `"policies":1`) })

	// They are meant to be gone.
	w.apply(t, "default", `{"mtls": {"mode": "STRICT"}}`)
	r.awaits(w.id(t), cart, "STRICT", says(policy.Strict, policy.LevelNamespace))
	w.undefine(t)
	w.define(t)
	r.logsSoon("of 1 policies there are 0")
	accept := func(uid string) {
		w.updateDefinition(t, func(d *unstructured.Unstructured) {
			notes := d.GetAnnotations()
			notes[policies.AcceptAnnotation] = uid
			d.SetAnnotations(notes)
		})
	}
	accept("true") // not for this one
	if p, _ := r.Policy(w.id(t), cart); p.Mode != policy.Strict {
		t.Errorf("%s", show(p))
	}
	accept(string(w.definition(t).GetUID()))
	r.awaits(w.id(t), cart, "without policy", says(policy.Permissive, policy.LevelDefault))
}

func (w *world) remembered(t *testing.T) string {
	t.Helper()
	o, err := w.admin.Resource(configMaps).Namespace(root).Get(t.Context(), policies.RecordName, meta.GetOptions{})
	if err != nil {
		return ""
	}
	record, _, _ := unstructured.NestedString(o.Object, "data", "record")
	return record
}

// An object that another definition let in, and that we cannot read whole, is STRICT
// for what it selects; a mode that is new to us is STRICT as well.
func TestT10_V22_WhatIsNotUnderstoodIsStrict(t *testing.T) {
	w := newWorld(t, "loose")
	w.define(t)
	w.updateDefinition(t, func(d *unstructured.Unstructured) {
		versions, _, _ := unstructured.NestedSlice(d.Object, "spec", "versions")
		for _, v := range versions {
			v.(map[string]any)["schema"] = map[string]any{"openAPIV3Schema": map[string]any{"type": "object", "x-kubernetes-preserve-unknown-fields": true}}
		}
		must(t, unstructured.SetNestedSlice(d.Object, versions, "spec", "versions"))
	})
	until(t, "the API server takes anything", func() bool {
		_, err := w.policies().Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": map[string]any{"name": "default"},
			"spec": map[string]any{"mtls": map[string]any{"mode": "MUTUAL_OR_ELSE"}},
		}}, meta.CreateOptions{FieldManager: "test"})
		return err == nil
	})
	r := w.replica(t, w.asAdmin())
	cart := w.pod(t, "cart", map[string]string{"app": "cart"})
	r.awaits(w.id(t), cart, "STRICT", says(policy.Strict, policy.LevelNamespace))
	for name, spec := range map[string]string{
		"a newer field":    `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}, "targetRefs": [{"name": "x"}]}`,
		"a mode that is 3": `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": 3}}`,
		"no object":        `"DISABLE"`,
	} {
		w.apply(t, "default", `{"mtls": {"mode": "DISABLE"}}`)
		r.awaits(w.id(t), cart, "DISABLE", says(policy.Disable, policy.LevelNamespace))
		w.apply(t, "cart", spec)
		if name == "no object" {
			w.delete(t, "default")
		}
		r.awaits(w.id(t), cart, name+": STRICT", func(p *policy.Resolved) bool { return p.Mode == policy.Strict && p.ForPort(8080) == policy.Strict })
		w.delete(t, "cart")
	}
}

// Our definition takes and refuses what Istio's does, whatever is said of it, and
// drops the same fields.
func TestDefinitionJudgesAsIstios(t *testing.T) {
	w := newWorld(t, "judges")
	selected := func(rest string) string { return `{"selector": {"matchLabels": {"app": "a"}}, ` + rest + `}` }
	port := func(key string) string {
		return selected(fmt.Sprintf(`"portLevelMtls": {%q: {"mode": "DISABLE"}}`, key))
	}
	label := func(key, value string) string {
		return fmt.Sprintf(`{"selector": {"matchLabels": {%q: %q}}}`, key, value)
	}
	many := make([]string, 4097)
	for i := range many {
		many[i] = fmt.Sprintf(`"l%d": "a"`, i)
	}
	specs := []string{
		`{}`, `null`, `"x"`, `[]`, `{"extra": 1}`, `{"mtls": {}}`, `{"mtls": null}`, `{"mtls": "STRICT"}`, `{"mtls": {"extra": 1}}`, `{"mtls": {"mode": null}}`,
		`{"mtls": {"mode": "UNSET"}}`, `{"mtls": {"mode": "STRICT"}}`, `{"mtls": {"mode": "strict"}}`, `{"mtls": {"mode": "BLAH"}}`, `{"mtls": {"mode": ""}}`, `{"mtls": {"mode": 3}}`,
		`{"selector": null}`, `{"selector": {}}`, `{"selector": {"matchLabels": {}}}`, `{"selector": {"matchLabels": null}}`, `{"selector": {"extra": 1}}`, `{"selector": []}`,
		label("app", "a"), label("app", ""), label("", "a"), label("app", "a*"), label("a*", "a"), label("app", strings.Repeat("ä", 63)), label("app", strings.Repeat("a", 64)),
		`{"selector": {"matchLabels": {"app": 1}}}`, `{"selector": {"matchLabels": {"app": null}}}`,
		`{"selector": {"matchLabels": {` + strings.Join(many, ", ") + `}}}`, `{"selector": {"matchLabels": {` + strings.Join(many[1:], ", ") + `}}}`,
		`{"portLevelMtls": {"80": {}}}`, `{"portLevelMtls": {}}`, `{"selector": {}, "portLevelMtls": {"80": {}}}`, `{"selector": {"matchLabels": {}}, "portLevelMtls": {"80": {}}}`,
		`{"selector": {"matchLabels": {"app": null}}, "portLevelMtls": {"80": {}}}`, selected(`"portLevelMtls": {}`), selected(`"portLevelMtls": null`), selected(`"portLevelMtls": {"80": null}`),
		selected(`"portLevelMtls": {"80": {"mode": "NEW"}}`), selected(`"portLevelMtls": {"80": {"extra": 1}}`),
		port("80"), port("0"), port("1"), port("65535"), port("65536"), port("42949672"), port("-1"), port("acd"), port("http"), port(""), port(" 80"), port("08080"), port("0x50"), port("1e3"), port("1_000"), port("99999999999999999999"),
	}
	verdicts := func() (all []string) {
		w.served(t)
		for _, version := range []string{"v1", "v1beta1"} {
			for i, spec := range specs {
				object := fmt.Sprintf(`{"apiVersion": "security.istio.io/%s", "kind": "PeerAuthentication", "metadata": {"name": "x"}, "spec": %s}`, version, spec)
				path := "/apis/security.istio.io/" + version + "/namespaces/" + w.namespace + "/peerauthentications?fieldValidation=Ignore&dryRun=All"
				err := w.CreateYAML(t.Context(), path, []byte(object))
				all = append(all, fmt.Sprintf("%d %s %.80s: %v", i, version, spec, err == nil))
			}
		}
		return all
	}
	must(t, w.CreateYAML(t.Context(), definitionsPath, istios(t)))
	want := verdicts()
	w.undefine(t)
	w.define(t)
	got := verdicts()
	taken := 0
	for i := range want {
		if strings.HasSuffix(want[i], "true") {
			taken++
		}
		if got[i] != want[i] {
			t.Errorf("Istio's: %s\nours: %s", want[i], got[i])
		}
	}
	if taken == 0 || taken == len(want) {
		t.Errorf("Istio's takes %d of %d: nothing was tried", taken, len(want))
	}
}
