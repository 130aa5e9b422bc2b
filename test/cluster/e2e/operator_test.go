package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// meshca runs the command line as an operator does, with the administrator's
// kubeconfig, and returns its exit code.
func meshca(t *testing.T, args ...string) (code int, output string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--net=" + node.NetworkNamespace(), filepath.Join(node.Dir(), "images", "meshca"),
	}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+node.Kubeconfig(), "LC_ALL=C.UTF-8")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func TestWhatOperatorsSee(t *testing.T) {
	ns := namespace(t)
	account(t, ns, "cart")
	cart := start(t, app(ns, "cart", "cart", true))[0]
	cart.svid(t)
	dir := "--kubelet-dir=" + node.KubeletDir()
	if code, out := meshca(t, "check", "--all", dir); code != 0 {
		t.Errorf("meshca check: exit %d\n%s", code, out)
	}
	eventually(t, 20*time.Second, "meshca status to know the pod", func(context.Context) error {
		code, out := meshca(t, "status", "--namespace", ns)
		if code != 0 || !strings.Contains(out, "2 of 2 CAs can sign") || !strings.Contains(out, ns+"/cart") {
			return fmt.Errorf("exit %d\n%s", code, out)
		}
		return nil
	})
	// The replicas tell what they know every 5 s.
	eventually(t, 20*time.Second, "meshca explain pod to know the certificate", func(context.Context) error {
		code, out := meshca(t, "explain", "pod", ns+"/cart")
		if code != 0 || !strings.Contains(out, id(ns, "cart")) || !strings.Contains(out, "all holds") {
			return fmt.Errorf("exit %d\n%s", code, out)
		}
		return nil
	})
	// Nothing is taken away from under a pod.
	if code, out := meshca(t, "uninstall"); code != 1 || !strings.Contains(out, ns+"/cart") {
		t.Errorf("meshca uninstall, while a pod has a volume: exit %d\n%s", code, out)
	}
	if _, err := client.AppsV1().DaemonSets("meshca-agents").Get(t.Context(), "meshca-agent", metav1.GetOptions{}); err != nil {
		t.Errorf("the agents after a refused uninstall: %v", err)
	}

	// A pod with the kubelet's folder is root on its node.
	t.Run("pods that could be another", func(t *testing.T) {
		privileged := namespace(t)
		if _, err := node.Kubectl(t.Context(), nil, "label", "--overwrite", "namespace", privileged, "pod-security.kubernetes.io/enforce=privileged"); err != nil {
			t.Fatal(err)
		}
		spec := app(privileged, "reader", "default", false)
		spec.Spec.Volumes = []corev1.Volume{{Name: "node", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: node.KubeletDir()}}}}
		start(t, spec)
		if _, out := meshca(t, "check", dir); !strings.Contains(out, privileged+"/reader") {
			t.Errorf("meshca check does not name the pod with the kubelet's folder:\n%s", out)
		}
	})
}

// TestBackupAndRestore is the worst morning: the CA's state is deleted while no
// replica runs.
func TestF13_BackupAndRestore(t *testing.T) {
	ns := namespace(t)
	before := start(t, app(ns, "before", "default", true))[0].svid(t)
	file := filepath.Join(t.TempDir(), "root.backup")
	if code, out := meshca(t, "backup", "--file", file); code != 0 {
		t.Fatalf("meshca backup: exit %d\n%s", code, out)
	}
	scale := func(replicas string) {
		t.Helper()
		if _, err := node.Kubectl(t.Context(), nil, "-n", "meshca-system", "scale", "deployment/meshca", "--replicas="+replicas); err != nil {
			t.Fatal(err)
		}
	}
	scale("0")
	eventually(t, 60*time.Second, "the CAs to be gone", func(ctx context.Context) error {
		pods, err := client.CoreV1().Pods("meshca-system").List(ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("%d are there", len(pods.Items))
		}
		return err
	})
	if _, err := node.Kubectl(t.Context(), nil, "-n", "meshca-system", "delete", "secret/meshca-root-1"); err != nil {
		t.Fatal(err)
	}
	scale("2")
	// They say what is lost, and make no other root.
	eventually(t, 60*time.Second, "a CA to say what is lost", func(ctx context.Context) error {
		out, err := node.Kubectl(ctx, nil, "-n", "meshca-system", "logs", "deployment/meshca", "--all-pods", "--tail=100")
		if err == nil && !strings.Contains(out, "meshca restore") {
			err = errors.New("no log names meshca restore")
		}
		return err
	})
	if d, err := client.AppsV1().Deployments("meshca-system").Get(t.Context(), "meshca", metav1.GetOptions{}); err != nil || d.Status.ReadyReplicas != 0 {
		t.Errorf("without its root a CA is ready: %v, %v", d.Status, err)
	}
	if code, out := meshca(t, "restore", "--file", file); code != 0 {
		t.Fatalf("meshca restore: exit %d\n%s", code, out)
	}
	eventually(t, 90*time.Second, "both CAs to be ready again", func(ctx context.Context) error {
		d, err := client.AppsV1().Deployments("meshca-system").Get(ctx, "meshca", metav1.GetOptions{})
		if err == nil && d.Status.ReadyReplicas != 2 {
			err = fmt.Errorf("%d are", d.Status.ReadyReplicas)
		}
		return err
	})
	after := start(t, app(ns, "after", "default", true))[0].svid(t)
	if string(after.Roots[0]) != string(before.Roots[0]) {
		t.Error("the restored CA has another root")
	}
}
