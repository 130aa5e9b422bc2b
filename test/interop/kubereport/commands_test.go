package kubereport

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/census"
	"github.com/meshca/meshca/ca/kube/overview"
	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/test/testenv"
)

// program is meshca with a kubeconfig for the cluster.
type program struct{ path, dir string }

func newProgram(t *testing.T) program {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	check(t, err)
	p := program{filepath.Join(t.TempDir(), "meshca"), t.TempDir()}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", p.path, "./cmd/meshca")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return p
}

// run returns what the command prints as somebody, and its exit code.
func (p program) run(t *testing.T, token string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	c := cluster.Get(t)
	kubeconfig := filepath.Join(p.dir, "kubeconfig")
	check(t, os.WriteFile(kubeconfig, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: user, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: user}}]
current-context: test
`, c.URL(), c.CAFile(), token), 0o600))
	cmd := exec.CommandContext(t.Context(), p.path, append(args, "--kubeconfig", kubeconfig)...)
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

// meshedPod makes a pod that mounts our volume.
func meshedPod(t *testing.T, ns, name, node string) (uid string) {
	t.Helper()
	uid, err := cluster.Get(t).Create(t.Context(), "/api/v1/namespaces/"+ns+"/pods", map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name, "labels": map[string]any{"app": "cart"}},
		"spec": map[string]any{
			"serviceAccountName": "cart", "automountServiceAccountToken": false, "nodeName": node,
			"volumes": []any{map[string]any{"name": "meshca", "csi": map[string]any{"driver": overview.Driver, "readOnly": true}}},
			"containers": []any{map[string]any{
				"name": "app", "image": "none", "ports": []any{map[string]any{"containerPort": 8080}},
				"volumeMounts": []any{map[string]any{"name": "meshca", "mountPath": "/run/meshca", "readOnly": true}},
			}},
		},
	})
	check(t, err)
	return uid
}

// defined has PeerAuthentication served.
func defined(t *testing.T) {
	t.Helper()
	c := cluster.Get(t)
	config := &rest.Config{Host: c.URL(), BearerToken: c.AdminToken(), TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile()}}
	http, err := rest.HTTPClientFor(config)
	check(t, err)
	t.Cleanup(http.CloseIdleConnections)
	objects, err := dynamic.NewForConfigAndClient(config, http)
	check(t, err)
	k, err := definition.NewKeeper(objects, slog.New(slog.DiscardHandler))
	check(t, err)
	eventually(t, "PeerAuthentication is served", func() error {
		_, err := k.Ensure(t.Context())
		if err == nil {
			_, err = c.Get(t.Context(), "/apis/security.istio.io/v1/peerauthentications")
		}
		return err
	})
}

// Two pods, one shown and one that no stream shows, as people see them; and what they
// are told who may not, or who look in the wrong place.
func TestStatusAndExplainAsPeopleTypeThem(t *testing.T) {
	p, ns, c, ctx := newProgram(t), newNamespace(t), cluster.Get(t), context.Background()
	defined(t)
	admin := c.AdminToken()
	_, errs, code := p.run(t, admin, "status", "--ca-namespace", ns)
	if code != 3 || !strings.Contains(errs, "no CA reports in namespace") {
		t.Errorf("without a CA: %d %s", code, errs)
	}
	node := "node-" + ns
	_, err := c.CreateNode(ctx, node)
	check(t, err)
	_, err = c.CreateServiceAccount(ctx, ns, "cart")
	check(t, err)
	shown := meshedPod(t, ns, "cart-0", node)
	lost := meshedPod(t, ns, "cart-1", node)
	id := identitytest.ID(t, "spiffe://cluster.local/ns/"+ns+"/sa/cart")
	r := start(t, ns, "meshca-0", options{})
	seat := r.census.Shown(shown, id, node, time.Now())
	seat.Sent(census.Version{Resource: "1", Bundle: 1, Policy: 41}, true, time.Now())
	r.census.Issued(shown, id, node, time.Now(), time.Now().Add(time.Hour))
	r.census.Refused(lost, time.Now(), "its ServiceAccount is another one")

	eventually(t, "a status that names the one that is refused", func() error {
		out, errs, code := p.run(t, admin, "status", "--ca-namespace", ns, "-n", ns, "-o", "json")
		var picture overview.Picture
		if err := json.Unmarshal([]byte(out), &picture); err != nil {
			return fmt.Errorf("%w: %d %s", err, code, errs)
		}
		if code != 1 || len(picture.Workloads) != 2 || picture.Workloads[0].Pod != "cart-1" || picture.Workloads[0].State != overview.Failing || picture.Workloads[1].State != overview.Holds {
			return fmt.Errorf("exit code %d, %s", code, out)
		}
		return nil
	})
	out, _, code := p.run(t, admin, "status", "--ca-namespace", ns, "-n", ns)
	if code != 1 || !strings.Contains(out, "✗") || !strings.Contains(out, "meshca explain pod "+ns+"/cart-1") || !strings.Contains(out, "1 of 1 CA can sign") {
		t.Errorf("%d\n%s", code, out)
	}
	check(t, c.CreateYAML(ctx, "/apis/security.istio.io/v1/namespaces/"+ns+"/peerauthentications", []byte(
		"{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: default}, spec: {mtls: {mode: STRICT}}}")))
	out, _, code = p.run(t, admin, "explain", "pod", ns+"/cart-0", "--ca-namespace", ns)
	for _, words := range []string{"STRICT, by mesh " + ns + "/default", "port 8080: STRICT", "acknowledged: bundle 1, policy version 41", "is not installed"} {
		if !strings.Contains(out, words) {
			t.Errorf("%q is not said in\n%s", words, out)
		}
	}
	if code != 1 { // there is no CSIDriver here
		t.Errorf("exit code %d", code)
	}
	rights(t, p, ns)
}

// rights are those that the commands' help names: with them all is told, and what is
// missing is named.
func rights(t *testing.T, p program, ns string) {
	t.Helper()
	rule := func(group, resource string, verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{group}, Resources: []string{resource}, Verbs: verbs}
	}
	token := bind(t, ns, []rbacv1.PolicyRule{rule("", "configmaps", "list")})
	_, errs, code := p.run(t, token, "status", "--ca-namespace", ns, "-n", ns)
	if code != 3 || !strings.Contains(errs, `cannot list resource "pods"`) {
		t.Errorf("without pods: %d %s", code, errs)
	}
	_, errs, code = p.run(t, token, "status", "--ca-namespace", "default")
	if code != 3 || !strings.Contains(errs, `cannot list resource "configmaps"`) {
		t.Errorf("without configmaps: %d %s", code, errs)
	}
	full := newNamespace(t)
	r := start(t, full, "meshca-0", options{})
	token = bind(t, full, []rbacv1.PolicyRule{
		rule("", "configmaps", "list"), rule("", "pods", "list", "get"), rule("", "events", "list"), rule("security.istio.io", "peerauthentications", "list"),
	})
	_, err := cluster.Get(t).CreateServiceAccount(t.Context(), full, "cart")
	check(t, err)
	node := "node-" + full
	_, err = cluster.Get(t).CreateNode(t.Context(), node)
	check(t, err)
	uid := meshedPod(t, full, "cart-0", node)
	r.census.Shown(uid, identitytest.ID(t, "spiffe://cluster.local/ns/x/sa/cart"), node, time.Now())
	eventually(t, "a status in which all holds", func() error {
		out, errs, code := p.run(t, token, "status", "--ca-namespace", full, "-n", full)
		if code != 0 || !strings.Contains(out, "1 workload, all in order") {
			return fmt.Errorf("%d %s %s", code, out, errs)
		}
		return nil
	})
	out, _, code := p.run(t, token, "explain", "pod", full+"/cart-0", "--ca-namespace", full)
	if code != 3 || !strings.Contains(strings.Join(strings.Fields(out), " "), `cannot get resource "csidrivers"`) || !strings.Contains(out, "PERMISSIVE") {
		t.Errorf("without csidrivers: %d %s", code, out)
	}
}
