package policy

import (
	"testing"
	"time"
)

func ref(name string) Ref { return Ref{"shop", name} }

func TestT10_OnlyNewerOrEqualFollows(t *testing.T) {
	strict := Result{Mode: Strict, Source: Source{LevelNamespace, ref("default")}}
	open := Result{Mode: Permissive, Source: Source{Level: LevelDefault}}
	held := Resolved{Version: 7, Result: strict}
	for _, tt := range []struct {
		name string
		next Resolved
		want bool
	}{
		{"newer, other content", Resolved{Version: 8, Result: open}, true},
		{"newer, same content", Resolved{Version: 8, Result: strict}, true},
		{"the same", Resolved{Version: 7, Result: strict}, true},
		{"the same version, other content", Resolved{Version: 7, Result: open}, false},
		{"older, same content", Resolved{Version: 6, Result: strict}, true},
		{"older, other content", Resolved{Version: 6, Result: open}, false},
	} {
		if got := held.Follows(tt.next); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// Two replicas watch policies and labels apart. What is behind in one of them is not
// made newer by the other.
func TestT10_F69_BothVersionsCount(t *testing.T) {
	strict := Result{Mode: Strict, Source: Source{LevelNamespace, ref("default")}}
	open := Result{Mode: Permissive, Source: Source{Level: LevelDefault}}
	held := Resolved{7, 50, strict}
	for _, tt := range []struct {
		name    string
		next    Resolved
		taken   bool
		refused bool
	}{
		{"newer policies", Resolved{8, 50, open}, true, false},
		{"newer labels", Resolved{7, 51, open}, true, false},
		{"both newer", Resolved{8, 51, open}, true, false},
		{"newer policies, older labels", Resolved{8, 49, open}, false, true},
		{"older policies, newer labels", Resolved{6, 51, open}, false, true},
		{"newer policies, labels not known", Resolved{8, 0, open}, false, true},
		{"both equal, other content", Resolved{7, 50, open}, false, true},
		{"both equal, the same", Resolved{7, 50, strict}, false, false},
		{"newer labels, the same", Resolved{7, 51, strict}, true, false},
		{"newer policies, older labels, the same", Resolved{8, 49, strict}, false, false},
		{"older policies, newer labels, the same", Resolved{6, 51, strict}, false, false},
		{"not known", Unresolved(), false, false},
	} {
		taken, err := tt.next.Succeeds(&held)
		if taken != tt.taken || (err != nil) != tt.refused {
			t.Errorf("%s: taken %v, error %v", tt.name, taken, err)
		}
	}
	_, err := (&Resolved{6, 51, open}).Succeeds(&held)
	if want := "the policy has version 6, labels 51 (PERMISSIVE, no policy); version 7, labels 50 (STRICT, namespace shop/default) is in use already"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// What is handed on decides as the original does, for every port and with the
// same reasons.
func TestDecidedSaysTheSame(t *testing.T) {
	set := New([]Policy{
		{Ref: Ref{"meshca-system", "default"}, Mode: Strict},
		{Ref: ref("cart"), Created: time.Unix(1, 0), Selector: map[string]string{"app": "cart"}, Mode: Unset,
			Ports: map[uint16]Mode{80: Disable, 90: Unset, 100: Permissive, 110: Unknown}},
	}, "meshca-system")
	for _, labels := range []map[string]string{{"app": "cart"}, {"app": "pay"}, nil} {
		want := set.Resolve("shop", labels)
		policy, ports := want.PortLevel()
		got := Decided(want.Mode, want.Source, policy, ports)
		if !got.Equal(want) {
			t.Errorf("labels %v: %+v, want %+v", labels, got, want)
		}
		for _, port := range []uint16{80, 90, 100, 110, 120} {
			if got.ForPort(port) != want.ForPort(port) || got.SourceForPort(port) != want.SourceForPort(port) {
				t.Errorf("labels %v, port %d: %v by %v, want %v by %v", labels, port,
					got.ForPort(port), got.SourceForPort(port), want.ForPort(port), want.SourceForPort(port))
			}
		}
	}
}

func TestEqualSeesEveryDifference(t *testing.T) {
	base := func() Result {
		return Decided(Strict, Source{LevelWorkload, ref("cart")}, ref("cart"), map[uint16]Mode{80: Disable})
	}
	if !base().Equal(base()) {
		t.Error("equal results differ")
	}
	for name, other := range map[string]Result{
		"mode":        Decided(Disable, Source{LevelWorkload, ref("cart")}, ref("cart"), map[uint16]Mode{80: Disable}),
		"source":      Decided(Strict, Source{LevelMesh, ref("cart")}, ref("cart"), map[uint16]Mode{80: Disable}),
		"port's mode": Decided(Strict, Source{LevelWorkload, ref("cart")}, ref("cart"), map[uint16]Mode{80: Permissive}),
		"port":        Decided(Strict, Source{LevelWorkload, ref("cart")}, ref("cart"), map[uint16]Mode{81: Disable}),
		"port policy": Decided(Strict, Source{LevelWorkload, ref("cart")}, ref("x"), map[uint16]Mode{80: Disable}),
		"no ports":    Decided(Strict, Source{LevelWorkload, ref("cart")}, Ref{}, nil),
	} {
		if base().Equal(other) {
			t.Errorf("another %s is not seen", name)
		}
	}
}

func TestT10_UnknownLabelsAreStrictWhereTheyMatter(t *testing.T) {
	set := New([]Policy{
		{Ref: Ref{"shop", "cart"}, Selector: map[string]string{"app": "cart"}, Mode: Permissive},
		{Ref: Ref{"bank", "default"}, Mode: Disable},
		{Ref: Ref{"meshca-system", "odd"}, Selector: map[string]string{"app": "cart"}, Mode: Disable},
	}, "meshca-system")
	for namespace, want := range map[string]Result{
		"shop":          {Mode: Strict, Source: Source{Level: LevelClosed}},
		"bank":          {Mode: Disable, Source: Source{LevelNamespace, Ref{"bank", "default"}}},
		"quiet":         {Mode: Permissive, Source: Source{Level: LevelDefault}},
		"meshca-system": {Mode: Permissive, Source: Source{Level: LevelDefault}}, // a selector chooses nothing there
	} {
		if got := set.ResolveUnlabelled(namespace); !got.Equal(want) {
			t.Errorf("%s: %v by %v, want %v by %v", namespace, got.Mode, got.Source, want.Mode, want.Source)
		}
	}
	var unknown *Set
	if got := unknown.ResolveUnlabelled("bank"); got.Mode != Strict {
		t.Errorf("policies not known: %v", got.Mode)
	}
}

func TestDecidedTakesUnknownModesForStrict(t *testing.T) {
	r := Decided(Unknown, Source{}, ref("cart"), map[uint16]Mode{80: Mode(99)})
	if r.Mode != Strict || r.ForPort(80) != Strict || r.ForPort(81) != Strict {
		t.Errorf("%v, %v, %v", r.Mode, r.ForPort(80), r.ForPort(81))
	}
}
