package kubetrust

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/leader"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/test/kubetest"
)

// permissions is the ClusterRole of the package comment, one verb a rule.
func permissions() []rbacv1.PolicyRule {
	var all []rbacv1.PolicyRule
	for _, r := range []struct {
		group, resource, name string
		verbs                 []string
	}{
		{"", "namespaces", "", []string{"list", "watch"}},
		{"", "configmaps", trust.ConfigMapName, []string{"list", "watch", "create", "patch"}},
		{"certificates.k8s.io", "clustertrustbundles", trust.TrustBundleName, []string{"create", "patch"}},
		{"certificates.k8s.io", "signers", trust.SignerName, []string{"attest"}},
	} {
		for _, v := range r.verbs {
			rule := rbacv1.PolicyRule{APIGroups: []string{r.group}, Resources: []string{r.resource}, Verbs: []string{v}}
			if r.name != "" {
				rule.ResourceNames = []string{r.name}
			}
			all = append(all, rule)
		}
	}
	return all
}

// bind gives a ServiceAccount of a namespace the rules, and returns its token.
func bind(t *testing.T, ns string, rules []rbacv1.PolicyRule) string {
	t.Helper()
	ctx, c, client := context.Background(), cluster.Get(t), dial(t, "", nil)
	_, err := c.CreateServiceAccount(ctx, ns, "ca")
	check(t, err)
	_, err = client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: ns}, Rules: rules}, metav1.CreateOptions{})
	check(t, err)
	_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: ns},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: ns},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "ca", Namespace: ns}},
	}, metav1.CreateOptions{})
	check(t, err)
	token, err := c.Token(ctx, ns, "ca", kubetest.TokenRequest{})
	check(t, err)
	return token
}

// streamless answers as an API server does that cannot begin a watch with a list,
// so that lists are asked for.
func streamless(r *http.Request) *http.Response {
	if r.URL.Query().Get("sendInitialEvents") == "" {
		return nil
	}
	return &http.Response{
		StatusCode: http.StatusUnprocessableEntity, Header: http.Header{"Content-Type": {"application/json"}}, Request: r,
		Body: io.NopCloser(strings.NewReader(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}`)),
	}
}

// lifecycle is all that a distributor does: make both objects, and write them again
// when there is another bundle. It ends when that is done, or, where a permission is
// missing, with the problem that tells.
func lifecycle(t *testing.T, ns, token string, complete bool, see func(*http.Request) *http.Response) (problem string) {
	t.Helper()
	client := dial(t, "", nil)
	s := newSource(newBundle(t, "cluster.local", 1))
	d := distribute(t, ns, s, options{token: token, see: see})
	defer d.stop()
	eventually(t, "all, or a problem", func() error {
		for _, p := range d.Problems() {
			problem = p.Reason
			return nil
		}
		b, _ := s.Bundle()
		ctb, err := client.CertificatesV1().ClusterTrustBundles().Get(t.Context(), trust.TrustBundleName, metav1.GetOptions{})
		if err == nil && ctb.Spec.TrustBundle != string(b.MarshalPEM()) {
			err = errors.New("the ClusterTrustBundle is old")
		}
		if err = errors.Join(err, holds(t, client, ns, b)); err != nil {
			return err
		}
		if b.Sequence() == 1 {
			s.set(newBundle(t, "cluster.local", 2))
			return errors.New("half done")
		}
		if !complete {
			return errors.New("done, and no problem is reported")
		}
		return nil
	})
	return problem
}

// The permissions suffice, and without any one of them a problem names it.
func TestF32_PermissionsAreExactlyThese(t *testing.T) {
	all := permissions()
	for name, see := range map[string]func(*http.Request) *http.Response{"streams": nil, "lists": streamless} {
		t.Run("all/"+name, func(t *testing.T) {
			ns := place(t, "rbac-"+name, nil)
			if p := lifecycle(t, ns, bind(t, ns, all), true, see); p != "" {
				t.Error(p)
			}
		})
	}
	for i, rule := range all {
		t.Run(fmt.Sprintf("without %s %s", rule.Verbs[0], rule.Resources[0]), func(t *testing.T) {
			ns := place(t, fmt.Sprintf("rbac-%d", i), nil)
			problem := lifecycle(t, ns, bind(t, ns, slices.Delete(slices.Clone(all), i, i+1)), false, streamless)
			for _, word := range []string{rule.Verbs[0], rule.Resources[0]} {
				// "not permitted to attest for signerName" is how it says the last one.
				if !strings.Contains(problem, strings.TrimSuffix(word, "s")) {
					t.Errorf("%s does not name %s", problem, word)
				}
			}
		})
	}
}

// The same for the lease, whose permissions lie in its namespace.
func TestF32_PermissionsOfTheLease(t *testing.T) {
	lease := func(verb string, names ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{verb}, ResourceNames: names}
	}
	all := []rbacv1.PolicyRule{lease("create"), lease("get", leader.DefaultLease), lease("update", leader.DefaultLease)}
	for missing := -1; missing < len(all); missing++ {
		rules, name := all, "all"
		if missing >= 0 {
			rules, name = slices.Delete(slices.Clone(all), missing, missing+1), all[missing].Verbs[0]
		}
		t.Run(name, func(t *testing.T) {
			ns := place(t, "rbac-lease-"+name, nil)
			client := dial(t, bind(t, ns, rules), nil)
			logs := new(lines)
			ctx, cancel := context.WithCancel(t.Context())
			led := make(chan struct{}, 100)
			ended := make(chan error, 1)
			go func() {
				ended <- leader.Run(ctx, leader.Config{
					Client: client, Namespace: ns, Replica: "meshca-0", Log: slog.New(slog.NewTextHandler(logs, nil)),
				}, func(ctx context.Context) error {
					led <- struct{}{}
					<-ctx.Done()
					return nil
				})
			}()
			if missing < 0 {
				<-led
				cancel() // gives the lease up, which is an update
				check(t, <-ended)
				if logs.says("forbidden") == nil {
					t.Error(logs.buf.String())
				}
				return
			}
			if name == "update" {
				<-led
				cancel()
				check(t, <-ended)
			}
			eventually(t, "the permission named", func() error { return logs.says(`cannot ` + name + ` resource`) })
			cancel()
			if name != "update" {
				check(t, <-ended)
			}
		})
	}
}
