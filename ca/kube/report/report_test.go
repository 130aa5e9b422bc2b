package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/census"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func sources(t testing.TB) Sources {
	k := catest.New(t)
	return Sources{
		Authority: k.Authority, Ready: k.Authority.Ready, Census: census.New(),
		Pod: func(uid string) (Pod, bool) {
			return Pod{"shop", "pod-" + uid, !strings.HasPrefix(uid, "dead")}, !strings.HasPrefix(uid, "new")
		},
		Policy: func() (uint64, string) { return 41, "" }, Problems: func() []Problem { return nil },
	}
}

func rows(d *Document) map[string]Row {
	all := make(map[string]Row)
	for _, r := range d.Rows {
		all[r.Name] = r
	}
	return all
}

// What is said of workloads in each of their states.
func TestCompose(t *testing.T) {
	s, now := sources(t), time.Now()
	id := identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/cart")
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	v1, v2, v3 := census.Version{Resource: "1", Bundle: 1, Policy: 40}, census.Version{Resource: "2", Bundle: 2, Policy: 40}, census.Version{Resource: "3", Bundle: 1, Policy: 41}
	show := func(name string, sent ...census.Version) *census.Seat {
		seat := s.Census.Shown(name, id, "node-0", ago(time.Hour))
		seat.Sent(v1, true, ago(time.Hour))
		for _, v := range sent {
			seat.Sent(v, false, ago(time.Minute))
		}
		return seat
	}
	show("calm")
	s.Census.Issued("calm", id, "node-0", ago(20*time.Minute), now.Add(40*time.Minute))
	show("bundle", v2)
	show("policy", v3)
	s.Census.Shown("fast", id, "", ago(time.Minute)).Sent(v1, false, ago(time.Second))
	show("nack").Nacked("sequence 1 is lower", ago(time.Minute))
	show("late")
	s.Census.Issued("late", id, "", ago(50*time.Minute), now.Add(10*time.Minute))
	show("left").Leave(ago(time.Second))
	show("gone").Leave(ago(time.Minute))
	s.Census.Refused("refused", ago(time.Minute), "its ServiceAccount is gone")
	s.Census.Refused("history", ago(20*time.Minute), "once")
	s.Census.Issued("moved", id, "", ago(55*time.Minute), now.Add(5*time.Minute))
	s.Census.Issued("dead1", id, "", ago(time.Minute), now.Add(time.Hour))
	s.Census.Issued("new1", id, "", ago(time.Minute), now.Add(time.Hour))
	s.Census.Issued("new2", id, "", ago(time.Second), now.Add(time.Hour))
	s.Census.Issued("spiffe://cluster.local/vm", id, "", ago(2*time.Hour), now.Add(time.Minute))

	d := s.compose(Document{Replica: "meshca-0", TrustDomain: "cluster.local"}, now)
	if !d.Signing.Ready || d.Signing.Authority == "" || d.Bundle.Sequence != 1 || len(d.Bundle.Roots) != 1 || d.Policy.Version != 41 {
		t.Errorf("the authority: %+v", d)
	}
	want := map[string][]string{
		"calm": nil, "left": nil, "gone": nil, "bundle": {BundleBehind}, "policy": {PolicyBehind}, "fast": nil, "nack": {Refusing}, "late": {EndingSoon},
		"refused": {Refused}, "history": nil, "moved": nil, "new2": nil, "spiffe://cluster.local/vm": nil,
	}
	got := rows(d)
	for name, findings := range want {
		r, ok := got[name]
		var kinds []string
		for _, f := range r.Findings {
			kinds = append(kinds, f.What)
		}
		if !ok || fmt.Sprint(kinds) != fmt.Sprint(findings) {
			t.Errorf("%s: listed %v, findings %v; want %v", name, ok, kinds, findings)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d rows; want %d", len(got), len(want))
	}
	if !got["left"].Connected || got["gone"].Connected {
		t.Errorf("a stream that has just ended: %+v; one that ended before: %+v", got["left"], got["gone"])
	}
	if want := (Counts{Workloads: 13, Connected: 7, BundleBehind: 1, PolicyBehind: 1, Refused: 1, Refusing: 1, EndingSoon: 1}); d.Counts != want {
		t.Errorf("counts %+v; want %+v", d.Counts, want)
	}
	if d.Rows[0].Name != "refused" || d.Rows[1].Name != "late" {
		t.Errorf("first are %s and %s", d.Rows[0].Name, d.Rows[1].Name)
	}
	if again := s.compose(Document{}, now); again.Counts.Workloads != 13 {
		t.Errorf("then %+v", again.Counts)
	}
}

// An authority that cannot sign, policies that are held back, and parts that fail.
func TestComposeTrouble(t *testing.T) {
	s := sources(t)
	long := strings.Repeat("x", 1000)
	s.Ready = func() error { return errors.New("the last proof failed: " + long) }
	s.Policy = func() (uint64, string) { return 0, long }
	s.Problems = func() []Problem { return []Problem{{"pods", long}} }
	d := s.compose(Document{}, time.Now())
	if d.Signing.Ready || !strings.HasPrefix(d.Signing.Reason, "the last proof failed") || len(d.Policy.Held) > maxReason+3 || len(d.Degraded[0].Reason) > maxReason+3 {
		t.Errorf("%+v", d)
	}
}

// Ten thousand workloads, half of them in trouble, and the most that a census holds:
// the document stays within its bounds, and nobody is lost count of.
func TestT17_DocumentsAreBounded(t *testing.T) {
	for _, tt := range []struct{ all, trouble int }{{10_000, 0}, {10_000, 5_000}, {census.Most, 1000}} {
		t.Run(fmt.Sprint(tt), func(t *testing.T) {
			s, now := sources(t), time.Now()
			populate(t, s.Census, tt.all, tt.trouble, now)
			began := time.Now()
			d := s.compose(Document{Replica: "meshca-0", TrustDomain: "cluster.local"}, now)
			composed := time.Since(began)
			data, err := d.Encode()
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("composed in %v, encoded in %v: %d bytes, %d rows, %d and %d by fingerprint, %d cut, %d untold",
				composed, time.Since(began)-composed, len(data), len(d.Rows), len(d.Shown), len(d.Issued), d.Cut, d.Untold)
			if len(data) > MaxBytes {
				t.Errorf("%d bytes", len(data))
			}
			if n := len(d.Rows) + len(d.Shown) + len(d.Issued) + d.Cut + d.Untold; n != d.Counts.Workloads || n < tt.all*98/100 || d.Full != (n < tt.all) {
				t.Errorf("%d are accounted for", n)
			}
			read, err := Parse(data)
			if err != nil {
				t.Fatal(err)
			}
			for i := tt.trouble; i < min(tt.all, 10_000) && tt.all <= 10_000; i++ {
				if _, listed := rows(read)[name(i)]; i%997 == 0 && !listed && !read.Shown.Has(name(i)) {
					t.Fatalf("%s is not there", name(i))
				}
			}
		})
	}
}

func name(i int) string { return fmt.Sprintf("eeeeeeee-0000-4000-8000-%012d", i) }

func populate(t testing.TB, c *census.Census, all, trouble int, now time.Time) {
	id := identitytest.ID(t, "spiffe://cluster.local/ns/some-namespace/sa/some-account")
	for i := range all {
		seat := c.Shown(name(i), id, fmt.Sprintf("worker-%d", i%100), now)
		seat.Sent(census.Version{Resource: "1", Bundle: 1, Policy: 12345678}, true, now)
		c.Issued(name(i), id, "worker-0", now, now.Add(time.Hour))
		if i < trouble {
			seat.Nacked(strings.Repeat("the bundle is not one of ours ", 10), now)
			c.Refused(name(i), now, strings.Repeat("the pod is not known here ", 10))
		}
	}
}

func TestParse(t *testing.T) {
	d := Document{Replica: "meshca-0", TrustDomain: "cluster.local", Written: time.Now(), Shown: Fingerprints{1, 2}, Rows: []Row{{Name: "u"}}}
	good, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(map[string]any)) string {
		var o map[string]any
		if err := json.Unmarshal(good, &o); err != nil {
			t.Fatal(err)
		}
		f(o)
		data, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	for name, tt := range map[string]struct{ text, says string }{
		"as written":      {string(good), ""},
		"a newer field":   {change(func(o map[string]any) { o["weather"] = "fine" }), ""},
		"given up":        {`{"version":1,"replica":""}`, ""},
		"a newer version": {change(func(o map[string]any) { o["version"] = 2 }), "version 2"},
		"no version":      {`{}`, "version 0"},
		"no JSON":         {`version: 1`, "not a report"},
		"no time":         {change(func(o map[string]any) { delete(o, "written") }), "when it was written"},
		"no trust domain": {change(func(o map[string]any) { o["trust_domain"] = "A B" }), "trust domain"},
		"a nameless row":  {change(func(o map[string]any) { o["rows"] = []any{map[string]any{}} }), "without a name"},
		"half a set":      {change(func(o map[string]any) { o["shown"] = "AAA" }), "whole number"},
		"a set that lies": {change(func(o map[string]any) { o["shown"] = "AAAAAgAAAAE" }), "not in order"},
		"too large":       {`"` + strings.Repeat("x", MaxBytes) + `"`, "at most"},
	} {
		_, err := Parse([]byte(tt.text))
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v; want %q", name, err, tt.says)
		}
	}
}

func BenchmarkCompose(b *testing.B) {
	s, now := sources(b), time.Now()
	populate(b, s.Census, 10_000, 100, now)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.compose(Document{Replica: "meshca-0", TrustDomain: "cluster.local"}, now).Encode(); err != nil {
			b.Fatal(err)
		}
	}
}

// The document of a large mesh is published less often, and not never: once, the
// pause between two of them overflowed, and ended the CA.
func TestL1_PauseBetweenDocuments(t *testing.T) {
	for _, test := range []struct {
		size int
		err  error
		want time.Duration
	}{{large, nil, interval}, {large + 1, nil, slowInterval}, {large + 1, errors.New("no"), interval / 2}} {
		if got := pause(interval, test.size, test.err); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
	}
}
