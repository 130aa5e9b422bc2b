package lint

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

// pa writes a PeerAuthentication, made in the given second.
func pa(namespace, name string, second int, spec string) string {
	return fmt.Sprintf("---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {namespace: %s, name: %s, creationTimestamp: '2026-01-01T00:00:%02dZ'}\nspec: %s\n",
		namespace, name, second, spec)
}

func pod(namespace, name, labels, ports string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {namespace: %s, name: %s, labels: %s}\nspec: {containers: [{ports: %s}]}\n", namespace, name, labels, ports)
}

func service(namespace, name, selector, ports string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Service\nmetadata: {namespace: %s, name: %s}\nspec: {selector: %s, ports: %s}\n", namespace, name, selector, ports)
}

func run(t *testing.T, objects ...string) Report {
	t.Helper()
	c, err := manifest.Parse([]byte(strings.Join(objects, "")), 100)
	if err != nil {
		t.Fatal(err)
	}
	in := Input{RootNamespace: "root", Services: c.Services, Pods: c.Pods}
	for _, p := range c.Policies {
		in.Policies = append(in.Policies, Policy{p, "x.yaml"})
	}
	return Run(in)
}

// want compares findings, each as "CODE policy", or "CODE policy < winner".
func want(t *testing.T, r Report, findings ...string) {
	t.Helper()
	var got []string
	for _, f := range r.Findings {
		s := f.Code + " " + f.Policy.String()
		if f.BeatenBy != (policy.Ref{}) {
			s += " < " + f.BeatenBy.String()
		}
		got = append(got, s)
		if f.File != "x.yaml" || f.Line == 0 || f.Text == "" {
			t.Errorf("%+v", f)
		}
	}
	if !slices.Equal(got, findings) {
		t.Errorf("findings %q, want %q", got, findings)
	}
}

func notChecked(r Report) string {
	var codes []string
	for _, n := range r.NotChecked {
		codes = append(codes, n.Code)
	}
	return strings.Join(codes, " ")
}

const (
	strict  = "{mtls: {mode: STRICT}}"
	disable = "{mtls: {mode: DISABLE}}"
	appA    = "{selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}}"
	appADis = "{selector: {matchLabels: {app: a}}, mtls: {mode: DISABLE}}"
	appAV1  = "{selector: {matchLabels: {app: a, v: '1'}}, mtls: {mode: DISABLE}}"
	onlyV1  = "{selector: {matchLabels: {v: '1'}}, mtls: {mode: DISABLE}}"
)

func TestNothingToSay(t *testing.T) {
	r := run(t, pa("root", "mesh", 1, strict), pa("foo", "ns", 2, disable), pa("foo", "w", 3, appA), pod("foo", "p", "{app: a}", "[]"), service("foo", "s", "{app: a}", "[{port: 80}]"))
	if want(t, r); len(r.NotChecked) > 0 || r.Rejected() > 0 {
		t.Errorf("%+v", r)
	}
}

func TestPL0_IstiosRootNamespaceIsNotOurs(t *testing.T) {
	r := run(t, pa("istio-system", "default", 1, strict))
	if want(t, r, "PL0 istio-system/default"); r.Findings[0].Severity != Warning {
		t.Errorf("%+v", r.Findings[0])
	}
	in := Input{RootNamespace: "istio-system", Policies: []Policy{{Policy: manifest.Policy{Policy: policy.Policy{Ref: policy.Ref{Namespace: "istio-system", Name: "x"}}}}}}
	if r := Run(in); len(r.Findings) > 0 {
		t.Errorf("%+v", r.Findings)
	}
}

func TestPL1_SelectorInTheRootNamespace(t *testing.T) {
	want(t, run(t, pa("root", "picky", 1, appA), pa("foo", "fine", 1, appA)), "PL1 root/picky")
}

func TestPL2_SecondWidePolicy(t *testing.T) {
	want(t, run(t, pa("foo", "b", 2, strict), pa("foo", "a", 3, strict), pa("bar", "b", 2, strict)), "PL2 foo/a < foo/b")
	r := run(t, pa("root", "b", 2, strict), pa("root", "c", 2, "{selector: {}, mtls: {mode: STRICT}}"))
	want(t, r, "PL2 root/c < root/b", "PA3 root/c")
	if !strings.Contains(r.Findings[0].Text, "the mesh") {
		t.Error(r.Findings[0].Text)
	}
}

func TestPL3_TwoPoliciesMatchOnePod(t *testing.T) {
	objects := []string{pa("foo", "older", 1, appA), pa("foo", "newer", 2, onlyV1)}
	r := run(t, objects...)
	if want(t, r); notChecked(r) != "PL3 PL4 PL6" {
		t.Errorf("without pods: not checked are %q", notChecked(r))
	}
	r = run(t, append(objects, pod("foo", "p1", "{app: a, v: '1'}", "[]"), pod("foo", "p2", "{app: a}", "[]"), pod("foo", "p3", "{app: b, v: '1'}", "[]"), pod("foo", "p4", "{app: a, v: '1'}", "[]"))...)
	want(t, r, "PL3 foo/newer < foo/older")
	if text := r.Findings[0].Text; !strings.Contains(text, `pod "p1" and 1 more`) {
		t.Error(text)
	}
	want(t, run(t, append(objects, pod("foo", "p2", "{app: a}", "[]"), pod("foo", "p3", "{v: '1'}", "[]"))...))
}

const port8000 = "{selector: {matchLabels: {app: a}}, portLevelMtls: {8000: {mode: DISABLE}}}"

func TestPL4_ServicePort(t *testing.T) {
	p := pa("foo", "w", 1, port8000)
	to80 := service("foo", "s", "{app: a}", "[{port: 8000, targetPort: 80}]")
	named := service("foo", "s", "{app: a}", "[{port: 8000, targetPort: web}]")
	for name, tt := range map[string]struct {
		objects []string
		found   bool
		not     string
	}{
		"no service":                   {nil, false, "PL3 PL4 PL6"},
		"another target":               {[]string{to80}, true, "PL3 PL6"},
		"wider service":                {[]string{service("foo", "s", "{app: a, v: '1'}", "[{port: 8000, targetPort: 80}]")}, true, "PL3 PL6"},
		"other pods, perhaps":          {[]string{service("foo", "s", "{tier: x}", "[{port: 8000, targetPort: 80}]")}, false, "PL3 PL6"},
		"other namespace":              {[]string{service("bar", "s", "{app: a}", "[{port: 8000, targetPort: 80}]")}, false, "PL3 PL6"},
		"no selector":                  {[]string{service("foo", "s", "{}", "[{port: 8000, targetPort: 80}]")}, false, "PL3 PL6"},
		"same number":                  {[]string{service("foo", "s", "{app: a}", "[{port: 8000}]")}, false, "PL3 PL6"},
		"target of another":            {[]string{to80, service("foo", "s2", "{app: a}", "[{port: 1, targetPort: 8000}]")}, false, "PL3 PL6"},
		"listened on too":              {[]string{to80, pod("foo", "p", "{app: a}", "[{containerPort: 8000}]")}, false, ""},
		"with pods":                    {[]string{to80, pod("foo", "p", "{app: a}", "[{containerPort: 80}]")}, true, ""},
		"named, no pods":               {[]string{named}, false, "PL3 PL4 PL6"},
		"named":                        {[]string{named, pod("foo", "p", "{app: a}", "[{name: web, containerPort: 80}]")}, true, ""},
		"named, same number":           {[]string{named, pod("foo", "p", "{app: a}", "[{name: web, containerPort: 8000}]")}, false, ""},
		"pods tell what selectors can": {[]string{service("foo", "s", "{tier: x}", "[{port: 8000, targetPort: 80}]"), pod("foo", "p", "{app: a, tier: x}", "[]")}, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := run(t, append(tt.objects, p)...)
			if tt.found {
				want(t, r, "PL4 foo/w")
				if text := r.Findings[0].Text; !strings.Contains(text, `Service "s"`) || !strings.Contains(text, "listen on 80:") {
					t.Error(text)
				}
			} else {
				want(t, r)
			}
			if got := notChecked(r); got != tt.not {
				t.Errorf("not checked: %q, want %q", got, tt.not)
			}
		})
	}
}

func TestPL5_OlderPolicyOverrides(t *testing.T) {
	want(t, run(t, pa("foo", "a", 1, "{mtls: {mode: UNSET}}"), pa("foo", "b", 2, strict)), "PL2 foo/b < foo/a", "PL5 foo/b < foo/a")
	want(t, run(t, pa("foo", "a", 1, appA), pa("foo", "b", 2, appADis)), "PL5 foo/b < foo/a")
	want(t, run(t, pa("foo", "a", 1, appA), pa("foo", "b", 2, appAV1)), "PL5 foo/b < foo/a")
	want(t, run(t, pa("foo", "a", 2, appA), pa("foo", "b", 1, appAV1)))
	want(t, run(t, pa("foo", "a", 1, appA), pa("foo", "b", 2, appA)))
	want(t, run(t, pa("foo", "a", 1, appA), pa("bar", "b", 2, appADis)))
	r := run(t, pa("foo", "a", 1, appA), pa("foo", "b", 2, strings.Replace(appA, "mtls", "portLevelMtls: {80: {}}, mtls", 1)))
	want(t, r, "PL5 foo/b < foo/a")
	if text := r.Findings[0].Text; !strings.Contains(text, "port-level modes") {
		t.Error(text)
	}
}

func TestPL6_SelectorMatchesNothing(t *testing.T) {
	p := pa("foo", "w", 1, appA)
	want(t, run(t, p, pod("foo", "p", "{app: b}", "[]"), pod("bar", "p", "{app: a}", "[]")), "PL6 foo/w")
	want(t, run(t, p, pod("foo", "p", "{app: a, more: x}", "[]")))
}

func TestRejectedPoliciesHaveNoPartInTheRest(t *testing.T) {
	r := run(t, pa("foo", "a", 1, "{mtls: {mode: strict}, portLevelMtls: {0: {}, -1: {}, 70000: {}, 70001: {}}}"), pa("foo", "b", 2, strict), pa("foo", "c", 3, strict))
	want(t, r, "PV10 foo/a", "PV11 foo/a", "PV3 foo/a", "PV5 foo/a", "PV8 foo/a", "PL2 foo/c < foo/b")
	if r.Rejected() != 5 {
		t.Errorf("%d rejected", r.Rejected())
	}
}
