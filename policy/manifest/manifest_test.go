package manifest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshca/meshca/policy"
)

// pa writes a PeerAuthentication around a spec.
func pa(spec string) string {
	return "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: foo}\n" + spec
}

// parseOne reads a file with one policy.
func parseOne(t *testing.T, text string) Policy {
	t.Helper()
	c, err := Parse([]byte(text), 10)
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	if len(c.Policies) != 1 {
		t.Fatalf("%d policies in\n%s", len(c.Policies), text)
	}
	return c.Policies[0]
}

// verdict checks that one problem, of this code, is what there is to say.
func verdict(t *testing.T, text, code string, want Verdict, words ...string) {
	t.Helper()
	p := parseOne(t, text)
	worst, ok := p.Worst()
	if !ok || worst.Code != code || worst.Verdict != want {
		t.Fatalf("problems %v, want %s with verdict %d in\n%s", p.Problems, code, want, text)
	}
	for _, w := range words {
		if !strings.Contains(worst.Text, w) {
			t.Errorf("%s: %q does not say %q", code, worst.Text, w)
		}
	}
}

const selector = "{selector: {matchLabels: {app: a}}, "

func TestPV1_UnknownMode(t *testing.T) {
	verdict(t, pa("spec: {mtls: {mode: BLAH}}"), "PV1", Newer, "BLAH", "counts as STRICT")
	verdict(t, pa("spec: {mtls: {mode: ''}}"), "PV1", Newer)
	verdict(t, pa("spec: "+selector+"portLevelMtls: {80: {mode: BLAH}}}"), "PV1", Newer, "portLevelMtls.80.mode")
}

func TestPV2_UnknownModeOfTheOtherVersion(t *testing.T) {
	verdict(t, strings.Replace(pa("spec: {mtls: {mode: BAD}}"), "/v1", "/v1beta1", 1), "PV2", Newer, "BAD")
}

func TestPV3_LowerCase(t *testing.T) {
	verdict(t, pa("spec: {mtls: {mode: strict}}"), "PV3", Newer, "strict")
	verdict(t, pa("spec: {mtls: {mode: Disable}}"), "PV3", Newer)
}

func TestPV4_ModeIsNoText(t *testing.T) {
	for _, mode := range []string{"3", "true", "1.5", "[STRICT]", "{a: b}", "off"} {
		verdict(t, pa("spec: {mtls: {mode: "+mode+"}}"), "PV4", Unusable, "expected a text")
	}
}

func TestPV5_PortsWithoutSelector(t *testing.T) {
	verdict(t, pa("spec: {portLevelMtls: {80: {mode: STRICT}}}"), "PV5", Rejected, "needs a selector")
}

func TestPV6_PortsWithEmptySelector(t *testing.T) {
	verdict(t, pa("spec: {selector: {}, portLevelMtls: {80: {mode: STRICT}}}"), "PV6", Rejected, "needs a selector")
	verdict(t, pa("spec: {selector: {matchLabels: {}}, portLevelMtls: {80: {mode: STRICT}}}"), "PV6", Rejected)
	verdict(t, pa("spec: {selector: {matchLabels: {app: }}, portLevelMtls: {80: {mode: STRICT}}}"), "PV6", Rejected)
}

func TestPV7_NoPorts(t *testing.T) {
	verdict(t, pa("spec: "+selector+"portLevelMtls: {}}"), "PV7", Rejected, "no entry")
	verdict(t, pa("spec: "+selector+"portLevelMtls: {80: }}"), "PV7", Rejected)
}

func portVerdict(t *testing.T, key, code string, words ...string) {
	t.Helper()
	verdict(t, pa("spec: "+selector+"portLevelMtls: {"+key+": {mode: DISABLE}}}"), code, Unusable, words...)
	if p := parseOne(t, pa("spec: "+selector+"portLevelMtls: {"+key+": {mode: DISABLE}, 80: {}}}")); len(p.Ports) != 1 {
		t.Errorf("port %s has become one of %v", key, p.Ports)
	}
}

func TestPV8_Port0(t *testing.T)     { portVerdict(t, "0", "PV8", "1 to 65535") }
func TestPV9_Port65536(t *testing.T) { portVerdict(t, "65536", "PV9", "1 to 65535") }
func TestPV10_BigPort(t *testing.T) {
	portVerdict(t, "42949672", "PV10")
	portVerdict(t, `"4294967376"`, "PV10")
}
func TestPV11_Port_1(t *testing.T) { portVerdict(t, "-1", "PV11", "1 to 65535") }
func TestPV13_NamedPort(t *testing.T) {
	portVerdict(t, "http", "PV13")
	portVerdict(t, "grpc-web", "PV13")
}

func TestPV12_PortIsNoNumber(t *testing.T) {
	for _, key := range []string{"acd", `""`, `"+80"`, `" 80"`, "80.5", "1e9999", `"0x50"`, `"8_0"`, "99999999999999999999999", "true"} {
		portVerdict(t, key, "PV12", "no number")
	}
}

func TestPV14_WildcardValue(t *testing.T) {
	verdict(t, pa("spec: {selector: {matchLabels: {app: a*}}}"), "PV14", Unusable, "a*")
}

func TestPV15_WildcardKey(t *testing.T) {
	verdict(t, pa("spec: {selector: {matchLabels: {'app*': a}}}"), "PV15", Unusable, "app*")
}

func TestPV16_EmptyKey(t *testing.T) {
	verdict(t, pa("spec: {selector: {matchLabels: {'': a}}}"), "PV16", Unusable, "empty")
}

func TestPV17_LongValue(t *testing.T) {
	long := func(n int) string {
		return pa("spec: {selector: {matchLabels: {app: " + strings.Repeat("ä", n) + "}}}")
	}
	verdict(t, long(64), "PV17", Unusable, "64 characters, at most 63")
	if p := parseOne(t, long(63)); len(p.Problems) > 0 {
		t.Errorf("63 characters: %v", p.Problems)
	}
}

func TestPV18_ManyLabels(t *testing.T) {
	many := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "l%d: a, ", i)
		}
		return pa("spec: {selector: {matchLabels: {" + b.String() + "}}}")
	}
	verdict(t, many(4097), "PV18", Unusable, "4097 labels, at most 4096")
	if p := parseOne(t, many(4096)); len(p.Problems) > 0 {
		t.Errorf("4096 labels: %v", p.Problems)
	}
}

func TestPV19_UnknownTopLevelField(t *testing.T) {
	verdict(t, pa("Spec: {mtls: {mode: STRICT}}"), "PV19", Unusable, `did you mean "spec"?`)
	verdict(t, pa("extra: 1"), "PV19", Unusable, "extra")
}

func TestPV20_UnknownFieldInSpec(t *testing.T) {
	for _, spec := range []string{
		"{mTLS: {mode: STRICT}}", "{mtls: {Mode: STRICT}}", "{selector: {matchExpressions: []}}", selector + "portLevelMtls: {80: {mod: STRICT}}}",
	} {
		verdict(t, pa("spec: "+spec), "PV20", Unusable, "unknown field")
	}
}

// TestPV0_OfAnotherShape is about what never comes as far as the rules.
func TestPV0_OfAnotherShape(t *testing.T) {
	for _, text := range []string{
		pa("spec: STRICT"), pa("spec: {mtls: STRICT}"), pa("spec: {selector: [a]}"), pa("spec: {selector: {matchLabels: [a]}}"),
		pa("spec: {selector: {matchLabels: {app: [a]}}}"), pa("spec: {portLevelMtls: [80]}"),
		pa("spec: " + selector + "portLevelMtls: {80: STRICT}}"),
		strings.Replace(pa(""), "/v1", "/v2", 1), strings.Replace(pa(""), "name: default, ", "", 1), strings.Replace(pa(""), "default", "../x", 1),
		strings.Replace(pa(""), "name: default", "name: d, creationTimestamp: yesterday", 1),
		strings.Replace(pa(""), "default", strings.Repeat("d", 254), 1),
	} {
		verdict(t, text, "PV0", Unusable)
	}
	for _, value := range []string{"1", "true", "yes", "off", "1.5"} {
		text := pa("spec: {selector: {matchLabels: {app: " + value + "}}}")
		verdict(t, text, "PV0", Rejected, "put it in quotes")
		if got := parseOne(t, text).Selector["app"]; got != value {
			t.Errorf("label %s is read as %q", value, got)
		}
		if p := parseOne(t, pa("spec: {selector: {matchLabels: {app: '"+value+"'}}}")); len(p.Problems) > 0 {
			t.Errorf("label %s in quotes: %v", value, p.Problems)
		}
	}
}

// accepted checks that nothing is wrong with a policy, and what it means.
func accepted(t *testing.T, spec string, want policy.Policy) {
	t.Helper()
	p := parseOne(t, pa(spec))
	if len(p.Problems) > 0 {
		t.Errorf("%s: %v", spec, p.Problems)
	}
	want.Ref = policy.Ref{Namespace: "foo", Name: "default"}
	if diff := cmp.Diff(want, p.Policy); diff != "" {
		t.Errorf("%s: %s", spec, diff)
	}
}

func TestPA1_NothingIsSaid(t *testing.T) {
	for _, spec := range []string{"", "spec: {}", "spec:", "spec: {mtls: {}}", "spec: {mtls: , selector: , portLevelMtls: }", "spec: {mtls: {mode: }}"} {
		accepted(t, spec, policy.Policy{Mode: policy.Unset})
	}
}

func TestPA2_Unset(t *testing.T) {
	accepted(t, "spec: {mtls: {mode: UNSET}}", policy.Policy{Mode: policy.Unset})
	accepted(t, "spec: "+selector+"mtls: {mode: UNSET}}", policy.Policy{Mode: policy.Unset, Selector: map[string]string{"app": "a"}})
}

func TestPA3_EmptySelectorIsWarnedOf(t *testing.T) {
	verdict(t, pa("spec: {selector: {}}"), "PA3", Warned, "without labels")
	verdict(t, pa("spec: {selector: {matchLabels: {}}}"), "PA3", Warned)
	// The API server drops what has no value, and with it the last label.
	verdict(t, pa("spec: {selector: {matchLabels: {app: }}}"), "PA3", Warned, "without labels")
	verdict(t, pa("spec: {selector: {matchLabels: {app: , v: a}}}"), "PA3", Warned, "without a value")
}

func TestPA4_DefaultWithSelector(t *testing.T) {
	accepted(t, "spec: "+selector+"mtls: {mode: STRICT}}", policy.Policy{Mode: policy.Strict, Selector: map[string]string{"app": "a"}})
}

func TestPA5_Everything(t *testing.T) {
	accepted(t, "spec: "+selector+"mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}, '90': {mode: PERMISSIVE}, 100: {}, 110: }}", policy.Policy{
		Mode: policy.Strict, Selector: map[string]string{"app": "a"},
		Ports: map[uint16]policy.Mode{80: policy.Disable, 90: policy.Permissive, 100: policy.Unset, 110: policy.Unset},
	})
}

func TestPA6_PortsAreNormalised(t *testing.T) {
	for key, want := range map[string]uint16{`"08080"`: 8080, "08080": 8080, "8080": 8080, `"65535"`: 65535, "0x1F90": 8080, "8080.0": 8080} {
		accepted(t, "spec: "+selector+"portLevelMtls: {"+key+": {mode: DISABLE}}}", policy.Policy{
			Mode: policy.Unset, Selector: map[string]string{"app": "a"}, Ports: map[uint16]policy.Mode{want: policy.Disable},
		})
	}
	verdict(t, pa("spec: "+selector+"portLevelMtls: {'8080': {mode: STRICT}, '08080': {mode: DISABLE}}}"), "PA6", Unusable, "stands in line 4 already")
}

func TestBothVersionsAndTime(t *testing.T) {
	text := strings.Replace(pa("status: {anything: 1}"), "/v1", "/v1beta1", 1)
	text = strings.Replace(text, "name: default", "name: w, creationTimestamp: 2026-01-31T12:00:00.9+01:00, labels: {a: b}", 1)
	p := parseOne(t, text)
	if want := time.Date(2026, 1, 31, 11, 0, 0, 0, time.UTC); !p.Created.Equal(want) || len(p.Problems) > 0 {
		t.Errorf("made %v, want %v; %v", p.Created, want, p.Problems)
	}
	if p := parseOne(t, strings.Replace(pa(""), ", namespace: foo", "", 1)); p.Namespace != "default" {
		t.Errorf("without a namespace it is in %q", p.Namespace)
	}
}

func TestDocumentsAndLists(t *testing.T) {
	c, err := Parse([]byte("---\n# nothing\n---\n"+pa("")+"---\n"+`
apiVersion: v1
kind: List
items:
- {apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: b}}
- {apiVersion: v1, kind: Pod, metadata: {name: p, labels: {app: a}}, spec: {containers: [{ports: [{name: web, containerPort: 80}]}, {}]}}
- {apiVersion: v1, kind: Service, metadata: {name: s, namespace: foo}, spec: {selector: {app: a}, ports: [{port: 8000, targetPort: 80}, {port: 81, targetPort: web}, {port: 82}]}}
- {apiVersion: apps/v1, kind: Deployment, spec: {a: &x 1, b: *x}}
---
{"apiVersion": "security.istio.io/v1", "kind": "PeerAuthenticationList", "items": [{"metadata": {"name": "c"}}]}
`), 10)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range c.Policies {
		names = append(names, p.String())
	}
	if diff := cmp.Diff([]string{"foo/default", "default/b", "default/c"}, names); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]Pod{{"default", "p", map[string]string{"app": "a"}, []ContainerPort{{"web", 80}}}}, c.Pods); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]Service{{"foo", "s", map[string]string{"app": "a"}, []ServicePort{{8000, 80, ""}, {81, 0, "web"}, {82, 82, ""}}}}, c.Services); diff != "" {
		t.Error(diff)
	}
	if c.Objects != 6 || c.Others["Deployment"] != 1 {
		t.Errorf("%d objects, others %v", c.Objects, c.Others)
	}
}

func TestT10_WhatIsNoObjectIsAnError(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"no YAML":        {"a: [", "line 1"},
		"not an object":  {"- a", "expected an object"},
		"a word":         {"STRICT", `expected an object, found "STRICT"`},
		"no kind":        {"apiVersion: v1", "no \"kind\""},
		"no version":     {"kind: PeerAuthentication", "no \"apiVersion\""},
		"misspelt kind":  {strings.Replace(pa(""), "PeerAuth", "Peerauth", 1), `did you mean "PeerAuthentication"?`},
		"twice":          {pa("spec: {mtls: {mode: STRICT}}\nspec: {}"), "stands in line 4 already"},
		"twice below":    {pa("spec: {mtls: {mode: STRICT, mode: DISABLE}}"), "stands in line 4 already"},
		"alias":          {pa("spec: &a {mtls: {mode: STRICT}}\nstatus: *a"), "aliases are not supported"},
		"merge":          {pa("spec: {<<: *a}"), "anchor"},
		"list in a list": {"{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: List, items: []}]}", "stands in a list"},
		"cut off list":   {"{apiVersion: v1, kind: List}", "items are missing"},
		"key of keys":    {pa("spec: {[a]: b}"), "one word"},
		"too many":       {strings.Repeat(pa("---\n"), 11), "more than 10 objects"},
		"bad pod":        {"{apiVersion: v1, kind: Pod, spec: {containers: [{ports: [{containerPort: x}]}]}}", "cannot unmarshal"},
		"deep":           {strings.Repeat("[", 20_000), "depth"},
	} {
		_, err := Parse([]byte(tt.text), 10)
		var syntax *SyntaxError
		if !errors.As(err, &syntax) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

// TestWrittenAndReadIsTheSame goes through random policies: what the engine is tested
// with is what comes out of a file.
func TestWrittenAndReadIsTheSame(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		want := policy.Policy{
			Ref:     policy.Ref{Namespace: fmt.Sprint("ns-", r.IntN(3)), Name: fmt.Sprint("p-", r.IntN(100))},
			Created: time.Unix(r.Int64N(4_000_000_000), 0).UTC(), Mode: policy.Mode(r.IntN(4)),
		}
		var labels, ports strings.Builder
		for i := range r.IntN(4) {
			if want.Selector == nil {
				want.Selector, want.Ports = make(map[string]string), make(map[uint16]policy.Mode)
			}
			key, value := fmt.Sprint("k/", i), fmt.Sprint(r.IntN(3))
			port, mode := uint16(1+r.IntN(65535)), policy.Mode(r.IntN(4))
			if _, twice := want.Ports[port]; twice {
				continue
			}
			want.Selector[key], want.Ports[port] = value, mode
			fmt.Fprintf(&labels, "%s: %q, ", key, value)
			fmt.Fprintf(&ports, "'%0*d': {mode: %v}, ", r.IntN(8), port, mode)
		}
		text := fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: %s, namespace: %s, creationTimestamp: %s}\nspec: {mtls: {mode: %v}",
			want.Name, want.Namespace, want.Created.Format(time.RFC3339), want.Mode)
		if want.Selector != nil {
			text += ", selector: {matchLabels: {" + labels.String() + "}}, portLevelMtls: {" + ports.String() + "}"
		}
		got := parseOne(t, text+"}")
		if diff := cmp.Diff(want, got.Policy); diff != "" || len(got.Problems) > 0 {
			t.Fatalf("%s\n%s%v", text, diff, got.Problems)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", pa("spec: {mtls: {mode: STRICT}}"), pa("spec: " + selector + "portLevelMtls: {'08080': {mode: DISABLE}, 1e3: {}}}"),
		pa("spec: {selector: {}}"), pa("spec: {mtls: {mode: 3}}") + "\n---\n" + pa("Spec: {}"), "{apiVersion: v1, kind: List, items: [" + pa("") + "]}",
		"{apiVersion: v1, kind: Service, spec: {ports: [{port: 1, targetPort: web}]}}", "a: &a [*a, *a]", "!!binary x: \xff",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse(data, 100)
		if err != nil {
			if c != nil || len(err.Error()) > 1000 {
				t.Errorf("%v, %d bytes of error", c, len(err.Error()))
			}
			return
		}
		for _, p := range c.Policies {
			if len(p.Problems) > 0 {
				continue
			}
			if p.Name == "" || p.Namespace == "" || len(p.Selector) == 0 && len(p.Ports) > 0 || p.Mode > policy.Unset {
				t.Errorf("accepted: %+v", p)
			}
			for port, m := range p.Ports {
				if port == 0 || m > policy.Unset {
					t.Errorf("accepted: port %d %v", port, m)
				}
			}
		}
	})
}
