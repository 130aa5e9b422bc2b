package kubecheck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/test/kubetest"
	"github.com/meshca/meshca/test/testenv"

	"github.com/meshca/meshca/ca/kube/installed"
)

// helm runs the real one, and returns all that it says.
func helm(t *testing.T, p program, args ...string) (string, error) {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"tool", "-modfile=tools/helm/go.mod", "helm", "--kubeconfig", p.kubeconfig}, args...)...)
	cmd.Dir = root
	home := t.TempDir() // nothing of the person who tests
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	return out.String(), err
}

// runJobs does what controller and kubelet do for the hook's Job: it runs the very
// program with the Job's arguments and with a token of its ServiceAccount, and writes
// down how it ended. What it printed comes on the channel.
func runJobs(t *testing.T, c clients, p program) <-chan string {
	t.Helper()
	printed := make(chan string, 10)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		ran := make(map[string]bool)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			job, err := c.BatchV1().Jobs(system).Get(ctx, "meshca-uninstall", metav1.GetOptions{})
			if err != nil || ran[string(job.UID)] {
				continue
			}
			ran[string(job.UID)] = true
			out, err := runJob(ctx, t, c, p, job)
			if err != nil {
				out += "; the test: " + err.Error()
			}
			printed <- out
		}
	}()
	return printed
}

func runJob(ctx context.Context, t *testing.T, c clients, p program, job *batchv1.Job) (string, error) {
	spec := job.Spec.Template.Spec
	token, err := cluster.Get(t).Token(ctx, system, spec.ServiceAccountName, kubetest.TokenRequest{})
	if err != nil {
		return "", err
	}
	file := filepath.Join(filepath.Dir(p.kubeconfig), "job")
	if err := os.WriteFile(file, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: job, user: {token: %q}}]
contexts: [{name: job, context: {cluster: test, user: job}}]
current-context: job
`, cluster.Get(t).URL(), cluster.Get(t).CAFile(), token), 0o600); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, p.path, spec.Containers[0].Args...)
	cmd.Env = []string{"KUBECONFIG=" + file}
	out, runErr := cmd.CombinedOutput()
	if runErr != nil && !errors.As(runErr, new(*exec.ExitError)) {
		return string(out), runErr
	}
	now := metav1.Now()
	job.Status.StartTime = &now
	job.Status.UncountedTerminatedPods = &batchv1.UncountedTerminatedPods{}
	set := func(kind batchv1.JobConditionType) {
		job.Status.Conditions = append(job.Status.Conditions, batchv1.JobCondition{
			Type: kind, Status: "True", Reason: "Ended", LastTransitionTime: now, LastProbeTime: now,
		})
	}
	if runErr != nil {
		job.Status.Failed = 1
		set(batchv1.JobFailureTarget)
		set(batchv1.JobFailed)
	} else {
		job.Status.Succeeded, job.Status.CompletionTime = 1, &now
		set(batchv1.JobSuccessCriteriaMet)
		set(batchv1.JobComplete)
	}
	_, err = c.BatchV1().Jobs(system).UpdateStatus(ctx, job, metav1.UpdateOptions{})
	return string(out), err
}

// TestF64_HelmUninstallStopsWhilePodsNeedIt: the release, its objects and its root are
// there after a refusal; without pods all goes but the namespaces with the root.
func TestF64_HelmUninstallStopsWhilePodsNeedIt(t *testing.T) {
	c := install(t) // for root and definition; the rest becomes Helm's
	for _, o := range manifest(t) {
		if o.GetKind() != "Namespace" {
			c.remove(t, resourceOf(t, o), o.GetNamespace(), o.GetName())
		}
	}
	for _, name := range []string{"meshca-a", "meshca-b"} {
		c.remove(t, pods, system, name)
	}
	p := newProgram(t)
	out, err := helm(t, p, "install", "mesh", "deploy/chart", "--take-ownership", "--timeout", "1m")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	whole := there(t, c)
	if len(whole) != len(installed.Objects(system, agents)) {
		t.Fatalf("Helm has installed %q", whole)
	}
	if _, err := c.CoreV1().ServiceAccounts(system).Get(t.Context(), "meshca-uninstall", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the hook is installed: %v", err)
	}
	if out, errs, code := p.run(t, "uninstall"); code != 1 || !strings.Contains(errs, "helm uninstall mesh -n default") {
		t.Errorf("meshca uninstall of a release: %d %s %s", code, out, errs)
	}

	app(t, c, "shop", "p", mounts, volume)
	defer c.remove(t, pods, "shop", "p")
	jobs := runJobs(t, c, p)
	if out, err = helm(t, p, "uninstall", "mesh", "--timeout", "1m"); err == nil {
		t.Fatalf("it goes on: %s", out)
	}
	if said := <-jobs; !strings.Contains(said, "refusing to uninstall: 1 pod has a volume of csi.meshca.dev: shop/p") {
		t.Errorf("the Job said %q; Helm: %s", said, out)
	}
	if got := there(t, c); !slices.Equal(got, whole) {
		t.Errorf("left %q", got)
	}

	c.remove(t, pods, "shop", "p")
	if out, err = helm(t, p, "uninstall", "mesh", "--timeout", "1m"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if said := <-jobs; !strings.Contains(said, "no pod has a volume") {
		t.Errorf("the Job said %q", said)
	}
	if got := there(t, c); len(got) > 0 {
		t.Errorf("left %q", got)
	}
	for _, name := range []string{system, agents} {
		ns, err := c.CoreV1().Namespaces().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil || ns.DeletionTimestamp != nil {
			t.Errorf("namespace %s: %v %v", name, ns, err)
		}
	}
	if _, err := state.Inspect(t.Context(), c.CoreV1(), system); err != nil {
		t.Errorf("the root: %v", err)
	}
	for _, name := range []string{"meshca-uninstall"} {
		if _, err := c.RbacV1().ClusterRoles().Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("the hook's ClusterRole is left: %v", err)
		}
	}
}
