package kubereport

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/report"
	"github.com/meshca/meshca/test/testenv"
)

// Replicas that start at once find a slot each; one that ends leaves its own to the
// next, and a document that is not renewed does not count for long.
func TestReplicasReport(t *testing.T) {
	ns := newNamespace(t)
	var all []*replica
	for i := range 3 {
		all = append(all, start(t, ns, fmt.Sprintf("meshca-%d", i), options{}))
	}
	holds := func(want ...string) {
		t.Helper()
		eventually(t, "fresh documents", func() error {
			fresh, stale := replicas(t, ns, time.Now)
			if !slices.Equal(fresh, want) || len(stale) > 0 {
				return fmt.Errorf("fresh %v, stale %v; want %v\n%s", fresh, stale, want, all[0].logs)
			}
			return nil
		})
	}
	holds("meshca-0", "meshca-1", "meshca-2")
	all[1].stop()
	holds("meshca-0", "meshca-2")
	start(t, ns, "meshca-3", options{})
	holds("meshca-0", "meshca-2", "meshca-3")
	objects, err := client(t, "").CoreV1().ConfigMaps(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "meshca.dev/report"})
	check(t, err)
	if n := len(objects.Items); n != 3 {
		t.Errorf("%d ConfigMaps; a slot that was given up is to be taken", n)
	}
	later := func() time.Time { return time.Now().Add(report.Fresh + 2*time.Second) }
	if fresh, stale := replicas(t, ns, later); len(fresh) != 0 || len(stale) != 3 {
		t.Errorf("17 s later fresh are %v, stale %v", fresh, stale)
	}
}

// A replica that died leaves its slot after a minute of silence; if it only slept, it
// finds another one.
func TestASlotOfOneWhoSleeps(t *testing.T) {
	ns := newNamespace(t)
	sleeper := start(t, ns, "meshca-0", options{every: time.Second, now: func() time.Time { return time.Now().Add(-2 * time.Minute) }})
	eventually(t, "the first document", func() error {
		if fresh, _ := replicas(t, ns, time.Now); len(fresh) != 1 {
			return fmt.Errorf("fresh are %v", fresh)
		}
		return nil
	})
	start(t, ns, "meshca-1", options{})
	eventually(t, "both", func() error {
		fresh, _ := replicas(t, ns, time.Now)
		second, err := client(t, "").CoreV1().ConfigMaps(ns).Get(t.Context(), report.SlotName(2), metav1.GetOptions{})
		if !slices.Equal(fresh, []string{"meshca-0", "meshca-1"}) || err != nil || !strings.Contains(second.Data["report.json"], `"replica":"meshca-0"`) {
			return fmt.Errorf("fresh are %v, %v\n%s", fresh, err, sleeper.logs)
		}
		return nil
	})
}

// Other ConfigMaps, documents of other versions and rubbish are said and do not count.
func TestWhatIsNoReport(t *testing.T) {
	ns := newNamespace(t)
	for name, text := range map[string]string{
		report.SlotName(1): `{"version":9}`, report.SlotName(2): `x`, "other": `{"version":1,"replica":"x"}`,
	} {
		_, err := cluster.Get(t).Create(t.Context(), "/api/v1/namespaces/"+ns+"/configmaps", map[string]any{
			"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": name, "labels": map[string]any{"meshca.dev/report": "replica"}},
			"data": map[string]any{"report.json": text},
		})
		check(t, err)
	}
	all, err := report.Read(t.Context(), client(t, "").CoreV1().ConfigMaps(ns), time.Now)
	check(t, err)
	if len(all.Fresh) != 0 || len(all.Stale) != 2 || !strings.Contains(all.Stale[0].Reason, "version 9") {
		t.Errorf("%+v", all)
	}
}

// chartNames are the ConfigMaps that the chart's Role lets the CA update for this.
func chartNames(t *testing.T) []string {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	check(t, err)
	text, err := os.ReadFile(filepath.Join(root, "deploy/chart/templates/rbac.yaml"))
	check(t, err)
	return regexp.MustCompile(`meshca-replica-\d+`).FindAllString(string(text), -1)
}

// The chart's permissions suffice, and without any one of them the log names it.
func TestF32_PermissionsAreExactlyThese(t *testing.T) {
	core, names := []string{""}, chartNames(t)
	var want []string
	for n := 1; n <= report.Slots; n++ {
		want = append(want, report.SlotName(n))
	}
	if !slices.Equal(names, want) {
		t.Fatalf("the chart has %v; want %v", names, want)
	}
	all := []rbacv1.PolicyRule{
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"create"}},
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"get"}, ResourceNames: names},
		{APIGroups: core, Resources: []string{"configmaps"}, Verbs: []string{"update"}, ResourceNames: names},
	}
	t.Run("all", func(t *testing.T) {
		ns := newNamespace(t)
		r := start(t, ns, "meshca-0", options{token: bind(t, ns, all)})
		settled(t, ns, r, "")
		// With them it can read and change no other.
		_, err := client(t, "").CoreV1().ConfigMaps(ns).Get(context.Background(), report.SlotName(1), metav1.GetOptions{})
		check(t, err)
		other := client(t, bindAgain(t, ns))
		if _, err := other.CoreV1().ConfigMaps(ns).Get(t.Context(), "kube-root-ca.crt", metav1.GetOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("another ConfigMap: %v", err)
		}
	})
	for i, rule := range all {
		verb := rule.Verbs[0]
		t.Run("without "+verb, func(t *testing.T) {
			ns := newNamespace(t)
			r := start(t, ns, "meshca-0", options{token: bind(t, ns, slices.Delete(slices.Clone(all), i, i+1))})
			settled(t, ns, r, "cannot "+verb+` resource \"configmaps\"`)
		})
	}
}

// settled waits until a document was written twice, or the log says why not.
func settled(t *testing.T, ns string, r *replica, complaint string) {
	t.Helper()
	first := ""
	eventually(t, "a report, or why there is none", func() error {
		if complaint != "" {
			if !strings.Contains(r.logs.String(), complaint) {
				return fmt.Errorf("the log says %q", r.logs)
			}
			return nil
		}
		o, err := client(t, "").CoreV1().ConfigMaps(ns).Get(t.Context(), report.SlotName(1), metav1.GetOptions{})
		switch {
		case err != nil:
			return fmt.Errorf("%w; the log says %q", err, r.logs)
		case first == "":
			first = o.ResourceVersion
			return errors.New("written once")
		case first == o.ResourceVersion:
			return errors.New("not written again")
		}
		return nil
	})
}

func bindAgain(t *testing.T, ns string) string {
	t.Helper()
	token, err := cluster.Get(t).Token(t.Context(), ns, "ca", tokenOfAPIServer)
	check(t, err)
	return token
}
