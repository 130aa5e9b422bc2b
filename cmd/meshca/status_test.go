package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/meshca/meshca/ca/kube/overview"
	"github.com/meshca/meshca/ca/kube/report"
	"github.com/meshca/meshca/cmd/internal/cli"
)

var statusNow = time.Date(2026, 3, 1, 20, 23, 10, 0, time.UTC)

// shopMesh is a mesh with one workload in each state, and many that hold.
func shopMesh() (report.Documents, []overview.Pod) {
	at := func(d time.Duration) time.Time { return statusNow.Add(d) }
	row := func(name, account string, ends time.Duration, findings ...report.Finding) report.Row {
		return report.Row{
			Name: name, Namespace: "shop", Pod: name, ID: "spiffe://cluster.local/ns/shop/sa/" + account, Node: "node-1",
			Connected: true, Since: at(-time.Hour), Issued: at(ends - time.Hour), Ends: at(ends), Bundle: 7, Policy: 48211, Findings: findings,
		}
	}
	d := &report.Document{
		Replica: "meshca-6d5f-abcde", TrustDomain: "cluster.local", RootNamespace: "meshca-system", Agents: "meshca-agents", Written: statusNow,
		Signing: report.Signing{Ready: true, Until: at(70 * time.Hour)},
		Bundle:  report.Bundle{Sequence: 7, Roots: []report.Root{{ID: "8f3c"}}}, Policy: report.Policy{Version: 48211},
		Ends: []report.Bucket{{Minutes: 0, Count: 0}, {Minutes: 5, Count: 1}, {Minutes: 60, Count: 34}},
		Rows: []report.Row{
			row("pay-5c66-qq9tz", "pay", 4*time.Minute, report.Finding{What: report.Refused, Since: at(-52 * time.Minute), Reason: "the pod shop/pay-5c66-qq9tz is not known to the API server"}),
			row("search-0", "search", 40*time.Minute, report.Finding{What: report.BundleBehind, Since: at(-3 * time.Minute)}),
			row("cart-7d9f-x2x8l", "cart", 21*time.Minute),
			{Name: "spiffe://cluster.local/vm/billing", ID: "spiffe://cluster.local/vm/billing", Connected: true, Bundle: 7},
		},
	}
	d.Rows[1].Bundle = 6
	var pods []overview.Pod
	add := func(name, node string, age time.Duration) {
		pods = append(pods, overview.Pod{UID: name, Namespace: "shop", Name: name, Node: node, Running: true, Created: at(-age)})
	}
	for i, name := range []string{"pay-5c66-qq9tz", "search-0", "cart-7d9f-x2x8l", "a-name-that-goes-on-and-on-until-there-is-no-room-for-it-in-the-table-7d9f-x2x8l"} {
		add(name, fmt.Sprint("node-", i), time.Hour)
	}
	add("young-0", "node-1", time.Second)
	var shown []string
	for i := range 30 {
		add(fmt.Sprint("calm-", i), "node-2", time.Hour)
		shown = append(shown, fmt.Sprint("calm-", i))
	}
	d.Shown = report.NewFingerprints(shown...)
	return report.Documents{Fresh: []*report.Document{d}}, pods
}

func TestStatusAsPeopleSeeIt(t *testing.T) {
	docs, pods := shopMesh()
	replicas := []string{"meshca-6d5f-abcde", "meshca-6d5f-fghij"}
	calm := func() *overview.Picture {
		quiet := *docs.Fresh[0]
		quiet.Rows = quiet.Rows[2:3]
		return overview.Merge(report.Documents{Fresh: []*report.Document{&quiet}}, replicas[:1], append(pods[2:3:3], pods[5:]...), "", statusNow)
	}
	// An upstream of somebody else's, as one replica sees it that can wait, and one
	// whose intermediate is nearly over.
	upstreams := func(sources ...*report.Source) *overview.Picture {
		var fresh []*report.Document
		for i, s := range sources {
			d := *docs.Fresh[0]
			d.Replica, d.Rows, d.Source = replicas[i], nil, s
			d.Signing.Until = statusNow.Add(time.Duration(30-8*i) * time.Hour)
			fresh = append(fresh, &d)
		}
		return overview.Merge(report.Documents{Fresh: fresh}, replicas[:len(sources)], pods[5:], "", statusNow)
	}
	sealed := &report.Source{
		Kind: "vault", State: "sealed", Detail: "Vault at https://vault:8200 is sealed; unseal it, and signing goes on by itself", RestartLoses: true,
		Next: "look again", NextAt: statusNow.Add(4 * time.Second),
	}
	given := &report.Source{Kind: "files", State: "ok", Notes: []string{"the CA in the files allows none below it: the replicas sign leaves with its key"}}
	picture := overview.Merge(docs, replicas, pods, "", statusNow)
	utf8Marks := marksFor(func(string) string { return "de_DE.UTF-8" })
	for name, view := range map[string]statusView{
		"trouble": {Picture: picture, marks: utf8Marks},
		"ascii":   {Picture: picture, marks: marksFor(func(string) string { return "C" })},
		"calm":    {Picture: calm(), marks: utf8Marks},
		"sealed":  {Picture: upstreams(sealed, sealed), marks: utf8Marks},
		"given":   {Picture: upstreams(given), marks: utf8Marks},
		"shop":    {Picture: overview.Merge(docs, replicas[:1], pods[2:3], "shop", statusNow), namespace: "shop", marks: utf8Marks},
		"empty":   {Picture: overview.Merge(report.Documents{Fresh: []*report.Document{{TrustDomain: "cluster.local", Replica: "a", Written: statusNow}}}, nil, nil, "", statusNow), marks: utf8Marks},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			if err := view.text(&b); err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(b.String()) {
				if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > columns {
					t.Errorf("%d columns: %s", n, line)
				}
			}
			if name == "ascii" && strings.IndexFunc(b.String(), func(r rune) bool { return r > 127 }) >= 0 {
				t.Error("it is not ASCII")
			}
			golden(t, "status-golden/"+name+".txt", b.String())
		})
	}
	data, err := json.MarshalIndent(picture, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "status-golden/trouble.json", string(data)+"\n")
	if finding, unknown := picture.Worst(); !finding || unknown {
		t.Error("there are findings, and nothing that cannot be told")
	}
	if finding, unknown := calm().Worst(); finding || unknown {
		t.Error("all is in order")
	}
}

// Three hundred in trouble: the first of them, and how to see the others.
func TestStatusIsCut(t *testing.T) {
	docs, pods := shopMesh()
	for i := range 300 {
		pods = append(pods, overview.Pod{UID: fmt.Sprint("lost-", i), Namespace: "shop", Name: fmt.Sprintf("lost-%03d", i), Node: "node-1", Running: true})
	}
	view := statusView{Picture: overview.Merge(docs, nil, pods, "", statusNow), marks: localMarks()}
	var short, long bytes.Buffer
	if err := view.text(&short); err != nil {
		t.Fatal(err)
	}
	view.all = true
	if err := view.text(&long); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Count(short.String(), "\n"); lines > 60 || !strings.Contains(short.String(), "more (--all)") || strings.Count(long.String(), "\n") < 600 {
		t.Errorf("%d lines:\n%s", lines, short.String())
	}
}

// Without a cluster, or with a kubeconfig that is none, the exit code says so.
func TestStatusWithoutACluster(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "kubeconfig")
	text := "apiVersion: v1\nkind: Config\nclusters: [{name: a, cluster: {server: 'https://127.0.0.1:1'}}]\ncontexts: [{name: a, context: {cluster: a}}]\ncurrent-context: a\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--kubeconfig", config}, 3, "127.0.0.1:1"},
		{[]string{"--kubeconfig", filepath.Join(dir, "none")}, 2, "--kubeconfig"},
		{[]string{"--kubeconfig", config, "-o", "yaml"}, 2, "-o"},
		{[]string{"x"}, 2, "unexpected argument"},
	} {
		var errs bytes.Buffer
		code := cli.Execute(t.Context(), newRoot(), append([]string{"status"}, tt.args...), io.Discard, &errs)
		stderr := errs.String()
		if code != tt.code || !strings.Contains(stderr, tt.says) {
			t.Errorf("%v: exit code %d, %s; want %d and %q", tt.args, code, stderr, tt.code, tt.says)
		}
	}
}
