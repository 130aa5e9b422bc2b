package wire

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/wire/meshcav1"
)

const cart = "spiffe://cluster.local/ns/shop/sa/cart"

func seed(t testing.TB) *meshcav1.Workload {
	t.Helper()
	var msg meshcav1.Workload
	if err := proto.Unmarshal(seedWorkload, &msg); err != nil {
		t.Fatal(err)
	}
	return &msg
}

func pack(t testing.TB, msg *meshcav1.Workload) *anypb.Any {
	t.Helper()
	a, err := anypb.New(msg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestParseReadsWhatMarshalWrites(t *testing.T) {
	td := identitytest.TrustDomain(t, "cluster.local")
	ca := identitytest.NewCA(t, td)
	set := policy.New([]policy.Policy{
		{Ref: policy.Ref{Namespace: "shop", Name: "cart"}, Selector: map[string]string{"app": "cart"}, Mode: policy.Strict,
			Ports: map[uint16]policy.Mode{8080: policy.Disable, 9090: policy.Permissive, 7070: policy.Unset}},
	}, "meshca-system")
	for name, w := range map[string]Workload{
		"bare":   {ID: identitytest.ID(t, cart), Bundle: ca.Bundle()},
		"wish":   {ID: identitytest.ID(t, cart), Bundle: ca.Bundle(), RenewAt: time.Unix(1.8e9, 5).UTC()},
		"ports":  {ID: identitytest.ID(t, cart), Bundle: ca.Bundle(), Policy: &policy.Resolved{Version: 3, Result: set.Resolve("shop", map[string]string{"app": "cart"})}},
		"open":   {ID: identitytest.ID(t, cart), Bundle: ca.Bundle(), Policy: &policy.Resolved{Version: 1 << 63, Result: set.Resolve("shop", nil)}},
		"pair":   {ID: identitytest.ID(t, cart), Bundle: ca.Bundle(), Policy: &policy.Resolved{Version: 3, WorkloadVersion: 1<<64 - 1, Result: set.Resolve("shop", nil)}},
		"closed": {ID: identitytest.ID(t, cart), Bundle: ca.Bundle(), Policy: &policy.Resolved{Version: 4, Result: set.ResolveUnlabelled("shop")}},
	} {
		content, hash, err := w.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(td, content)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got.ID != w.ID || !got.Bundle.Equal(w.Bundle) || !got.RenewAt.Equal(w.RenewAt) || (got.Policy == nil) != (w.Policy == nil) {
			t.Errorf("%s: %+v, want %+v", name, got, w)
		}
		if w.Policy != nil && (got.Policy.Version != w.Policy.Version || got.Policy.WorkloadVersion != w.Policy.WorkloadVersion || !got.Policy.Equal(w.Policy.Result)) {
			t.Errorf("%s: policy %+v, want %+v", name, got.Policy, w.Policy)
		}
		if _, again, err := got.Marshal(); err != nil || again != hash {
			t.Errorf("%s: what was read is not written as it was (%v)", name, err)
		}
	}
}

// Whoever is sent a decision gets both of its versions.
func TestT10_F69_BothVersionsAreHandedOn(t *testing.T) {
	td := identitytest.TrustDomain(t, "cluster.local")
	w := Workload{ID: identitytest.ID(t, cart), Bundle: identitytest.NewCA(t, td).Bundle(), Policy: &policy.Resolved{Version: 7, WorkloadVersion: 51}}
	content, _, err := w.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(td, content)
	if err != nil || got.Policy.Version != 7 || got.Policy.WorkloadVersion != 51 {
		t.Errorf("%+v, %v", got.Policy, err)
	}
}

func TestParseKnowsTheSeed(t *testing.T) {
	msg := seed(t)
	at := time.Date(2026, 5, 1, 2, 3, 4, 0, time.UTC)
	msg.RenewAt = timestamppb.New(at)
	w, err := Parse(identitytest.TrustDomain(t, "cluster.local"), pack(t, msg))
	if err != nil {
		t.Fatal(err)
	}
	if w.ID.String() != cart || !w.RenewAt.Equal(at) || w.Bundle.Sequence() != msg.GetBundle().GetSequence() || len(w.Bundle.Authorities()) != 1 {
		t.Errorf("got %+v", w)
	}
}

// A policy that cannot be what it says is refused; a mode of a newer version is
// STRICT.
func TestT10_PolicyIsJudged(t *testing.T) {
	td := identitytest.TrustDomain(t, "cluster.local")
	many := make([]*meshcav1.Port, maxPorts+1)
	for i := range many {
		many[i] = &meshcav1.Port{Number: 1}
	}
	long := strings.Repeat("a", maxSourceName+1)
	for name, tt := range map[string]struct {
		policy *meshcav1.Policy
		want   string // in the error
	}{
		"port 0":         {&meshcav1.Policy{Version: 1, Ports: []*meshcav1.Port{{Number: 0}}}, "port 0"},
		"port 65536":     {&meshcav1.Policy{Version: 1, Ports: []*meshcav1.Port{{Number: 65536}}}, "port 65536"},
		"port twice":     {&meshcav1.Policy{Version: 1, Ports: []*meshcav1.Port{{Number: 80}, {Number: 80, Mode: meshcav1.Mode_MODE_DISABLE}}}, "twice"},
		"too many ports": {&meshcav1.Policy{Version: 1, Ports: many}, "at most"},
		"a long name":    {&meshcav1.Policy{Version: 1, Source: &meshcav1.Source{Name: long}}, "at most"},
		"a long level":   {&meshcav1.Policy{Version: 1, PortsSource: &meshcav1.Source{Level: long}}, "at most"},
	} {
		msg := seed(t)
		msg.Policy = tt.policy
		if w, err := Parse(td, pack(t, msg)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %+v, %v; want an error with %q", name, w, err, tt.want)
		}
	}
	unknown := seed(t)
	unknown.Policy = &meshcav1.Policy{Mode: meshcav1.Mode_MODE_DISABLE, Ports: []*meshcav1.Port{{Number: 80, Mode: meshcav1.Mode_MODE_DISABLE}}}
	if w, err := Parse(td, pack(t, unknown)); err != nil || w.Policy.Version != 0 || w.Policy.ForPort(80) != policy.Strict || w.Policy.Source.Level != policy.LevelClosed {
		t.Errorf("without a version: %+v, %v; want STRICT, as where nothing is known", w.Policy, err)
	}
	msg := seed(t)
	msg.Policy = &meshcav1.Policy{Version: 1, Mode: 99, Ports: []*meshcav1.Port{{Number: 80, Mode: 98}, {Number: 81}, {Number: 82, Mode: meshcav1.Mode_MODE_DISABLE}}}
	w, err := Parse(td, pack(t, msg))
	if err != nil {
		t.Fatal(err)
	}
	for port, want := range map[uint16]policy.Mode{79: policy.Strict, 80: policy.Strict, 81: policy.Strict, 82: policy.Disable} {
		if got := w.Policy.ForPort(port); got != want {
			t.Errorf("port %d: %v, want %v", port, got, want)
		}
	}
}

// Nothing that a sender can say makes more than an error or a usable bundle of
// our own trust domain.
func FuzzParse(f *testing.F) {
	td, err := identity.ParseTrustDomain("cluster.local")
	if err != nil {
		f.Fatal(err)
	}
	withPolicy := seed(f)
	withPolicy.Policy = &meshcav1.Policy{Version: 7, Mode: meshcav1.Mode_MODE_PERMISSIVE, Source: &meshcav1.Source{Level: "mesh", Namespace: "a", Name: "b"},
		Ports: []*meshcav1.Port{{Number: 80, Mode: meshcav1.Mode_MODE_DISABLE}}, PortsSource: &meshcav1.Source{Level: "port", Namespace: "a", Name: "c"}}
	for _, w := range []*meshcav1.Workload{
		{}, withPolicy,
		{SpiffeId: cart, Bundle: &meshcav1.Bundle{TrustDomain: "cluster.local", Sequence: 1, X509Authorities: [][]byte{{0x30, 0x00}}}},
		{SpiffeId: cart, RenewAt: &timestamppb.Timestamp{Seconds: 1 << 60}},
	} {
		raw, err := proto.Marshal(w)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add(seedWorkload)
	f.Fuzz(func(t *testing.T, raw []byte) {
		w, err := Parse(td, &anypb.Any{TypeUrl: TypeURL, Value: raw})
		if err != nil {
			return
		}
		if w.ID.TrustDomain() != td || w.Bundle.TrustDomain() != td || len(w.Bundle.Authorities()) == 0 {
			t.Errorf("taken: %+v", w)
		}
		content, _, err := w.Marshal()
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		again, err := Parse(td, content)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		if (again.Policy == nil) != (w.Policy == nil) || w.Policy != nil && !w.Policy.Equal(again.Policy.Result) {
			t.Errorf("policy %+v became %+v", w.Policy, again.Policy)
		}
	})
}
