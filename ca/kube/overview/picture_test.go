package overview

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/ca/kube/report"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func pod(name string, change ...func(*Pod)) Pod {
	p := Pod{UID: "uid-" + name, Namespace: "shop", Name: name, ServiceAccount: "cart", Node: "node-1", Running: true, Created: now.Add(-time.Hour)}
	for _, c := range change {
		c(&p)
	}
	return p
}

func doc(replica string, change func(*report.Document)) *report.Document {
	d := &report.Document{
		Replica: replica, TrustDomain: "cluster.local", Written: now,
		Signing: report.Signing{Ready: true, Until: now.Add(72 * time.Hour)},
		Bundle:  report.Bundle{Sequence: 7, Roots: []report.Root{{ID: "8f3c"}}}, Policy: report.Policy{Version: 41},
	}
	if change != nil {
		change(d)
	}
	return d
}

func row(name string, change func(*report.Row)) report.Row {
	r := report.Row{
		Name: "uid-" + name, Namespace: "shop", Pod: name, ID: "spiffe://cluster.local/ns/shop/sa/cart", Node: "node-1",
		Connected: true, Since: now.Add(-time.Hour), Issued: now.Add(-20 * time.Minute), Ends: now.Add(40 * time.Minute), Bundle: 7, Policy: 41,
	}
	if change != nil {
		change(&r)
	}
	return r
}

func finding(what string, ago time.Duration) []report.Finding {
	return []report.Finding{{What: what, Since: now.Add(-ago), Reason: "why"}}
}

// One pod, and what two replicas say of it.
func TestMergeOneWorkload(t *testing.T) {
	gone := func(r *report.Row) { r.Connected, r.Since = false, now.Add(-10*time.Minute) }
	for name, tt := range map[string]struct {
		a, b  []report.Row
		shown bool // by b, without a row
		cut   int  // that b does not tell
		pod   func(*Pod)
		state State
		words []string
	}{
		"connected":                   {a: []report.Row{row("x", nil)}, state: Holds},
		"connected elsewhere":         {a: []report.Row{row("x", gone)}, b: []report.Row{row("x", nil)}, state: Holds},
		"vouched for elsewhere":       {a: []report.Row{row("x", gone)}, shown: true, state: Holds},
		"vouched for":                 {shown: true, state: Holds},
		"disconnected":                {a: []report.Row{row("x", gone)}, state: Attention, words: []string{"the agent on node-1"}},
		"never heard of":              {state: Attention, words: []string{"the agent on node-1"}},
		"not running":                 {pod: func(p *Pod) { p.Running = false }, state: Attention, words: []string{"does not run yet"}},
		"just made":                   {pod: func(p *Pod) { p.Created = now.Add(-time.Second) }, state: Starting},
		"just made, and lost again":   {a: []report.Row{row("x", gone)}, pod: func(p *Pod) { p.Created = now.Add(-time.Second) }, state: Attention, words: []string{"the agent on node-1"}},
		"not told":                    {cut: 3, state: Unknown, words: []string{"than they can tell of"}},
		"refused, with a certificate": {a: []report.Row{row("x", func(r *report.Row) { r.Findings = finding(report.Refused, time.Minute) })}, state: Attention, words: []string{"the CA refuses it a certificate: why"}},
		"refused, without":            {a: []report.Row{row("x", func(r *report.Row) { r.Ends, r.Findings = time.Time{}, finding(report.Refused, time.Minute) })}, state: Failing, words: []string{"the CA refuses it a certificate: why"}},
		"refused, and then served by b": {a: []report.Row{row("x", func(r *report.Row) {
			gone(r)
			r.Issued = time.Time{}
			r.Ends = time.Time{}
			r.Findings = finding(report.Refused, 30*time.Minute)
		})}, b: []report.Row{row("x", nil)}, state: Holds},
		"late, and renewed by b": {a: []report.Row{row("x", func(r *report.Row) {
			r.Ends = now.Add(time.Minute)
			r.Findings = finding(report.EndingSoon, time.Minute)
		})}, b: []report.Row{row("x", gone)}, state: Holds},
		"late": {a: []report.Row{row("x", func(r *report.Row) {
			r.Ends = now.Add(10 * time.Minute)
			r.Findings = finding(report.EndingSoon, 50*time.Minute)
		})}, state: Attention, words: []string{"not renewed when it should"}},
		"too late": {a: []report.Row{row("x", func(r *report.Row) {
			r.Ends = now.Add(time.Minute)
			r.Findings = finding(report.EndingSoon, 59*time.Minute)
		})}, state: Failing, words: []string{"not renewed when it should"}},
		"behind": {a: []report.Row{row("x", func(r *report.Row) { r.Findings = finding(report.BundleBehind, time.Minute) })}, state: Attention, words: []string{"last bundle is not acknowledged"}},
		"behind on a stream that is over": {a: []report.Row{row("x", func(r *report.Row) {
			r.Since = now.Add(-2 * time.Hour)
			r.Findings = finding(report.PolicyBehind, time.Minute)
		})}, b: []report.Row{row("x", nil)}, state: Holds},
		"a finding that is not known here": {a: []report.Row{row("x", func(r *report.Row) { r.Findings = finding("too_old", time.Minute) })}, state: Attention, words: []string{"too_old: why"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := pod("x")
			if tt.pod != nil {
				tt.pod(&p)
			}
			docs := report.Documents{Fresh: []*report.Document{
				doc("a", func(d *report.Document) { d.Rows = tt.a }),
				doc("b", func(d *report.Document) {
					if d.Rows, d.Cut = tt.b, tt.cut; tt.shown {
						d.Shown = report.NewFingerprints(p.UID)
					}
				}),
			}}
			got := Merge(docs, []string{"a", "b"}, []Pod{p}, "", now)
			if got.Counts.Workloads != 1 || got.Counts.States[tt.state] != 1 || len(got.Findings) != 0 {
				t.Fatalf("%+v; want it to be %s", got, tt.state)
			}
			var said []string
			for _, w := range got.Workloads {
				for _, f := range w.Findings {
					said = append(said, f.Reason)
				}
			}
			if len(said) != len(tt.words) || len(said) > 0 && !strings.Contains(said[0], tt.words[0]) {
				t.Errorf("findings %q; want %q", said, tt.words)
			}
		})
	}
}

// What is said of the CA itself.
func TestMergeReplicas(t *testing.T) {
	docs := report.Documents{
		Fresh: []*report.Document{
			doc("meshca-0", nil),
			doc("meshca-1", func(d *report.Document) {
				d.Signing.Ready, d.Signing.Reason = false, "the last proof failed"
				d.Upstream = &report.Trouble{Since: now, Reason: "permission denied"}
				d.Bundle.Sequence, d.Policy.Held = 6, "its etcd was restored"
				d.Degraded = []report.Problem{{Part: "pods", Reason: "cannot list"}}
				d.Written = now.Add(-5 * time.Minute)
				d.Full = true
			}),
		},
		Stale: []report.Stale{{Replica: "meshca-2", Reason: "it was last heard from 3m0s ago"}, {Replica: "long-gone", Reason: "x"}},
	}
	p := Merge(docs, []string{"meshca-0", "meshca-1", "meshca-2", "meshca-3"}, nil, "", now)
	all := strings.Join(p.Findings, "\n")
	for _, words := range []string{
		"meshca-1: it cannot sign: the last proof failed", "permission denied", "its etcd was restored", "bundle 6, and others 7",
		"pods: cannot list", "differs from the API server's by 5m0s", "more workloads than it can remember",
		"meshca-2: its pod is there, and it was last heard from 3m0s ago", "meshca-3: its pod is there, and it does not report",
	} {
		if !strings.Contains(all, words) {
			t.Errorf("%q is not said in\n%s", words, all)
		}
	}
	if len(p.Findings) != 9 || len(p.Replicas) != 4 || p.Bundle != 7 || strings.Contains(all, "long-gone") {
		t.Errorf("%+v", p)
	}
}

// Who is no pod with our volume is shown if there is something to say, and always
// where it is no pod.
func TestMergeOthers(t *testing.T) {
	vm := "spiffe://cluster.local/vm"
	docs := report.Documents{Fresh: []*report.Document{doc("a", func(d *report.Document) {
		d.Rows = []report.Row{
			row("x", nil), row("agent", nil),
			row("sidecar", func(r *report.Row) { r.Findings = finding(report.Refusing, time.Minute) }),
			{Name: vm, ID: vm, Connected: true},
		}
	})}}
	names := func(namespace string) (all []string) {
		for _, w := range Merge(docs, []string{"a"}, []Pod{pod("x")}, namespace, now).Workloads {
			all = append(all, w.Name())
		}
		return all
	}
	if got := names(""); !slices.Equal(got, []string{"shop/sidecar", "shop/x", vm}) {
		t.Errorf("%v", got)
	}
	if got := names("bank"); !slices.Equal(got, []string{"shop/x"}) { // the pods are given
		t.Errorf("%v", got)
	}
}

// Ten thousand pods at three replicas.
func TestMergeMany(t *testing.T) {
	const many = 10_000
	var pods []Pod
	names := make([][]string, 3)
	for i := range many {
		pods = append(pods, pod(fmt.Sprint(i), func(p *Pod) { p.Node = fmt.Sprint("node-", i%100) }))
		names[i%3] = append(names[i%3], "uid-"+fmt.Sprint(i))
	}
	var docs report.Documents
	for i := range names {
		docs.Fresh = append(docs.Fresh, doc(fmt.Sprint("meshca-", i), func(d *report.Document) {
			d.Shown = report.NewFingerprints(names[i][1:]...)
		}))
	}
	began := time.Now()
	p := Merge(docs, nil, pods, "", now)
	t.Logf("merged in %v", time.Since(began))
	if p.Unlisted != many-3 || p.Counts.States[Attention] != 3 || p.Counts.Nodes != 100 {
		t.Errorf("%d unlisted, %+v; three are missing", p.Unlisted, p.Counts)
	}
}
