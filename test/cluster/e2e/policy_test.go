package e2e

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// withProxy gives a pod our proxy as a native sidecar, by hand.
func withProxy(t *testing.T, spec *corev1.Pod, args ...string) *corev1.Pod {
	t.Helper()
	tag, err := manifestTag()
	if err != nil {
		t.Fatal(err)
	}
	always := corev1.ContainerRestartPolicyAlways
	spec.Spec.InitContainers = append(spec.Spec.InitContainers, corev1.Container{
		Name: "proxy", Image: "ghcr.io/meshca/meshca-proxy:" + tag, ImagePullPolicy: corev1.PullNever, RestartPolicy: &always,
		Args: append([]string{"--ops-listen=:15020"}, args...),
		Env:  spec.Spec.Containers[0].Env, VolumeMounts: spec.Spec.Containers[0].VolumeMounts,
	})
	return spec
}

const peerAuthentication = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: %s, namespace: %s}
spec: %s
`

// apply applies a policy with kubectl and returns when that had said that it did.
func apply(t *testing.T, ns, name, spec string) time.Time {
	t.Helper()
	if _, err := node.Kubectl(t.Context(), strings.NewReader(fmt.Sprintf(peerAuthentication, name, ns, spec)), "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	return time.Now()
}

func TestT10_StrictAppliedToRunningPods(t *testing.T) {
	ns := namespace(t)
	account(t, ns, "cart")
	account(t, ns, "frontend")
	cart := start(t, withProxy(t, app(ns, "cart", "cart", true), "--inbound=:15006=127.0.0.1:8080"))[0]
	pods := start(t,
		withProxy(t, app(ns, "frontend", "frontend", true), "--outbound=127.0.0.1:15001="+cart.ip+":15006,"+id(ns, "cart")),
		app(ns, "plain", "default", false))
	frontend, plain := pods[0], pods[1]
	url := "http://" + cart.ip + ":15006/"
	answers := func(p *pod, url string) func(context.Context) error {
		return func(ctx context.Context) error {
			body, err := p.get(ctx, url, "")
			if err == nil && body != "cart" {
				err = fmt.Errorf("it is answered by %q", body)
			}
			return err
		}
	}
	eventually(t, 20*time.Second, "plaintext, while nothing forbids it", answers(plain, url))
	eventually(t, 20*time.Second, "mutual TLS", answers(frontend, "http://127.0.0.1:15001/"))

	// A connection that is open, and mutual TLS that goes on.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	var open struct {
		Answers int
		Ended   time.Time
		Reason  string
	}
	var holdErr, meshErr error
	requests := 0
	wg.Go(func() {
		holdErr = plain.do(ctx, "/hold", map[string]string{"addr": cart.ip + ":15006", "ms": "20000"}, &open)
	})
	stop := make(chan struct{})
	wg.Go(func() {
		for meshErr == nil {
			select {
			case <-stop:
				return
			default:
			}
			meshErr = answers(frontend, "http://127.0.0.1:15001/")(ctx)
			requests++
		}
	})
	eventually(t, 5*time.Second, "requests on both", func(context.Context) error {
		return answers(plain, url)(ctx)
	})
	applied := apply(t, ns, "default", "{mtls: {mode: STRICT}}")
	eventually(t, time.Second, "plaintext to be refused", func(ctx context.Context) error {
		if body, err := plain.get(ctx, url, ""); err == nil {
			return fmt.Errorf("it is still answered by %q", body)
		}
		return nil
	})
	refusedAfter := time.Since(applied)
	// Long enough that mutual TLS has seen the change too.
	for range 20 {
		if err := answers(frontend, "http://127.0.0.1:15001/")(ctx); err != nil {
			t.Fatalf("mutual TLS under STRICT: %v", err)
		}
	}
	close(stop)
	wg.Wait()
	if holdErr != nil {
		t.Errorf("the plaintext connection that was open: %v", holdErr)
	} else if late := open.Ended.Sub(applied); late > time.Second {
		t.Errorf("the plaintext connection that was open ended %v after the policy, by %s; want at most 1 s", late, open.Reason)
	} else {
		t.Logf("STRICT: the open connection ended %v after kubectl did, new ones were refused within %v; %d requests by mutual TLS meanwhile", late, refusedAfter, requests)
	}
	if meshErr != nil {
		t.Errorf("mutual TLS meanwhile: %v", meshErr)
	}

	// The labels that a pod has now count.
	apply(t, ns, "default", "{mtls: {mode: PERMISSIVE}}")
	apply(t, ns, "locked", "{selector: {matchLabels: {locked: 'yes'}}, mtls: {mode: STRICT}}")
	eventually(t, 5*time.Second, "plaintext, while the label is not there", answers(plain, url))
	label := func(value string) time.Time {
		t.Helper()
		patch := []byte(`{"metadata":{"labels":{"locked":` + value + `}}}`)
		if _, err := client.CoreV1().Pods(ns).Patch(t.Context(), cart.name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		return time.Now()
	}
	label(`"yes"`)
	eventually(t, time.Second, "plaintext to be refused for the label", func(ctx context.Context) error {
		if body, err := plain.get(ctx, url, ""); err == nil {
			return fmt.Errorf("it is still answered by %q", body)
		}
		return nil
	})
	label("null")
	eventually(t, time.Second, "plaintext, now that the label is gone", answers(plain, url))
}
