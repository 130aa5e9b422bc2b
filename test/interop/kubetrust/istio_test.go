package kubetrust

import (
	"context"
	"errors"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/identity"
)

func istioHolds(client kubernetes.Interface, ns string, b *identity.Bundle) error {
	cm, err := client.CoreV1().ConfigMaps(ns).Get(context.Background(), trust.IstioName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if cm.Data[trust.IstioKey] != string(b.MarshalPEM()) {
		return fmt.Errorf("it has %q", cm.Data)
	}
	return nil
}

// istiodWrites does what istiod's controller does: an update of the whole object.
func istiodWrites(t testing.TB, client kubernetes.Interface, ns, root string) *corev1.ConfigMap {
	t.Helper()
	ctx, by := context.Background(), "pilot-discovery"
	var cm *corev1.ConfigMap
	eventually(t, "istiod writes", func() (err error) {
		cm, err = client.CoreV1().ConfigMaps(ns).Get(ctx, trust.IstioName, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			cm, err = client.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{
				ObjectMeta: metav1.ObjectMeta{Name: trust.IstioName, Labels: map[string]string{"istio.io/config": "true"}},
				Data:       map[string]string{trust.IstioKey: root},
			}, metav1.CreateOptions{FieldManager: by})
			return err
		}
		if err != nil {
			return err
		}
		cm.Data = map[string]string{trust.IstioKey: root}
		cm, err = client.CoreV1().ConfigMaps(ns).Update(ctx, cm, metav1.UpdateOptions{FieldManager: by})
		return err
	})
	return cm
}

func TestIstiosRootIsWrittenOnlyWhereNobodyElseDoes(t *testing.T) {
	client := dial(t, "", nil)
	agents := place(t, "istio-agents", nil)
	free := place(t, "istio-free", map[string]string{"istio-injection": "enabled"})
	theirs := place(t, "istio-theirs", map[string]string{"meshca.dev/inject": "enabled"})
	unasked := place(t, "istio-unasked", nil)
	before := istiodWrites(t, client, theirs, "istiod's root")
	b := newBundle(t, "cluster.local", 1)
	s := newSource(b)

	off := distribute(t, agents, s, options{})
	eventually(t, "our own", func() error { return holds(t, client, theirs, b) })
	if err := istioHolds(client, free, b); !apierrors.IsNotFound(err) {
		t.Errorf("without compatibility: %v", err)
	}
	off.stop()

	d := distribute(t, agents, s, options{istio: true})
	for _, ns := range []string{agents, free} {
		eventually(t, ns, func() error { return istioHolds(client, ns, b) })
	}
	d.problem(t, "foreign", theirs, trust.IstioName)
	if err := istioHolds(client, unasked, b); !apierrors.IsNotFound(err) {
		t.Errorf("where nobody asked: %v", err)
	}

	// A newer bundle is written without force, since the fields are ours alone.
	b = newBundle(t, "cluster.local", 2)
	s.set(b)
	eventually(t, "the newer", func() error { return istioHolds(client, free, b) })

	// istiod comes, and takes the object over. Its write stands.
	taken := istiodWrites(t, client, free, "istiod's root")
	d.problem(t, "conflict", free, "istiod", "pilot-discovery")
	b = newBundle(t, "cluster.local", 3)
	s.set(b)
	eventually(t, "the newest elsewhere", func() error {
		return errors.Join(istioHolds(client, agents, b), holds(t, client, theirs, b))
	})
	for ns, was := range map[string]*corev1.ConfigMap{free: taken, theirs: before} {
		now, err := client.CoreV1().ConfigMaps(ns).Get(t.Context(), trust.IstioName, metav1.GetOptions{})
		check(t, err)
		if now.ResourceVersion != was.ResourceVersion {
			t.Errorf("%s: it was written to after the conflict", ns)
		}
	}
	// Another leader finds the same, and does not fight either.
	d.stop()
	d = distribute(t, agents, s, options{replica: "meshca-1", istio: true})
	d.problem(t, "conflict", free, "pilot-discovery")
	// Without istiod it is deleted by hand, and then ours.
	check(t, client.CoreV1().ConfigMaps(free).Delete(t.Context(), trust.IstioName, metav1.DeleteOptions{}))
	eventually(t, "ours again", func() error { return istioHolds(client, free, b) })
	eventually(t, "no conflict any more", func() error {
		for _, p := range d.Problems() {
			if p.Condition == "conflict" {
				return fmt.Errorf("%+v", p)
			}
		}
		return nil
	})
}
