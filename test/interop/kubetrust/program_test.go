package kubetrust

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/meshca/meshca/test/kubetest"
	"github.com/meshca/meshca/test/testenv"
)

// serve runs meshca as an administrator of the cluster until the test ends.
func serve(t *testing.T, ns, agents string) {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	check(t, err)
	c, dir := cluster.Get(t), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	build := exec.CommandContext(t.Context(), "go", "build", "-o", in("meshca"), "./cmd/meshca")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, content := range map[string]string{
		"token":  c.AdminToken(),
		"config": fmt.Sprintf("trust_domain: rate.test\nkubernetes: {issuer: %q, agents_namespace: %s}\n", kubetest.Issuer, agents),
		"kubeconfig": fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: ca, user: {tokenFile: %q}}]
contexts: [{name: test, context: {cluster: test, user: ca}}]
current-context: test
`, c.URL(), c.CAFile(), in("token")),
	} {
		check(t, os.WriteFile(in(name), []byte(content), 0o600))
	}
	var logs bytes.Buffer
	cmd := exec.Command(in("meshca"), "serve", "--config", in("config"), "--kubeconfig", in("kubeconfig"), "--namespace", ns,
		"--listen", "127.0.0.1:0", "--ops-listen", "", "--audit-log", in("audit"))
	cmd.Stdout, cmd.Stderr = &logs, &logs
	check(t, cmd.Start())
	t.Cleanup(func() {
		check(t, cmd.Process.Signal(syscall.SIGTERM))
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("meshca: %v\n%s", err, logs.String())
		}
	})
}

// A thousand namespaces get the bundle at the documented rate, of 50 a second, from
// the program as it is: no client of its has another limit before that one.
func TestAThousandNamespacesAreWrittenAtTheDocumentedRate(t *testing.T) {
	client := dial(t, "", nil)
	ns, agents := place(t, "rate-ca", nil), place(t, "rate-agents", nil)
	thousand(t, "rate")
	serve(t, ns, agents)
	var began time.Time
	within(t, 2*time.Minute, "the first of them", func() error {
		if have(t, client) == 0 {
			return fmt.Errorf("none")
		}
		began = time.Now()
		return nil
	})
	within(t, 2*time.Minute, "all of them", func() error {
		if n := have(t, client); n != count+1 {
			return fmt.Errorf("%d of %d", n, count+1)
		}
		return nil
	})
	// 19 s with a second's worth in hand; the default of client-go makes it 200 s.
	if took := time.Since(began); took < 15*time.Second || took > time.Minute {
		t.Errorf("%d namespaces took %v", count, took)
	}
}
