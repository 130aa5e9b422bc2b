package policy_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshca/meshca/policy"
)

// TestV22_WholeSpace goes through all combinations of mesh, namespace, workload
// and two ports; at each level no policy, and one with each mode.
func TestV22_WholeSpace(t *testing.T) {
	labels := map[string]string{"app": "a"}
	modes := []policy.Mode{U, D, P, S, policy.Unknown}
	level := func(n int, make func(policy.Mode) policy.Policy) []policy.Policy {
		if n == len(modes) {
			return nil
		}
		return []policy.Policy{make(modes[n])}
	}
	count := 0
	for n := range 6 * 6 * 6 * 6 * 6 {
		m, s, w, p1, p2 := n%6, n/6%6, n/36%6, n/216%6, n/1296
		exceptions := make(ports)
		if p1 < len(modes) {
			exceptions[80] = modes[p1]
		}
		if p2 < len(modes) {
			exceptions[443] = modes[p2]
		}
		policies := slices.Concat(level(m, mesh), level(s, ns), level(w, func(m policy.Mode) policy.Policy { return wl(m, exceptions) }))
		r := policy.New(policies, rootNS).Resolve("foo", labels)
		o := oracle{rootNS, policies}
		for _, port := range []uint16{80, 443, 8080} {
			if got, want := r.ForPort(port), o.mode("foo", labels, port); got != want {
				t.Fatalf("%v: port %d is %v, want %v", policies, port, got, want)
			}
		}
		count++
	}
	t.Logf("%d combinations, 3 ports each", count)
}

// TestV22_ManyStrictPorts is Istio's issue 54146: several rules of one policy
// were joined as if all had to hold, so that none did.
func TestV22_ManyStrictPorts(t *testing.T) {
	r := policy.New([]policy.Policy{wl(P, ports{80: S, 81: S, 82: S, 83: D})}, rootNS).Resolve("foo", map[string]string{"app": "a"})
	if want := (ports{80: S, 81: S, 82: S, 83: D}); !cmp.Equal(want, r.Ports()) || r.Mode != P {
		t.Errorf("%v %v, want %v %v", r.Mode, r.Ports(), P, want)
	}
}

// world makes random policies with many ties: few names, ages, labels and ports.
func world(r *rand.Rand) []policy.Policy {
	pick := func(values ...string) string { return values[r.IntN(len(values))] }
	mode := func() policy.Mode { return policy.Mode(r.IntN(6)) }
	policies := make([]policy.Policy, r.IntN(12))
	for i := range policies {
		p := pol(pick("foo", "bar", rootNS), fmt.Sprintf("%s%d", pick("a", "b", ""), i), r.IntN(3), mode())
		if r.IntN(3) > 0 {
			p.Selector = make(map[string]string)
			for range r.IntN(3) {
				p.Selector[pick("app", "v", "")] = pick("1", "2", "")
			}
		}
		for range r.IntN(3) {
			if p.Ports == nil {
				p.Ports = make(ports)
			}
			p.Ports[uint16(80+r.IntN(3))] = mode()
		}
		policies[i] = p
	}
	return policies
}

func workloads() []map[string]string {
	all := []map[string]string{nil}
	for _, app := range []string{"1", "2", "-"} {
		for _, v := range []string{"1", "", "-"} {
			l := map[string]string{"app": app, "v": v}
			if app == "-" {
				delete(l, "app")
			}
			if v == "-" {
				delete(l, "v")
			} else if app == "2" {
				l[""] = v
			}
			all = append(all, l)
		}
	}
	return all
}

// agree compares the engine with the oracle on policies in any order, and again
// after each deletion.
func agree(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	policies := world(r)
	for {
		r.Shuffle(len(policies), func(i, j int) { policies[i], policies[j] = policies[j], policies[i] })
		set, o := policy.New(policies, rootNS), oracle{rootNS, policies}
		for _, namespace := range []string{"foo", "bar", rootNS, "empty"} {
			for _, labels := range workloads() {
				got := set.Resolve(namespace, labels)
				for _, port := range []uint16{80, 81, 82, 9999} {
					if want := o.mode(namespace, labels, port); got.ForPort(port) != want {
						t.Fatalf("seed %d: %v\n%s %v port %d is %v, want %v", seed, policies, namespace, labels, port, got.ForPort(port), want)
					}
				}
				explained(t, set, namespace, labels)
			}
		}
		if len(policies) == 0 {
			return
		}
		gone := policies[0].Namespace
		policies = policies[1:]
		left := slices.DeleteFunc(slices.Clone(policies), func(p policy.Policy) bool { return p.Namespace != gone })
		same(t, set.WithNamespace(gone, left), policy.New(policies, rootNS))
	}
}

// same compares two ways to one set.
func same(t *testing.T, got, want *policy.Set) {
	t.Helper()
	for _, namespace := range []string{"foo", "bar", rootNS} {
		for _, labels := range workloads() {
			if diff := cmp.Diff(want.Explain(namespace, labels), got.Explain(namespace, labels), cmp.AllowUnexported(policy.Result{})); diff != "" {
				t.Fatalf("%s %v: %s", namespace, labels, diff)
			}
		}
	}
}

// explained checks that the explanation is about the decision.
func explained(t *testing.T, set *policy.Set, namespace string, labels map[string]string) {
	t.Helper()
	e := set.Explain(namespace, labels)
	if r := set.Resolve(namespace, labels); e.Mode != r.Mode || e.Source != r.Source {
		t.Fatalf("explains %v by %v, resolves to %v by %v", e.Mode, e.Source, r.Mode, r.Source)
	}
	deciding := 0
	for _, s := range e.Steps {
		if s.Decides {
			deciding++
		}
	}
	if want := min(1, len(e.Source.Policy.String())); deciding != want {
		t.Fatalf("%d steps decide, want %d", deciding, want)
	}
}

func TestV22_RandomPolicies(t *testing.T) {
	for seed := range uint64(150) {
		agree(t, seed)
	}
}

func FuzzV22_AgainstOracle(f *testing.F) {
	for seed := range uint64(8) {
		f.Add(seed)
	}
	f.Fuzz(agree)
}

func TestV22_LabelsAreJudgedAsTheyAre(t *testing.T) {
	set := policy.New([]policy.Policy{ns(S), with(wl(D, nil), nil, "app", "a", "debug", "")}, rootNS)
	labels := map[string]string{"app": "a"}
	for _, step := range []struct {
		change func()
		want   policy.Mode
	}{
		{func() {}, S}, // an empty value is not an absent label
		{func() { labels["debug"] = "" }, D},
		{func() { labels["debug"] = "yes" }, S},
		{func() { labels["debug"] = ""; labels["more"] = "x" }, D},
		{func() { delete(labels, "app") }, S},
	} {
		step.change()
		if got := set.Resolve("foo", labels).Mode; got != step.want {
			t.Errorf("labels %v: %v, want %v", labels, got, step.want)
		}
	}
}

// A namespace that is deleted takes its policies along, and no other's: what is
// above it decides again. The root's takes the mesh's.
func TestV22_NamespaceGoes(t *testing.T) {
	labels := map[string]string{"app": "a"}
	all := []policy.Policy{mesh(D), ns(S), wl(P, ports{80: S}), pol("bar", "default", 1, P)}
	full := policy.New(all, rootNS)
	for _, step := range []struct {
		gone           string
		foo, port, bar policy.Mode
	}{
		{"", P, S, P},
		{"other", P, S, P},
		{"foo", D, D, P},
		{"bar", P, S, D},
		{rootNS, P, S, P},
	} {
		set := full.WithNamespace(step.gone, nil)
		foo := set.Resolve("foo", labels)
		if bar := set.Resolve("bar", labels).Mode; foo.Mode != step.foo || foo.ForPort(80) != step.port || bar != step.bar {
			t.Errorf("without %q: %v, port 80 %v, bar %v", step.gone, foo.Mode, foo.ForPort(80), bar)
		}
	}
	rest := full.WithNamespace(rootNS, nil).WithNamespace("foo", nil)
	if foo, bar := rest.Resolve("foo", labels).Mode, rest.Resolve("bar", labels).Mode; foo != P || bar != P {
		t.Errorf("without both: %v, %v", foo, bar)
	}
	if got := full.WithNamespace("bar", nil).WithNamespace(rootNS, nil).Resolve("bar", labels).Mode; got != P {
		t.Errorf("with nothing above it: %v", got)
	}
	if got := full.Resolve("foo", labels).Mode; got != P { // a set does not change
		t.Errorf("the set that was asked: %v", got)
	}
}

func TestT10_NothingKnownIsStrict(t *testing.T) {
	var none *policy.Set
	for name, r := range map[string]policy.Result{
		"zero":    {},
		"nil set": none.Resolve("foo", nil),
		"closed":  policy.Closed("shop.yaml could not be read").Resolve("foo", nil),
		"why not": policy.Closed("").Resolve("foo", nil),
		"explain": none.Explain("foo", nil).Result,
		"unknown": policy.New([]policy.Policy{mesh(P), ns(policy.Unknown)}, rootNS).Resolve("foo", nil),
		"newer":   policy.New([]policy.Policy{mesh(P), ns(99)}, rootNS).Resolve("foo", nil),
		"absent":  policy.New([]policy.Policy{mesh(P), ns(policy.Policy{}.Mode)}, rootNS).Resolve("foo", nil),
	} {
		if r.Mode != S || r.ForPort(80) != S {
			t.Errorf("%s: %v", name, r)
		}
	}
	if c := none.Closed(); c == "" {
		t.Error("a nil set does not say why it is closed")
	}
	if c := policy.New(nil, rootNS).Closed(); c != "" {
		t.Errorf("no policies are closed: %q", c)
	}
}

func TestV22_UnknownPortModeIsStrict(t *testing.T) {
	set := policy.New([]policy.Policy{wl(P, ports{80: policy.Unknown, 81: 200})}, rootNS)
	r := set.Resolve("foo", map[string]string{"app": "a"})
	if r.ForPort(80) != S || r.ForPort(81) != S || r.ForPort(82) != P {
		t.Errorf("%v", r)
	}
}

// TestL8_OneChangeCostsOneNamespace counts allocations in place of time: one for
// each policy that is compiled anew, and none for a decision.
func TestL8_OneChangeCostsOneNamespace(t *testing.T) {
	policies, where, labels := fleet(1000)
	set := policy.New(policies, rootNS)
	var changed []policy.Policy
	for _, p := range policies {
		if p.Namespace == where[0] {
			changed = append(changed, p)
		}
	}
	if n := testing.AllocsPerRun(5, func() { set.WithNamespace(where[0], changed) }); n > 500 {
		t.Errorf("a change among %d of %d policies makes %v allocations", len(changed), len(policies), n)
	}
	if n := testing.AllocsPerRun(5, func() {
		for i := range 100 {
			set.Resolve(where[i], labels[i])
		}
	}); n > 0 {
		t.Errorf("100 decisions make %v allocations", n)
	}
}

func TestModeText(t *testing.T) {
	for _, m := range []policy.Mode{S, P, D, U} {
		if got, ok := policy.ParseMode(m.String()); got != m || !ok {
			t.Errorf("%v is read back as %v", m, got)
		}
	}
	for _, s := range []string{"strict", "UNKNOWN", " STRICT", "3"} {
		if got, ok := policy.ParseMode(s); ok || got != policy.Unknown {
			t.Errorf("%q is read as %v", s, got)
		}
	}
}
