package kubereport

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/overview"
	"github.com/meshca/meshca/ca/kube/report"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/test/kubetest"
	"github.com/meshca/meshca/test/testenv"
)

// running starts a program that is stopped when the test ends.
func running(t *testing.T, name, path string, args ...string) *testenv.Process {
	t.Helper()
	p, err := testenv.Start(filepath.Join(t.TempDir(), name+".log"), path, args...)
	check(t, err)
	t.Cleanup(func() {
		check(t, p.Stop(20*time.Second))
		if t.Failed() {
			t.Logf("%s: %s", name, p.LogTail(20))
		}
	})
	return p
}

// startCA runs a whole CA against the API server, and returns its address.
func startCA(t *testing.T, p program, ns string) (address string) {
	t.Helper()
	c, dir := cluster.Get(t), t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	address = l.Addr().String()
	check(t, l.Close())
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		check(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	token := write("token", c.AdminToken())
	kubeconfig := write("kubeconfig", fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: ca, user: {tokenFile: %q}}]
contexts: [{name: test, context: {cluster: test, user: ca}}]
current-context: test
`, c.URL(), c.CAFile(), token))
	config := write("meshca.yaml", fmt.Sprintf("trust_domain: cluster.local\nroot_namespace: %s\nkubernetes: {issuer: %q, agents_namespace: %s}\n", ns, kubetest.Issuer, ns))
	running(t, "meshca", p.path, "serve", "--config", config, "--kubeconfig", kubeconfig, "--namespace", ns,
		"--listen", address, "--ops-listen", "", "--audit-log", filepath.Join(dir, "audit.jsonl"))
	return address
}

// A real CA and a real agent that keeps one pod's identity: status shows the pod with
// its certificate, and when the agent has gone says that no stream shows it.
func TestStatusOfARealMesh(t *testing.T) {
	p, ns, c, ctx := newProgram(t), newNamespace(t), cluster.Get(t), t.Context()
	root, err := testenv.RepositoryRoot()
	check(t, err)
	agent := filepath.Join(filepath.Dir(p.path), "agent")
	build := exec.CommandContext(ctx, "go", "build", "-o", agent, "./cmd/agent")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	address := startCA(t, p, ns)
	node := "node-" + ns
	_, err = c.CreateNode(ctx, node)
	check(t, err)
	_, err = c.CreateServiceAccount(ctx, ns, "cart")
	check(t, err)
	uid := meshedPod(t, ns, "cart-0", node)
	token, err := c.Token(ctx, ns, "cart", kubetest.TokenRequest{Audiences: []string{"meshca"}, Seconds: 3600, PodName: "cart-0", PodUID: uid})
	check(t, err)
	dir := t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "token"), []byte(token), 0o600))
	eventually(t, "the trust anchor", func() error {
		o, err := client(t, "").CoreV1().ConfigMaps(ns).Get(ctx, trust.ConfigMapName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "root.pem"), []byte(o.Data[trust.ConfigMapKey]), 0o600)
	})
	_, port, err := net.SplitHostPort(address)
	check(t, err)
	a := running(t, "agent", agent, "--ca", "localhost:"+port, "--trust-anchor", filepath.Join(dir, "root.pem"),
		"--token-file", filepath.Join(dir, "token"), "--socket", filepath.Join(dir, "agent.sock"))

	look := func() (code int, w overview.Workload, err error) {
		out, errs, code := p.run(t, c.AdminToken(), "status", "--ca-namespace", ns, "-n", ns, "-o", "json")
		var picture overview.Picture
		if err := json.Unmarshal([]byte(out), &picture); err != nil {
			return code, w, fmt.Errorf("%w: %d %s", err, code, errs)
		}
		i := slices.IndexFunc(picture.Workloads, func(w overview.Workload) bool { return w.UID == uid })
		if i < 0 {
			return code, w, fmt.Errorf("it is not listed in %s", out)
		}
		return code, picture.Workloads[i], nil
	}
	eventually(t, "the pod holds", func() error {
		code, w, err := look()
		if err == nil && (code != 0 || w.State != overview.Holds || w.Bundle != 1 || w.Policy == 0 || time.Until(w.Ends) < 50*time.Minute || w.ID != "spiffe://cluster.local/ns/"+ns+"/sa/cart") {
			err = fmt.Errorf("exit code %d, %+v", code, w)
		}
		return err
	})
	check(t, a.Stop(20*time.Second))
	eventually(t, "nobody shows the pod", func() error {
		code, w, err := look()
		if err == nil && (code != 1 || len(w.Findings) != 1 || w.Findings[0].What != "disconnected") {
			// A pod that is young has time to be shown.
			err = fmt.Errorf("exit code %d, %+v", code, w)
		}
		return err
	})
	docs, err := report.Read(ctx, client(t, "").CoreV1().ConfigMaps(ns), time.Now)
	check(t, err)
	if d := docs.Fresh[0]; d.RootNamespace != ns || d.Agents != ns || d.Counts.Workloads != 1 || d.Signing.Authority == "" {
		t.Errorf("%+v", d)
	}
}
