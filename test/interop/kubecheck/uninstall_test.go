package kubecheck

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/installed"
	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/ca/kube/uninstall"
)

func removal(c clients) uninstall.Config {
	return uninstall.Config{
		Client: c, Objects: c.objects, Namespace: system, AgentsNamespace: agents, Now: time.Now, Poll: 20 * time.Millisecond,
	}
}

// collect takes away the pods of what is deleted, as the garbage collector does, and
// calls then once the DaemonSet's are gone. It ends with the test.
func collect(t *testing.T, c clients, then func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		agentsGone := false
		for ctx.Err() == nil {
			if _, err := c.AppsV1().DaemonSets(agents).Get(ctx, "meshca-agent", metav1.GetOptions{}); apierrors.IsNotFound(err) && !agentsGone {
				if then != nil {
					then()
				}
				_ = c.CoreV1().Pods(agents).Delete(ctx, "meshca-agent-x", metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
				agentsGone = true
			}
			if _, err := c.AppsV1().Deployments(system).Get(ctx, "meshca", metav1.GetOptions{}); apierrors.IsNotFound(err) {
				for _, name := range []string{"meshca-a", "meshca-b"} {
					_ = c.CoreV1().Pods(system).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
				}
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	}()
}

// there are the objects of ours that exist.
func there(t *testing.T, c clients) []string {
	t.Helper()
	var all []string
	for _, o := range installed.Objects(system, agents) {
		in := c.objects.Resource(o.Resource)
		var err error
		if o.Namespace == "" {
			_, err = in.Get(context.Background(), o.Name, metav1.GetOptions{})
		} else {
			_, err = in.Namespace(o.Namespace).Get(context.Background(), o.Name, metav1.GetOptions{})
		}
		if err == nil {
			all = append(all, o.String())
		} else if !apierrors.IsNotFound(err) {
			t.Fatal(err)
		}
	}
	return all
}

// TestF64_NothingGoesWhilePodsNeedIt: each pod that has our volume, or will have it, or
// may still have it.
func TestF64_NothingGoesWhilePodsNeedIt(t *testing.T) {
	c := install(t)
	whole := there(t, c)
	defer c.remove(t, pods, "shop", "p")
	for _, tt := range []struct {
		name, status string
		inTheWay     bool
	}{
		{"pending", "", true},
		{"running", `{"status": {"phase": "Running"}}`, true},
		{"finished a moment ago", fmt.Sprintf(`{"status": {"phase": "Succeeded", "containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
			"state": {"terminated": {"exitCode": 0, "finishedAt": %q}}}]}}`, time.Now().UTC().Format(time.RFC3339)), true},
		{"finished long ago", `{"status": {"phase": "Failed", "containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
			"state": {"terminated": {"exitCode": 1, "finishedAt": "2020-01-01T00:00:00Z"}}}]}}`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c.remove(t, pods, "shop", "p")
			app(t, c, "shop", "p", mounts, volume)
			if tt.status != "" {
				status(t, c, pods, "shop", "p", tt.status)
			}
			dry := removal(c)
			dry.DryRun = true
			_, err := uninstall.Run(context.Background(), dry)
			var mounted *uninstall.MountedError
			if errors.As(err, &mounted) != tt.inTheWay || err != nil && !tt.inTheWay {
				t.Errorf("%v", err)
			}
			if !tt.inTheWay {
				return
			}
			ctx, cancel := context.WithTimeout(t.Context(), deadline) // whoever goes on waits for pods to end
			defer cancel()
			if _, err = uninstall.Run(ctx, removal(c)); !errors.As(err, &mounted) || !strings.Contains(err.Error(), "shop/p") {
				t.Errorf("%v", err)
			}
			if got := there(t, c); !slices.Equal(got, whole) {
				t.Errorf("left %q", got)
			}
		})
	}
}

// TestF64_TheRootOutlivesTheRest: all goes in its order, a second time changes nothing,
// and what is installed later goes on with the root.
func TestF64_TheRootOutlivesTheRest(t *testing.T) {
	c := install(t)
	before, err := state.Inspect(context.Background(), c.CoreV1(), system)
	must(t, err)
	dry := removal(c)
	dry.DryRun = true
	would, err := uninstall.Run(context.Background(), dry)
	must(t, err)
	if n := len(there(t, c)); n != len(installed.Objects(system, agents)) {
		t.Fatalf("a dry run leaves %d objects", n)
	}
	collect(t, c, nil)
	done, err := uninstall.Run(context.Background(), removal(c))
	must(t, err)
	if !slices.Equal(done.Deleted, would.Deleted) {
		t.Errorf("deleted %q, and would have %q", done.Deleted, would.Deleted)
	}
	if got := there(t, c); len(got) > 0 {
		t.Errorf("left: %q", got)
	}
	if len(done.Kept) != 1 || !strings.Contains(done.Kept[0], "cluster.local") {
		t.Errorf("%+v", done)
	}
	after, err := state.Inspect(context.Background(), c.CoreV1(), system)
	must(t, err)
	if string(after.Bundle.MarshalPEM()) != string(before.Bundle.MarshalPEM()) {
		t.Error("another root")
	}
	for _, kept := range []struct{ namespace, name string }{{agents, trust.ConfigMapName}, {system, state.MarkerName}} {
		if _, err := c.CoreV1().ConfigMaps(kept.namespace).Get(context.Background(), kept.name, metav1.GetOptions{}); err != nil {
			t.Error(err)
		}
	}
	if _, err := c.objects.Resource(definition.Resource).Get(context.Background(), definition.Name, metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	again, err := uninstall.Run(context.Background(), removal(c))
	if err != nil || len(again.Deleted) != 0 || len(again.Kept) != 1 {
		t.Errorf("again: %+v %v", again, err)
	}
}

func TestF64_TheRootGoesOnlyByItsName(t *testing.T) {
	c := install(t)
	whole := there(t, c)
	r := removal(c)
	r.DeleteRoot = "other.example"
	if _, err := uninstall.Run(context.Background(), r); !errors.As(err, new(*uninstall.DomainError)) {
		t.Errorf("%v", err)
	}
	if got := there(t, c); !slices.Equal(got, whole) {
		t.Errorf("left %q", got)
	}
	// Somebody else's ConfigMap of that name stays.
	must(t, cluster.Get(t).CreateNamespace(context.Background(), "shop"))
	c.apply(t, configMaps, object(`{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "meshca-root", "namespace": "shop"}}`))
	defer c.remove(t, configMaps, "shop", "meshca-root")
	r.DeleteRoot = "cluster.local"
	collect(t, c, nil)
	done, err := uninstall.Run(context.Background(), r)
	must(t, err)
	if n := len(done.Deleted); done.Deleted[n-1] != "ConfigMap meshca-roots in namespace meshca-system" {
		t.Errorf("the marker is not last: %q", done.Deleted)
	}
	if !slices.Contains(done.Deleted, "Secret meshca-root-1 in namespace meshca-system") || !slices.Contains(done.Foreign, "ConfigMap meshca-root in namespace shop") {
		t.Errorf("%+v", done)
	}
	if _, err := state.ReadMarker(context.Background(), c.CoreV1(), system); !errors.As(err, new(*state.NothingError)) {
		t.Errorf("%v", err)
	}
	if again, err := uninstall.Run(context.Background(), r); err != nil || len(again.Deleted) != 0 {
		t.Errorf("again: %+v %v", again, err)
	}
}

// A pod that comes while the agents go is named, and the CSIDriver and the CA stay,
// which the way back needs.
func TestF64_APodThatComesMeanwhile(t *testing.T) {
	c := install(t)
	defer c.remove(t, pods, "shop", "late")
	must(t, cluster.Get(t).CreateNamespace(context.Background(), "shop"))
	collect(t, c, func() { app(t, c, "shop", "late", mounts, volume) })
	_, err := uninstall.Run(context.Background(), removal(c))
	var mounted *uninstall.MountedError
	if !errors.As(err, &mounted) || !mounted.Late || !strings.Contains(err.Error(), "shop/late") {
		t.Fatalf("%v", err)
	}
	if got := there(t, c); !slices.Contains(got, "CSIDriver csi.meshca.dev") || !slices.Contains(got, "Deployment meshca in namespace meshca-system") {
		t.Errorf("left %q", got)
	}
}

func TestF64_WhatIsNotOurs(t *testing.T) {
	c := install(t)
	c.patch(t, roles, "", "meshca", `{"metadata": {"labels": {"app.kubernetes.io/name": "other"}}}`)
	c.patch(t, deployments, system, "meshca", `{"metadata": {"annotations": {"meta.helm.sh/release-name": "mesh", "meta.helm.sh/release-namespace": "ops"}}}`)
	r := removal(c)
	var release *uninstall.ReleaseError
	if _, err := uninstall.Run(context.Background(), r); !errors.As(err, &release) || release.Name != "mesh" || release.Namespace != "ops" {
		t.Fatalf("%v", err)
	}
	r.IgnoreRelease = true
	collect(t, c, nil)
	done, err := uninstall.Run(context.Background(), r)
	must(t, err)
	if got := there(t, c); !slices.Equal(got, []string{"ClusterRole meshca"}) || !slices.Equal(done.Foreign, got) || done.Release != "ops/mesh" {
		t.Errorf("left %q, %+v", got, done)
	}
}

// Waiting ends with the last pod, and tells meanwhile which it waits for.
func TestWaiting(t *testing.T) {
	c := install(t)
	app(t, c, "shop", "one", mounts, volume)
	app(t, c, "shop", "two", mounts, volume)
	defer c.remove(t, pods, "shop", "one")
	defer c.remove(t, pods, "shop", "two")
	r := removal(c)
	told := make(chan string, 1000)
	r.Progress = func(what string) { told <- what }
	var ended atomic.Bool
	done := make(chan error, 1)
	go func() { err := uninstall.Wait(context.Background(), r); ended.Store(true); done <- err }()
	expect := func(what string) {
		t.Helper()
		for end := time.After(deadline); ; {
			select {
			case got := <-told:
				if got == what {
					return
				}
			case <-end:
				t.Fatalf("never said %q", what)
			}
		}
	}
	expect("waiting for 2 of 2 pods to end (shop/one, shop/two)")
	c.remove(t, pods, "shop", "one")
	expect("waiting for 1 of 2 pods to end (shop/two)")
	if ended.Load() {
		t.Error("it has not waited")
	}
	c.remove(t, pods, "shop", "two")
	must(t, <-done)

	app(t, c, "shop", "one", mounts, volume)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := uninstall.Wait(ctx, r); !errors.As(err, new(*uninstall.MountedError)) {
		t.Errorf("%v", err)
	}
}
