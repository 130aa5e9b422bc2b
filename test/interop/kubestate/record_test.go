package kubestate

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/kube/record"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/roots"
	"github.com/meshca/meshca/identity/identitytest"
)

// recordPermissions is the Role of package record.
func recordPermissions() []rbacv1.PolicyRule {
	core := []string{""}
	return []rbacv1.PolicyRule{
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"create"}},
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"get"}, ResourceNames: []string{record.Name}},
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"update"}, ResourceNames: []string{record.Name}},
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"get"}, ResourceNames: []string{state.MarkerName}},
	}
}

func recordClient(t *testing.T, token string) kubernetes.Interface {
	t.Helper()
	c := cluster.Get(t)
	client, err := kubernetes.NewForConfig(&rest.Config{Host: c.URL(), BearerToken: token, TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile()}})
	check(t, err)
	return client
}

// keep runs a replica's keeper over the record until the test ends.
func keep(t *testing.T, ns, token string) *roots.Keeper {
	t.Helper()
	k, err := roots.New(roots.Config{
		TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Store: record.New(recordClient(t, token).CoreV1(), ns),
		Ceiling: time.Hour, Interval: 100 * time.Millisecond, Now: time.Now,
	})
	check(t, err)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); check(t, k.Run(ctx)) }()
	t.Cleanup(func() { stop(); <-ended })
	return k
}

func testRoot(t *testing.T) *x509.Certificate {
	t.Helper()
	c, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Now: time.Now})
	check(t, err)
	return c
}

func holds(k *roots.Keeper, n int) func() error {
	return func() error {
		b, _ := k.Bundle()
		if b == nil || len(b.Authorities()) != n {
			return fmt.Errorf("the bundle is %v, want %d roots", b, n)
		}
		return nil
	}
}

// All that a record goes through: made, changed by either replica, deleted, edited.
func recordLifecycle(t *testing.T, ns, token string) error {
	ctx := context.Background()
	one, two := keep(t, ns, token), keep(t, ns, token)
	a, b := testRoot(t), testRoot(t)
	if _, err := one.Agree(ctx, a, []*x509.Certificate{a}); err != nil {
		return err
	}
	if _, err := two.Agree(ctx, a, []*x509.Certificate{a, b}); err != nil {
		return err
	}
	eventually(t, "what the other replica has added", holds(one, 2))
	admin := recordClient(t, cluster.Get(t).AdminToken()).CoreV1().ConfigMaps(ns)
	before, err := admin.Get(ctx, record.Name, metav1.GetOptions{})
	check(t, err)
	check(t, admin.Delete(ctx, record.Name, metav1.DeleteOptions{}))
	back := func() error {
		now, err := admin.Get(ctx, record.Name, metav1.GetOptions{})
		if err == nil && now.Data["bundle.json"] != before.Data["bundle.json"] {
			err = errors.New("it is another one")
		}
		return err
	}
	eventually(t, "the record that was deleted", back)
	edited, err := admin.Get(ctx, record.Name, metav1.GetOptions{})
	check(t, err)
	edited.Data["bundle.json"] = "{}"
	_, err = admin.Update(ctx, edited, metav1.UpdateOptions{})
	check(t, err)
	eventually(t, "the record that was edited", back)
	eventually(t, "no trouble", func() error { return errors.Join(one.Trouble(), two.Trouble()) })
	return nil
}

func TestF32_PermissionsOfTheRecord(t *testing.T) {
	all := recordPermissions()
	t.Run("all", func(t *testing.T) {
		ns := newNamespace(t)
		token := bind(t, ns, all)
		// A permission reaches the authorizer a moment after it was written.
		eventually(t, "the permissions", func() error {
			_, _, err := record.New(recordClient(t, token).CoreV1(), ns).Load(context.Background())
			return err
		})
		check(t, recordLifecycle(t, ns, token))
	})
	for i, rule := range all {
		t.Run(fmt.Sprintf("without %s %s", rule.Verbs[0], rule.ResourceNames), func(t *testing.T) {
			ns := newNamespace(t)
			err := recordLifecycle(t, ns, bind(t, ns, slices.Delete(slices.Clone(all), i, i+1)))
			if err == nil || !strings.Contains(err.Error(), "forbidden") {
				t.Errorf("nothing is missing: %v", err)
			}
		})
	}
}

// A mesh that has a root of its own is not led away from it.
func TestF10_OwnRootIsNotLeft(t *testing.T) {
	ns := newNamespace(t)
	r := start(t, ns, options{})
	defer r.stop()
	eventually(t, "the first root", func() error { _, err := r.signs(t); return err })
	a := testRoot(t)
	_, err := keep(t, ns, cluster.Get(t).AdminToken()).Agree(context.Background(), a, []*x509.Certificate{a})
	var own *record.OwnRootError
	if !errors.As(err, &own) || own.Namespace != ns {
		t.Errorf("got %v", err)
	}
}
