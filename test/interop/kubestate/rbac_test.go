package kubestate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/test/kubetest"
)

// permissions is the Role of the package comment.
func permissions() []rbacv1.PolicyRule {
	core := []string{""}
	return []rbacv1.PolicyRule{
		{APIGroups: core, Resources: []string{"secrets"}, Verbs: []string{"create"}},
		{APIGroups: core, Resources: []string{"secrets"}, Verbs: []string{"get"}, ResourceNames: []string{state.SecretName(1), state.SecretName(2)}},
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"create"}},
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"get"}, ResourceNames: []string{state.MarkerName, state.StateName}},
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"update"}, ResourceNames: []string{state.MarkerName, state.StateName}},
	}
}

// bind makes a ServiceAccount with the rules in a namespace and returns its token.
func bind(t *testing.T, ns string, rules []rbacv1.PolicyRule) string {
	t.Helper()
	ctx, c := context.Background(), cluster.Get(t)
	client, err := kubernetes.NewForConfig(&rest.Config{
		Host: c.URL(), BearerToken: c.AdminToken(), TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile()},
	})
	check(t, err)
	_, err = c.CreateServiceAccount(ctx, ns, "ca")
	check(t, err)
	_, err = client.RbacV1().Roles(ns).Create(ctx, &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: "ca"}, Rules: rules}, metav1.CreateOptions{})
	check(t, err)
	_, err = client.RbacV1().RoleBindings(ns).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "ca"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "ca"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "ca", Namespace: ns}},
	}, metav1.CreateOptions{})
	check(t, err)
	token, err := c.Token(ctx, ns, "ca", kubetest.TokenRequest{})
	check(t, err)
	return token
}

// lifecycle is all that a store ever does: the first start, a change, and putting
// everything back.
func lifecycle(t *testing.T, ns, token string) error {
	ctx := context.Background()
	r := start(t, ns, options{token: token})
	defer r.stop()
	var err error
	eventually(t, "an answer", func() error {
		if _, err = r.signs(t); err != nil && !strings.Contains(err.Error(), "forbidden") {
			return err
		}
		return nil
	})
	if err != nil {
		return err
	}
	trouble := func(what string, mended func() error) error {
		var forbidden error
		eventually(t, what, func() error {
			if err := r.Trouble(); err != nil && strings.Contains(err.Error(), "forbidden") {
				forbidden = err
				return nil
			}
			return mended()
		})
		return forbidden
	}
	if err := trouble("the marker raised", func() error {
		if !strings.Contains(marker(t, ns), `"highest_epoch": 1`) {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		return err
	}
	check(t, admin(t).Secrets(ns).Delete(ctx, state.SecretName(1), metav1.DeleteOptions{}))
	return trouble("the root put back", func() error {
		_, err := admin(t).Secrets(ns).Get(ctx, state.SecretName(1), metav1.GetOptions{})
		return err
	})
}

// The permissions suffice, and without any one of them the error names it.
func TestF32_PermissionsAreExactlyThese(t *testing.T) {
	all := permissions()
	t.Run("all", func(t *testing.T) {
		ns := newNamespace(t)
		// A permission reaches the authorizer a moment after it was written.
		check(t, lifecycle(t, ns, bind(t, ns, all)))
	})
	for i, rule := range all {
		t.Run(fmt.Sprintf("without %s %s", rule.Verbs[0], rule.Resources[0]), func(t *testing.T) {
			ns := newNamespace(t)
			err := lifecycle(t, ns, bind(t, ns, slices.Delete(slices.Clone(all), i, i+1)))
			if err == nil {
				t.Fatal("nothing is missing")
			}
			for _, word := range []string{rule.Verbs[0], rule.Resources[0], `"` + ns + `"`} {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%v does not name %s", err, word)
				}
			}
		})
	}
}
