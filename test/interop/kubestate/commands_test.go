package kubestate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/test/testenv"
)

// program is meshca with a kubeconfig for the cluster.
type program struct{ path, kubeconfig string }

func newProgram(t *testing.T) program {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	check(t, err)
	dir := t.TempDir()
	p := program{filepath.Join(dir, "meshca"), filepath.Join(dir, "kubeconfig")}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", p.path, "./cmd/meshca")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c := cluster.Get(t)
	check(t, os.WriteFile(p.kubeconfig, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: admin, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: admin}}]
current-context: test
`, c.URL(), c.CAFile(), c.AdminToken()), 0o600))
	return p
}

// run returns what the command prints, and its exit code.
func (p program) run(t *testing.T, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), p.path, append(args, "--kubeconfig", p.kubeconfig)...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// The marker is there and the key is not: the CA refuses, meshca restore brings the
// key back, and the CA signs again with the same root.
func TestF13_F64_BackupAndRestoreAsPeopleTypeThem(t *testing.T) {
	p := newProgram(t)
	ns := newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	settled(t, ns)
	r.stop()
	file := filepath.Join(t.TempDir(), "backup.json")
	out, errs, code := p.run(t, "", "backup", "-n", ns, "--file", file)
	if code != 0 || !strings.Contains(out, "holds the root key") {
		t.Fatalf("backup: %d %s %s", code, out, errs)
	}
	info, err := os.Stat(file)
	check(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the backup has mode %v", info.Mode())
	}
	if _, errs, code = p.run(t, "", "backup", "-n", ns, "--file", file); code != 1 || !strings.Contains(errs, "exists") {
		t.Errorf("over a file that is there: %d %s", code, errs)
	}
	piped, _, code := p.run(t, "", "backup", "-n", ns, "--file", "-")
	if code != 0 || !strings.Contains(piped, "PRIVATE KEY") {
		t.Errorf("to standard output: %d", code)
	}

	check(t, admin(t).Secrets(ns).Delete(context.Background(), state.SecretName(1), metav1.DeleteOptions{}))
	waiting := start(t, ns, options{})
	waiting.refuses(t, new(*state.LostError), "meshca restore")
	out, errs, code = p.run(t, piped, "restore", "-n", ns, "--file", "-", "-o", "json")
	var done struct {
		state.Restored
		TrustDomain string `json:"trust_domain"`
	}
	if err := json.Unmarshal([]byte(out), &done); err != nil || code != 0 || done.TrustDomain != "cluster.local" ||
		len(done.Created) != 1 || done.Created[0] != "Secret meshca-root-1" || len(done.Kept) != 2 {
		t.Fatalf("restore: %d %s %s", code, out, errs)
	}
	if !waiting.root(t).Equal(root) {
		t.Error("another root")
	}
	waiting.stop()
	if out, _, code = p.run(t, "", "restore", "-n", ns, "--file", file); code != 0 || !strings.Contains(out, "nothing is changed") {
		t.Errorf("restore of what is there: %d %s", code, out)
	}

	// Refusals.
	other := newNamespace(t)
	r = start(t, other, options{})
	r.root(t)
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"restore", "-n", other, "--file", file}, 1, "holds another root"},
		{[]string{"restore", "-n", other}, 2, "--file"},
		{[]string{"restore", "-n", other, "--file", p.kubeconfig}, 1, "not JSON"},
		{[]string{"backup", "-n", newNamespace(t), "--file", file + "2"}, 1, "--namespace"},
		{[]string{"backup", "-n", other, "--file", file + "2", "--context", "none"}, 2, "--context"},
	} {
		if _, errs, code := p.run(t, "", tt.args...); code != tt.code || !strings.Contains(errs, tt.says) {
			t.Errorf("%q: %d %s", tt.args, code, errs)
		}
	}
	if _, err := os.Stat(file + "2"); err == nil {
		t.Error("a refused backup has left a file")
	}
}
