package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/meshca/meshca/ca/kube/check"
	"github.com/meshca/meshca/ca/kube/uninstall"
	"github.com/meshca/meshca/ca/kube/volumes"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/meshca/findings"
)

// someReport has a result of each status, one of them with all that a result can have.
func someReport() *check.Report {
	return &check.Report{
		Version: 1, Namespace: "meshca-system", Phase: check.After, Kubernetes: "v1.37.2",
		Checks: []check.Result{
			{Code: "MC0101", Title: "Kubernetes version", Status: check.Holds, Found: "Kubernetes v1.37.2"},
			{Code: "MC0303", Title: "roots, marker and shared state", Status: check.Unknown,
				Found: `could not be told: reading Secret meshca-root-1 in namespace "meshca-system": secrets "meshca-root-1" is forbidden: User "ann" cannot get resource "secrets" in API group "" in the namespace "meshca-system"`,
				Next:  "ask as somebody who may read it (--context), or have the permission given to you"},
			{Code: "MC0402", Title: "CSI driver", Status: check.Broken, Found: "settings that are wrong: 1",
				Objects: []string{"serviceAccountTokenInSecrets is not true: pods' tokens are passed where they get into logs"},
				Next:    "delete the CSIDriver and apply the manifest or upgrade the release again; pods that run keep their identity meanwhile"},
			{Code: "MC0501", Title: "trust bundle in namespaces", Status: check.Holds, Found: "bundle 7 in 12 namespaces"},
			{Code: "MC0601", Title: "pods that are root on their node", Status: check.Attention, Found: "12 pods; 3 in kube-system beside, as is expected",
				Objects: []string{`shop/debug: container "c" is privileged`, "storage/csi-0: hostPath /var/lib/kubelet"}, More: 10,
				Next: "each of them can take any identity of its node; see whether they have to be so"},
		},
		Summary: check.Summary{Holds: 2, Attention: 1, Broken: 1, Unknown: 1},
	}
}

// TestCheckOutput keeps what people see, in 100 columns, with and without UTF-8.
func TestCheckOutput(t *testing.T) {
	for _, tt := range []struct {
		name, locale string
		all          bool
	}{{"some.txt", "C.UTF-8", false}, {"all.txt", "C.UTF-8", true}, {"ascii.txt", "C", false}} {
		t.Setenv("LC_ALL", tt.locale)
		var out bytes.Buffer
		if err := printReport(&out, someReport(), tt.all); err != nil {
			t.Fatal(err)
		}
		goldenFile(t, filepath.Join("testdata", "check-golden", tt.name), out.String())
		for line := range strings.Lines(out.String()) {
			if utf8.RuneCountInString(strings.TrimSuffix(line, "\n")) > lineWidth {
				t.Errorf("%s: too long: %q", tt.name, line)
			}
			if tt.locale == "C" && !isASCII(line) {
				t.Errorf("%s: not ASCII: %q", tt.name, line)
			}
		}
	}
	var doc bytes.Buffer
	if err := printResult(&doc, "json", someReport(), nil); err != nil {
		t.Fatal(err)
	}
	goldenFile(t, filepath.Join("testdata", "check-golden", "some.json"), doc.String())
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r >= utf8.RuneSelf }) < 0
}

// TestF32_CheckVerdicts: what could not be told never passes for what holds.
func TestF32_CheckVerdicts(t *testing.T) {
	for _, tt := range []struct {
		summary check.Summary
		code    int
	}{
		{check.Summary{Holds: 3}, cli.ExitOK},
		{check.Summary{Holds: 3, Attention: 1}, cli.ExitOK},
		{check.Summary{Holds: 3, Unknown: 1, Attention: 1}, cli.ExitUnknown},
		{check.Summary{Holds: 3, Unknown: 1, Broken: 1}, cli.ExitRefused},
	} {
		err := verdictOf(&check.Report{Summary: tt.summary})
		code := cli.ExitOK
		if errors.As(err, new(*cli.UnknownError)) {
			code = cli.ExitUnknown
		} else if err != nil {
			code = cli.ExitRefused
		}
		if code != tt.code {
			t.Errorf("%+v: %v", tt.summary, err)
		}
	}
}

// TestEveryCodeHasItsPage: whoever sees a code can ask what it means.
func TestEveryCodeHasItsPage(t *testing.T) {
	for _, c := range check.Codes() {
		page, ok := findings.Find(c.Code)
		if !ok || page.Title != c.Title || page.Means == "" || page.See == "" || page.Do == "" {
			t.Errorf("the page of %s, %q, is %+v", c.Code, c.Title, page)
		}
	}
}

// TestUninstallOutput keeps what people and scripts see.
func TestUninstallOutput(t *testing.T) {
	t.Setenv("LC_ALL", "C.UTF-8")
	o := &uninstallOptions{agents: "meshca-agents", cluster: clusterFlags{namespace: "meshca-system"}}
	mounted := &uninstall.MountedError{Pods: []volumes.Pod{{Namespace: "bank", Name: "old-0"}, {Namespace: "shop", Name: "cart-7d9f-x2x8l", Node: "node-4", Ending: true}}}
	for i := range 10 {
		mounted.Pods = append(mounted.Pods, volumes.Pod{Namespace: "web", Name: "front-" + string(rune('a'+i)), Node: "node-1"})
	}
	for _, tt := range []struct {
		name   string
		result *uninstall.Result
		err    error
		flags  func(*uninstallOptions)
	}{
		{name: "done", result: &uninstall.Result{Deleted: []string{"DaemonSet meshca-agent in namespace meshca-agents", "CSIDriver csi.meshca.dev"},
			Foreign: []string{"ClusterRole meshca"}, Kept: []string{"the root of trust domain cluster.local in namespace meshca-system"}, Release: "ops/mesh"}},
		{name: "dry", result: &uninstall.Result{DryRun: true, Deleted: []string{"CSIDriver csi.meshca.dev"}, Kept: []string{"the root"}}},
		{name: "root", result: &uninstall.Result{Deleted: []string{"ConfigMap meshca-roots in namespace meshca-system"}}},
		{name: "nothing", result: &uninstall.Result{Deleted: []string{}}},
		{name: "pods", err: mounted},
		{name: "only-pods", flags: func(o *uninstallOptions) { o.onlyPods = true }},
	} {
		options := *o
		if tt.flags != nil {
			tt.flags(&options)
		}
		doc := newUninstalled(tt.result, tt.err)
		var text, document bytes.Buffer
		if err := doc.text(&text, &options); err != nil {
			t.Fatal(err)
		}
		if hint := uninstallHint(tt.err); hint != nil {
			text.WriteString("meshca: " + hint.Error() + "\n")
		}
		goldenFile(t, filepath.Join("testdata", "uninstall-golden", tt.name+".txt"), text.String())
		if err := printResult(&document, "json", doc, nil); err != nil || !json.Valid(document.Bytes()) {
			t.Fatal(err)
		}
		goldenFile(t, filepath.Join("testdata", "uninstall-golden", tt.name+".json"), document.String())
	}
}
