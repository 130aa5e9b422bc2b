package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/testenv"
)

func dial(ctx context.Context, network, address string) (net.Conn, error) {
	return node.Dial(ctx, network, address)
}

func TestFirstSVIDInAPod(t *testing.T) {
	ns := namespace(t)
	account(t, ns, "cart")
	pods := start(t, app(ns, "cart", "cart", true), app(ns, "web", "default", true))
	cart, web := pods[0], pods[1]
	got := cart.svid(t)
	if want := id(ns, "cart"); got.ID != want {
		t.Errorf("pod cart is %s, want %s", got.ID, want)
	}
	t.Logf("installed after %v; the Workload API answered after %v", installed, got.Took)
	if len(got.Roots) != 1 {
		t.Errorf("the bundle has %d authorities, want 1", len(got.Roots))
	}
	// Two go-spiffe programs, each with what its volume gave it.
	peer, err := web.get(t.Context(), "https://"+cart.ip+":8443/", id(ns, "cart"))
	if err != nil {
		t.Fatal(err)
	}
	if want := id(ns, "default"); peer != want {
		t.Errorf("cart saw %s, want %s", peer, want)
	}
	if body, err := web.get(t.Context(), "https://"+cart.ip+":8443/", id(ns, "other")); err == nil {
		t.Errorf("web took cart for another: %q", body)
	}
}

// TestEnvoyInAPod is a stock Envoy with the bootstrap of deploy/envoy, as a sidecar,
// and a go-spiffe program in another pod.
func TestEnvoyInAPod(t *testing.T) {
	ns := namespace(t)
	account(t, ns, "frontend")
	account(t, ns, "cart")
	account(t, ns, "pay")
	pay := start(t, app(ns, "pay", "pay", true))[0]
	root, err := testenv.RepositoryRoot()
	if err != nil {
		t.Fatal(err)
	}
	bootstrap, err := os.ReadFile(filepath.Join(root, "deploy/envoy/mtls.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	// The four addresses and the two SPIFFE IDs, as its head says.
	edited := strings.NewReplacer(
		"{address: 127.0.0.1, port_value: 15006}", "{address: 0.0.0.0, port_value: 15006}",
		"{address: 127.0.0.1, port_value: 15016}", "{address: "+pay.ip+", port_value: 8443}",
		"spiffe://example.org/ns/shop/sa/frontend", id(ns, "frontend"),
		"spiffe://example.org/ns/shop/sa/pay", id(ns, "pay"),
	).Replace(string(bootstrap))
	if _, err := client.CoreV1().ConfigMaps(ns).Create(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "envoy"}, Data: map[string]string{"mtls.yaml": edited},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	spec := app(ns, "cart", "cart", true)
	always := corev1.ContainerRestartPolicyAlways
	spec.Spec.Volumes = append(spec.Spec.Volumes, corev1.Volume{Name: "envoy", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "envoy"}}}})
	spec.Spec.InitContainers = []corev1.Container{{
		Name: "envoy", Image: "localhost/envoy:1", ImagePullPolicy: corev1.PullNever, RestartPolicy: &always,
		Args:         []string{"-c", "/etc/envoy/mtls.yaml", "--concurrency", "1", "-l", "warning"},
		VolumeMounts: append(spec.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: "envoy", MountPath: "/etc/envoy"}),
	}}
	pods := start(t, spec, app(ns, "frontend", "frontend", true), app(ns, "stranger", "default", true))
	cart, frontend, stranger := pods[0], pods[1], pods[2]
	// go-spiffe to Envoy.
	eventually(t, 20*time.Second, "Envoy to answer by mutual TLS", func(ctx context.Context) error {
		body, err := frontend.get(ctx, "https://"+cart.ip+":15006/", id(ns, "cart"))
		if err == nil && body != "cart" {
			err = fmt.Errorf("it answers %q", body)
		}
		return err
	})
	if body, err := stranger.get(t.Context(), "https://"+cart.ip+":15006/", id(ns, "cart")); err == nil {
		t.Errorf("Envoy lets a stranger in: %q", body)
	}
	if body, err := stranger.get(t.Context(), "http://"+cart.ip+":15006/", ""); err == nil {
		t.Errorf("Envoy lets plaintext in: %q", body)
	}
	// Envoy to go-spiffe.
	eventually(t, 20*time.Second, "Envoy to reach pay by mutual TLS", func(ctx context.Context) error {
		body, err := cart.get(ctx, "http://127.0.0.1:15001/", "")
		if err == nil && body != id(ns, "cart") {
			err = fmt.Errorf("pay saw %q", body)
		}
		return err
	})
}
