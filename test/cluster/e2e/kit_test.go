package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"
)

const trustDomain = "cluster.local"

// eventually asks until the answer is nil.
func eventually(t *testing.T, within time.Duration, what string, ask func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		if last = ask(ctx); last == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %v; last: %v", what, within, last)
		case <-tick.C:
		}
	}
}

// namespace makes a namespace whose pods are held to Pod Security baseline, with a
// ServiceAccount "default" that is there.
func namespace(t *testing.T) string {
	t.Helper()
	name := "e2e-" + rand.String(6)
	_, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: name, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "baseline"},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := node.Kubectl(context.Background(), nil, "-n", name, "get", "pods,events", "-o", "wide")
			t.Logf("what was in namespace %s:\n%s", name, out)
		}
		now := int64(0)
		if err := client.CoreV1().Pods(name).DeleteCollection(context.Background(), metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{}); err != nil {
			t.Error(err)
		}
		if err := client.CoreV1().Namespaces().Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	account(t, name, "default")
	return name
}

// account makes a ServiceAccount, or waits for one that a controller makes.
func account(t *testing.T, namespace, name string) {
	t.Helper()
	_, err := client.CoreV1().ServiceAccounts(namespace).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
}

// pod is a pod of the test program.
type pod struct {
	namespace, name, ip string
	began               time.Time
}

// app describes such a pod: with our volume, or without where mesh is false.
func app(namespace, name, account string, mesh bool) *corev1.Pod {
	grace := int64(1)
	container := corev1.Container{Name: "app", Image: "localhost/app:1", ImagePullPolicy: corev1.PullNever}
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}},
		Spec:       corev1.PodSpec{ServiceAccountName: account, TerminationGracePeriodSeconds: &grace},
	}
	if mesh {
		readOnly := true
		p.Spec.Volumes = []corev1.Volume{{Name: "meshca", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: "csi.meshca.dev", ReadOnly: &readOnly}}}}
		container.VolumeMounts = []corev1.VolumeMount{{Name: "meshca", MountPath: "/run/meshca", ReadOnly: true}}
		container.Env = []corev1.EnvVar{{Name: "SPIFFE_ENDPOINT_SOCKET", Value: "unix:///run/meshca/agent.sock"}}
	}
	p.Spec.Containers = []corev1.Container{container}
	return p
}

// start makes pods and waits until they run.
func start(t *testing.T, specs ...*corev1.Pod) []*pod {
	t.Helper()
	var pods []*pod
	for _, spec := range specs {
		if _, err := client.CoreV1().Pods(spec.Namespace).Create(t.Context(), spec, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		pods = append(pods, &pod{namespace: spec.Namespace, name: spec.Name, began: time.Now()})
	}
	for _, p := range pods {
		eventually(t, 60*time.Second, "pod "+p.name+" to run", func(ctx context.Context) error {
			now, err := client.CoreV1().Pods(p.namespace).Get(ctx, p.name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			p.ip = now.Status.PodIP
			if now.Status.Phase != corev1.PodRunning {
				return fmt.Errorf("it is %s", now.Status.Phase)
			}
			return nil
		})
	}
	return pods
}

// remove deletes a pod at once.
func (p *pod) remove(t *testing.T) {
	t.Helper()
	now := int64(0)
	if err := client.CoreV1().Pods(p.namespace).Delete(t.Context(), p.name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
}

// id is the SPIFFE ID of a pod that runs as a ServiceAccount.
func id(namespace, account string) string {
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain, namespace, account)
}

var insidePods = &http.Client{Transport: &http.Transport{
	DisableKeepAlives: true,
	DialContext:       dial,
}}

// do has the pod's program do something, and reads what came of it into out.
func (p *pod) do(ctx context.Context, what string, args map[string]string, out any) error {
	form := make(url.Values)
	for k, v := range args {
		form.Set(k, v)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.ip+":9000"+what+"?"+form.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := insidePods.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("pod %s: %s: %s", p.name, what, strings.TrimSpace(string(body)))
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(body, out)
}

// svid is what the Workload API gives a pod.
type svid struct {
	ID     string
	Serial string
	Roots  [][]byte
	Ends   time.Time
	Took   time.Duration
}

func (p *pod) svid(t *testing.T) svid {
	t.Helper()
	var s svid
	eventually(t, 30*time.Second, "an SVID in pod "+p.name, func(ctx context.Context) error { return p.do(ctx, "/svid", nil, &s) })
	return s
}

// get has the pod fetch a URL, by mutual TLS with whoever has the ID, or plainly
// if that is empty.
func (p *pod) get(ctx context.Context, url, id string) (string, error) {
	var body string
	err := p.do(ctx, "/get", map[string]string{"url": url, "id": id}, &body)
	return strings.TrimSpace(body), err
}
