package kubetrust

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/identity"
)

// soon is for what follows a watch: some milliseconds, and more on a busy machine.
const soon = 5 * time.Second

func TestBundleReachesWhoWantsItAndNobodyElse(t *testing.T) {
	ctx, client := t.Context(), dial(t, "", nil)
	agents := place(t, "reach-agents", nil)
	labelled := place(t, "reach-labelled", map[string]string{"meshca.dev/trust-bundle": "enabled"})
	injected := place(t, "reach-injected", map[string]string{"meshca.dev/inject": "enabled"})
	other := place(t, "reach-other", map[string]string{"meshca.dev/inject": "disabled"})
	b := newBundle(t, "cluster.local", 1)
	s := newSource(nil)
	d := distribute(t, agents, s, options{})
	s.set(b) // before it there is nothing to distribute, and nothing is
	for _, ns := range []string{agents, labelled, injected} {
		eventually(t, ns, func() error { return holds(t, client, ns, b) })
	}
	if err := holds(t, client, other, b); !apierrors.IsNotFound(err) {
		t.Errorf("in a namespace that did not ask: %v", err)
	}
	eventually(t, "the ClusterTrustBundle", func() error {
		ctb, err := client.CertificatesV1().ClusterTrustBundles().Get(ctx, trust.TrustBundleName, metav1.GetOptions{})
		if err == nil && (ctb.Spec.TrustBundle != string(b.MarshalPEM()) || ctb.Spec.SignerName != trust.SignerName) {
			err = fmt.Errorf("%+v", ctb)
		}
		return err
	})
	// Labelled later.
	label(t, client, other, `{"meshca.dev/inject":"enabled"}`)
	within(t, soon, "labelled later", func() error { return holds(t, client, other, b) })
	// Taken back. What follows comes on the same watch, and so after it.
	label(t, client, other, `{"meshca.dev/inject":null}`)
	// A namespace that is made later, with its label.
	late := place(t, "reach-late", map[string]string{"meshca.dev/trust-bundle": "enabled"})
	within(t, soon, "made later", func() error { return holds(t, client, late, b) })
	// A new bundle reaches all, and those that took their label back: pods mount it.
	next := newBundle(t, "cluster.local", 2)
	s.set(next)
	for _, ns := range []string{agents, labelled, injected, other, late} {
		eventually(t, ns, func() error { return holds(t, client, ns, next) })
	}
	// There it is not made again.
	check(t, client.CoreV1().ConfigMaps(other).Delete(ctx, trust.ConfigMapName, metav1.DeleteOptions{}))
	s.set(newBundle(t, "cluster.local", 3))
	last, _ := s.Bundle()
	eventually(t, labelled, func() error { return holds(t, client, labelled, last) })
	if err := holds(t, client, other, last); !apierrors.IsNotFound(err) {
		t.Errorf("made again where nobody asks for it: %v", err)
	}
	if p := d.Problems(); len(p) != 0 {
		t.Errorf("problems %+v", p)
	}
}

// What is deleted while it is being written, where nobody asks for it any more, is not
// made again by that.
func TestF64_DeletedWhileItIsWritten(t *testing.T) {
	ctx, client := t.Context(), dial(t, "", nil)
	agents := place(t, "outrun-agents", nil)
	other := place(t, "outrun-other", map[string]string{"meshca.dev/inject": "enabled"})
	var armed atomic.Bool
	b := newBundle(t, "cluster.local", 1)
	s := newSource(b)
	distribute(t, agents, s, options{see: func(r *http.Request) *http.Response {
		if r.Method == http.MethodPatch && strings.Contains(r.URL.Path, "/"+other+"/") && armed.CompareAndSwap(true, false) {
			check(t, client.CoreV1().ConfigMaps(other).Delete(ctx, trust.ConfigMapName, metav1.DeleteOptions{}))
		}
		return nil
	}})
	eventually(t, other, func() error { return holds(t, client, other, b) })
	label(t, client, other, `{"meshca.dev/inject":null}`)
	late := place(t, "outrun-late", map[string]string{"meshca.dev/trust-bundle": "enabled"})
	within(t, soon, "after the label was taken back", func() error { return holds(t, client, late, b) })
	armed.Store(true)
	s.set(newBundle(t, "cluster.local", 2))
	eventually(t, "deleted while it is written", func() error {
		if armed.Load() {
			return errors.New("it is not being written")
		}
		return nil
	})
	last := newBundle(t, "cluster.local", 3)
	s.set(last)
	for _, ns := range []string{agents, late} {
		eventually(t, ns, func() error { return holds(t, client, ns, last) })
	}
	if err := holds(t, client, other, last); !apierrors.IsNotFound(err) {
		t.Errorf("made again where nobody asks for it: %v", err)
	}
}

func TestF64_EditedAndDeletedAnchorsArePutRight(t *testing.T) {
	ctx, client := t.Context(), dial(t, "", nil)
	agents := place(t, "repair", nil)
	b := newBundle(t, "cluster.local", 5)
	distribute(t, agents, newSource(b), options{})
	eventually(t, "first", func() error { return holds(t, client, agents, b) })
	check(t, client.CoreV1().ConfigMaps(agents).Delete(ctx, trust.ConfigMapName, metav1.DeleteOptions{}))
	within(t, soon, "deleted", func() error { return holds(t, client, agents, b) })
	check(t, client.CertificatesV1().ClusterTrustBundles().Delete(ctx, trust.TrustBundleName, metav1.DeleteOptions{}))
	for name, edit := range map[string]func(*corev1.ConfigMap){
		"other anchors": func(cm *corev1.ConfigMap) {
			cm.Data[trust.ConfigMapKey] = string(newBundle(t, "evil.test", 1).MarshalPEM())
		},
		"no anchors":        func(cm *corev1.ConfigMap) { cm.Data = nil },
		"a lower sequence":  func(cm *corev1.ConfigMap) { cm.Annotations["meshca.dev/bundle-sequence"] = "4" },
		"no sequence":       func(cm *corev1.ConfigMap) { delete(cm.Annotations, "meshca.dev/bundle-sequence") },
		"no label":          func(cm *corev1.ConfigMap) { cm.Labels = nil },
		"no annotation":     func(cm *corev1.ConfigMap) { cm.Annotations = nil },
		"a word for number": func(cm *corev1.ConfigMap) { cm.Annotations["meshca.dev/bundle-sequence"] = "many" },
	} {
		eventually(t, "editing", func() error {
			cm, err := client.CoreV1().ConfigMaps(agents).Get(ctx, trust.ConfigMapName, metav1.GetOptions{})
			if err != nil {
				return err
			}
			edit(cm)
			_, err = client.CoreV1().ConfigMaps(agents).Update(ctx, cm, metav1.UpdateOptions{})
			return err
		})
		within(t, soon, name, func() error { return holds(t, client, agents, b) })
	}
	within(t, soon, "ClusterTrustBundle", func() error {
		_, err := client.CertificatesV1().ClusterTrustBundles().Get(ctx, trust.TrustBundleName, metav1.GetOptions{})
		return err
	})
}

// What is not ours stays as it is, and is reported.
func TestF65_OthersObjectsAreLeftAlone(t *testing.T) {
	ctx, client := t.Context(), dial(t, "", nil)
	agents := place(t, "foreign", nil)
	for name, meta := range map[string]metav1.ObjectMeta{
		"not meshca's":            {Name: trust.ConfigMapName},
		`trust domain "old.test"`: {Name: trust.ConfigMapName, Labels: map[string]string{"app.kubernetes.io/managed-by": "meshca"}, Annotations: map[string]string{"meshca.dev/trust-domain": "old.test"}},
	} {
		made, err := client.CoreV1().ConfigMaps(agents).Create(ctx, &corev1.ConfigMap{ObjectMeta: meta, Data: map[string]string{"theirs": "1"}}, metav1.CreateOptions{})
		check(t, err)
		b := newBundle(t, "cluster.local", 1)
		s := newSource(b)
		d := distribute(t, agents, s, options{})
		d.problem(t, "foreign", agents, name)
		s.set(newBundle(t, "cluster.local", 2))
		eventually(t, "the other object is written", func() error {
			_, err := client.CertificatesV1().ClusterTrustBundles().Get(ctx, trust.TrustBundleName, metav1.GetOptions{})
			return err
		})
		now, err := client.CoreV1().ConfigMaps(agents).Get(ctx, trust.ConfigMapName, metav1.GetOptions{})
		check(t, err)
		if now.ResourceVersion != made.ResourceVersion {
			t.Errorf("%s: it was written to", name)
		}
		check(t, client.CoreV1().ConfigMaps(agents).Delete(ctx, trust.ConfigMapName, metav1.DeleteOptions{}))
		last, _ := s.Bundle()
		eventually(t, "ours", func() error { return holds(t, client, agents, last) })
		d.stop()
		clean(t, client, agents)
	}
}

// Two roots of one trust domain under one number: neither CA takes the anchors of
// the other, and both say so.
func TestF13_T12_AnchorOfAnotherRootIsNotTakenOver(t *testing.T) {
	client := dial(t, "", nil)
	agents := place(t, "rival", nil)
	old, other := newBundle(t, "cluster.local", 1), newBundle(t, "cluster.local", 1)
	first := distribute(t, agents, newSource(old), options{})
	eventually(t, "the old root", func() error {
		_, err := client.CertificatesV1().ClusterTrustBundles().Get(t.Context(), trust.TrustBundleName, metav1.GetOptions{})
		return errors.Join(err, holds(t, client, agents, old))
	})
	first.stop()
	second := distribute(t, agents, newSource(other), options{replica: "meshca-1"})
	second.problem(t, "conflict", agents, "other authorities", "meshca restore")
	second.problem(t, "conflict", trust.TrustBundleName)
	check(t, holds(t, client, agents, old))
	// Who decides for the new root deletes what tells of the old one.
	check(t, client.CoreV1().ConfigMaps(agents).Delete(t.Context(), trust.ConfigMapName, metav1.DeleteOptions{}))
	within(t, soon, "the new root", func() error { return holds(t, client, agents, other) })
}

// history watches which sequences an anchor goes through.
func history(t testing.TB, ns string) (stop func() []uint64) {
	t.Helper()
	client := dial(t, "", nil)
	w, err := client.CoreV1().ConfigMaps(ns).Watch(context.Background(), metav1.ListOptions{FieldSelector: "metadata.name=" + trust.ConfigMapName})
	check(t, err)
	var all []uint64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e := range w.ResultChan() {
			if cm, ok := e.Object.(*corev1.ConfigMap); ok {
				n, _ := strconv.ParseUint(cm.Annotations["meshca.dev/bundle-sequence"], 10, 64)
				all = append(all, n)
			}
		}
	}()
	return func() []uint64 { w.Stop(); <-done; return all }
}

// Two that believe to lead, one of them with an older bundle and asleep between
// judging and writing. The anchor never goes back.
func TestT12_LaggingLeaderNeverTakesTheAnchorBack(t *testing.T) {
	client := dial(t, "", nil)
	old, next := newBundle(t, "cluster.local", 1), newBundle(t, "cluster.local", 2)
	for name, before := range map[string]*identity.Bundle{"created by the other": nil, "updated by the other": newBundle(t, "cluster.local", 0)} {
		t.Run(name, func(t *testing.T) {
			agents := place(t, "lag-"+strings.ReplaceAll(name, " ", "-"), nil)
			if before != nil {
				d := distribute(t, agents, newSource(before), options{})
				eventually(t, "there before", func() error { return holds(t, client, agents, before) })
				d.stop()
			}
			seen := history(t, agents)
			held, goOn := make(chan struct{}), make(chan struct{})
			var once atomic.Bool
			lagging := distribute(t, agents, newSource(old), options{replica: "meshca-0", see: func(r *http.Request) *http.Response {
				if r.Method == http.MethodPatch && strings.Contains(r.URL.Path, agents) && once.CompareAndSwap(false, true) {
					close(held)
					<-goOn
				}
				return nil
			}})
			<-held
			distribute(t, agents, newSource(next), options{replica: "meshca-1"})
			eventually(t, "the newer", func() error { return holds(t, client, agents, next) })
			close(goOn)
			lagging.problem(t, "newer", agents, "bundle 2")
			check(t, holds(t, client, agents, next))
			last := uint64(0)
			for _, n := range seen() {
				if n < last {
					t.Errorf("the anchor went from bundle %d to %d", last, n)
				}
				last = n
			}
			if last != 2 {
				t.Errorf("the last bundle seen is %d", last)
			}
		})
	}
}

func TestClusterTrustBundlesThatAreNotServed(t *testing.T) {
	client := dial(t, "", nil)
	agents := place(t, "unserved", nil)
	b := newBundle(t, "cluster.local", 1)
	d := distribute(t, agents, newSource(b), options{see: func(r *http.Request) *http.Response {
		if !strings.HasPrefix(r.URL.Path, "/apis/certificates.k8s.io/v1") {
			return nil
		}
		return &http.Response{
			StatusCode: http.StatusNotFound, Header: http.Header{"Content-Type": {"application/json"}}, Request: r,
			Body: io.NopCloser(strings.NewReader(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)),
		}
	}})
	eventually(t, "the ConfigMap", func() error { return holds(t, client, agents, b) })
	check(t, d.logs.says("does not serve ClusterTrustBundles"))
	if p := d.Problems(); len(p) != 0 {
		t.Errorf("problems %+v", p)
	}
}
