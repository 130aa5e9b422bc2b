package kubestate

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// handOut distributes the replica's bundle until it has reached the agents.
func handOut(t *testing.T, r *replica, domain, agents string) {
	t.Helper()
	b, err := identity.NewBundle(identitytest.TrustDomain(t, domain), identity.BundleConfig{Sequence: 1, Authorities: []*x509.Certificate{r.root(t)}})
	check(t, err)
	client, _ := dialAll(t, "", nil)
	d, err := trust.New(trust.Config{
		Client: client, Namespace: agents, Replica: "meshca-0",
		Bundle: func() (*identity.Bundle, <-chan struct{}) { return b, nil },
	})
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	defer func() { cancel(); check(t, <-ended) }()
	eventually(t, "both anchors", func() error {
		_, err := client.CoreV1().ConfigMaps(agents).Get(ctx, trust.ConfigMapName, metav1.GetOptions{})
		_, bundles := client.CertificatesV1().ClusterTrustBundles().Get(ctx, trust.TrustBundleName, metav1.GetOptions{})
		return errors.Join(err, bundles)
	})
}

// wipe takes everything of the CA's out of its namespace, as deleting the namespace
// and applying it again does.
func wipe(t *testing.T, ns string) {
	t.Helper()
	ctx := context.Background()
	for _, s := range secrets(t, ns) {
		check(t, admin(t).Secrets(ns).Delete(ctx, s.Name, metav1.DeleteOptions{}))
	}
	for _, name := range []string{state.MarkerName, state.StateName} {
		check(t, admin(t).ConfigMaps(ns).Delete(ctx, name, metav1.DeleteOptions{}))
	}
}

// The namespace is gone with all that it knew, and agents hold the root's anchor.
func TestF13_F64_NamespaceThatWasLostIsNotTakenForNew(t *testing.T) {
	const domain = "lost.test"
	ctx := t.Context()
	ns, agents := newNamespace(t), newNamespace(t)
	client, _ := dialAll(t, "", nil)
	forget := func(t *testing.T, configMap, bundle bool) {
		t.Helper()
		if configMap {
			check(t, client.CoreV1().ConfigMaps(agents).Delete(ctx, trust.ConfigMapName, metav1.DeleteOptions{}))
		}
		if bundle {
			check(t, client.CertificatesV1().ClusterTrustBundles().Delete(ctx, trust.TrustBundleName, metav1.DeleteOptions{}))
		}
	}
	t.Cleanup(func() {
		err := client.CertificatesV1().ClusterTrustBundles().Delete(context.Background(), trust.TrustBundleName, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
	all := options{domain: domain, agents: agents}
	first := start(t, ns, all)
	root := first.root(t)
	handOut(t, first, domain, agents)
	first.stop()
	backup, err := state.TakeBackup(ctx, admin(t), ns, root.NotBefore)
	check(t, err)

	wipe(t, ns)
	r := start(t, ns, all)
	r.refuses(t, new(*state.LostError), trust.ConfigMapName, agents, "meshca restore", "kubectl delete")
	if n := len(secrets(t, ns)); n != 0 {
		t.Errorf("%d roots were made", n)
	}
	// A backup brings the same mesh back, while the replica runs.
	_, err = backup.Restore(ctx, admin(t), ns, false)
	check(t, err)
	if !r.root(t).Equal(root) {
		t.Error("another root")
	}
	r.stop()

	// A root that is there and not the one that was handed out: made by a program
	// that does not look for anchors, which died before it had made the marker.
	wipe(t, ns)
	other := start(t, ns, options{domain: domain, judge: func(r *request) fault {
		if r.verb == "POST" && r.kind == "configmaps" {
			return before
		}
		return pass
	}})
	eventually(t, "its root", func() error {
		if len(secrets(t, ns)) == 0 {
			return errors.New("none yet")
		}
		return nil
	})
	other.stop()
	forget(t, true, false) // the ClusterTrustBundle is proof enough
	r = start(t, ns, all)
	r.refuses(t, new(*state.LostError), state.MarkerName, trust.TrustBundleName)

	// The mesh is given up on purpose: the replica goes on by itself.
	check(t, admin(t).Secrets(ns).Delete(ctx, state.SecretName(1), metav1.DeleteOptions{}))
	forget(t, false, true)
	if r.root(t).Equal(root) {
		t.Error("the root that is gone")
	}
}

// Either object alone tells of the root, and without them a mesh that was given up
// on purpose begins anew. What is another domain's, or nobody's, tells of nothing.
func TestF13_F65_WhatTellsOfALostRoot(t *testing.T) {
	ctx := t.Context()
	root, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: identitytest.TrustDomain(t, "old.test")})
	check(t, err)
	pem := string(identityPEM(root))
	ours := map[string]string{"app.kubernetes.io/managed-by": "meshca"}
	of := func(domain string) map[string]string {
		return map[string]string{"meshca.dev/trust-domain": domain, "meshca.dev/bundle-sequence": "1"}
	}
	for name, tt := range map[string]struct {
		labels, annotations map[string]string
		text                string
		lost                bool
	}{
		"ours":           {ours, of("old.test"), pem, true},
		"without label":  {nil, of("old.test"), pem, true},
		"without domain": {ours, nil, pem, true},
		"damaged":        {ours, of("old.test"), "edited", true},
		"another domain": {ours, of("other.test"), pem, false},
		"nobody's":       {nil, nil, pem, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns, agents := newNamespace(t), newNamespace(t)
			_, err := admin(t).ConfigMaps(agents).Create(ctx, &corev1.ConfigMap{
				ObjectMeta: metav1.ObjectMeta{Name: trust.ConfigMapName, Labels: tt.labels, Annotations: tt.annotations},
				Data:       map[string]string{trust.ConfigMapKey: tt.text},
			}, metav1.CreateOptions{})
			check(t, err)
			r := start(t, ns, options{domain: "old.test", agents: agents})
			if tt.lost {
				r.refuses(t, new(*state.LostError), agents)
				if n := len(secrets(t, ns)); n != 0 {
					t.Errorf("%d roots were made", n)
				}
				check(t, admin(t).ConfigMaps(agents).Delete(ctx, trust.ConfigMapName, metav1.DeleteOptions{}))
			}
			r.root(t)
		})
	}
}

// A root that lies there before the first start: of another mesh, planted, or of a
// replica that died.
func TestF13_RootThatWasThereBefore(t *testing.T) {
	ctx := t.Context()
	td := identitytest.TrustDomain(t, "cluster.local")
	cert, key, err := ca.NewRoot(ca.RootConfig{TrustDomain: td})
	check(t, err)
	keyPEM, err := ca.EncodeRootKey(key)
	check(t, err)
	immutable := true
	for name, tt := range map[string]struct {
		change func(*corev1.Secret)
		says   string // nothing: it is taken over
	}{
		"as a CA makes it": {func(*corev1.Secret) {}, ""},
		"another type":     {func(s *corev1.Secret) { s.Type = corev1.SecretTypeOpaque }, "its type"},
		"can be changed":   {func(s *corev1.Secret) { s.Immutable = nil }, "immutable"},
		"without a label":  {func(s *corev1.Secret) { s.Labels = nil }, "app.kubernetes.io/managed-by"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			s := &corev1.Secret{
				ObjectMeta: metav1.ObjectMeta{Name: state.SecretName(1), Labels: map[string]string{"app.kubernetes.io/managed-by": "meshca"}},
				Type:       state.SecretType, Immutable: &immutable,
				Data: map[string][]byte{"root.pem": identityPEM(cert), "root.key": keyPEM},
			}
			tt.change(s)
			_, err := admin(t).Secrets(ns).Create(ctx, s, metav1.CreateOptions{FieldManager: "mallory"})
			check(t, err)
			r := start(t, ns, options{})
			if tt.says != "" {
				r.refuses(t, new(*state.PlantedError), tt.says, "delete it")
				check(t, admin(t).Secrets(ns).Delete(ctx, state.SecretName(1), metav1.DeleteOptions{}))
				if r.root(t).Equal(cert) {
					t.Error("the root that was refused is used")
				}
				return
			}
			if !r.root(t).Equal(cert) {
				t.Error("another root")
			}
			check(t, r.logs.says("took over a root that this replica did not make"))
			check(t, r.logs.says("written_by=mallory"))
		})
	}
	t.Run("made by this replica", func(t *testing.T) {
		r := start(t, newNamespace(t), options{})
		r.root(t)
		if r.logs.says("took over a root") == nil {
			t.Error(strings.TrimSpace(r.logs.buf.String()))
		}
	})
}
