package kubecheck

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/ca/kube/check"
	"github.com/meshca/meshca/test/testenv"
)

// program is meshca with a kubeconfig that knows the contexts admin, viewer (who may
// hardly read anything) and nowhere.
type program struct{ path, kubeconfig string }

func newProgram(t *testing.T) program {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	must(t, err)
	dir := t.TempDir()
	p := program{filepath.Join(dir, "meshca"), filepath.Join(dir, "kubeconfig")}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", p.path, "./cmd/meshca")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c := cluster.Get(t)
	must(t, os.WriteFile(p.kubeconfig, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters:
- {name: test, cluster: {server: %q, certificate-authority: %q}}
- {name: nowhere, cluster: {server: "https://127.0.0.1:1"}}
users:
- {name: admin, user: {token: %q}}
- {name: viewer, user: {token: %q, as: viewer, as-groups: ["system:authenticated"]}}
contexts:
- {name: admin, context: {cluster: test, user: admin}}
- {name: viewer, context: {cluster: test, user: viewer}}
- {name: nowhere, context: {cluster: nowhere, user: admin}}
current-context: admin
`, c.URL(), c.CAFile(), c.AdminToken(), c.AdminToken()), 0o600))
	return p
}

// run returns what the command prints, and its exit code.
func (p program) run(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), p.path, append(args, "--kubeconfig", p.kubeconfig)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestCheckAsPeopleTypeIt(t *testing.T) {
	c := install(t)
	bindViewer(t, c)
	p := newProgram(t)
	for _, tt := range []struct {
		name string
		args []string
		code int
		says string // on one of both streams
	}{
		{"whole", []string{"check"}, 0, "all 26 checks hold"},
		{"all", []string{"check", "--all"}, 0, "✓ MC0303 roots, marker and shared state: they fit: trust domain cluster.local, 1 root, bundle 1"},
		{"before", []string{"check", "-n", "none", "--agents-namespace", "none-agents", "--kubelet-dir", "/k"}, 0, "fit for meshca"},
		{"hardly any permission", []string{"check", "--context", "viewer"}, 3, "? MC0302 permissions of the CA: could not be told"},
		{"no connection", []string{"check", "--context", "nowhere"}, 3, "is the cluster up"},
		{"no such context", []string{"check", "--context", "none"}, 2, "--context"},
		{"no such form", []string{"check", "-o", "yaml"}, 2, "text or json"},
	} {
		out, errs, code := p.run(t, tt.args...)
		if code != tt.code || !strings.Contains(out+errs, tt.says) {
			t.Errorf("%s: %d\n%s%s", tt.name, code, out, errs)
		}
	}
	c.remove(t, csiDrivers, "", "csi.meshca.dev")
	out, errs, code := p.run(t, "check", "-o", "json")
	var r check.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != 1 || r.Version != 1 || r.Summary.Broken != 1 || result(t, &r, "MC0402").Status != check.Broken {
		t.Errorf("%d %s %s", code, out, errs)
	}
	if strings.Contains(out, "PRIVATE") {
		t.Error("it prints keys")
	}
}

func TestUninstallAsPeopleTypeIt(t *testing.T) {
	c := install(t)
	bindViewer(t, c)
	p := newProgram(t)
	app(t, c, "shop", "p", mounts, volume)
	defer c.remove(t, pods, "shop", "p")
	collect(t, c, nil)
	for _, tt := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"a pod in the way", []string{"uninstall"}, 1, "shop/p  on node1"},
		{"only pods", []string{"uninstall", "--only-pods"}, 1, "refusing to uninstall: 1 pod has a volume"},
		{"waiting", []string{"uninstall", "--wait", "--timeout", "2s"}, 1, "waiting for 1 of 1 pods to end (shop/p)"},
		{"no permission", []string{"uninstall", "--only-pods", "--context", "viewer"}, 3, "ask as somebody who may"},
		{"no connection", []string{"uninstall", "--context", "nowhere"}, 3, "is the cluster up"},
		{"two that do not go together", []string{"uninstall", "--only-pods", "--dry-run"}, 2, "deletes nothing"},
		{"another domain", []string{"uninstall", "--delete-root", "other"}, 1, `you have typed "other"`},
	} {
		out, errs, code := p.run(t, tt.args...)
		if code != tt.code || !strings.Contains(out+errs, tt.says) {
			t.Errorf("%s: %d\n%s%s", tt.name, code, out, errs)
		}
	}
	var doc struct {
		Pods    []struct{ Namespace, Name, Node string }
		Deleted []string
	}
	out, errs, code := p.run(t, "uninstall", "-o", "json")
	if err := json.Unmarshal([]byte(out), &doc); err != nil || code != 1 || len(doc.Pods) != 1 || doc.Pods[0].Name != "p" || len(doc.Deleted) != 0 {
		t.Errorf("%d %s %s", code, out, errs)
	}
	c.remove(t, pods, "shop", "p")
	if out, errs, code = p.run(t, "uninstall", "--only-pods"); code != 0 || !strings.Contains(out, "no pod has a volume") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	out, errs, code = p.run(t, "uninstall", "-o", "json")
	if err := json.Unmarshal([]byte(out), &doc); err != nil || code != 0 || len(doc.Deleted) < 14 {
		t.Errorf("%d %s %s", code, out, errs)
	}
	if out, errs, code = p.run(t, "uninstall"); code != 0 || !strings.Contains(out, "nothing of meshca is installed") {
		t.Errorf("%d %s %s", code, out, errs)
	}
}
