package kube

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/kube/pods"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/test/kubetest"
)

// world is a cluster of a test's own, and a Pods that follows it over a wire.
type world struct {
	*kubetest.Cluster
	wire  *wire
	role  string // path
	ahead atomicDuration
	pods  *pods.Pods
	cart  workload
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{Cluster: kubetest.New(t)}
	config, role := identify(t, w.Cluster, "meshca", grants())
	w.role = role
	w.wire = between(t, config)
	w.cart = newWorkload(t, w.Cluster, "shop")
	w.pods, _ = follow(t, pods.Config{API: config, Now: w.ahead.now})
	within(t, 20*time.Second, "reading the cluster", w.pods.Ready)
	return w
}

// caughtUp waits until the watch has reported a pod that is made now.
func (w *world) caughtUp(t *testing.T, d time.Duration, name string) {
	t.Helper()
	next := w.cart.another(t, w.Cluster, name)
	within(t, d, "hearing of a new pod", func() error {
		if _, ok := w.pods.Pod(next.podUID); !ok {
			return errors.Join(errors.New("not yet"), w.pods.Degraded())
		}
		return nil
	})
}

// An API server that hangs takes nothing from those who are known, for an hour of the
// clock; who is not known is told that this cannot be told; and it heals by itself.
func TestF21_APIServerStops(t *testing.T) {
	w := newWorld(t)
	claims := w.cart.claims(t, w.Cluster)
	young := w.cart.another(t, w.Cluster, "young").claims(t, w.Cluster)
	must(t, w.DeletePod(t.Context(), "shop", "young"))
	within(t, 5*time.Second, "hearing of the deletion", func() error { return refused(w.pods.Check(t.Context(), young), "") })
	w.wire.Cut(true)
	stranger := w.cart.another(t, w.Cluster, "stranger").claims(t, w.Cluster)
	must(t, w.APIServer().Signal(syscall.SIGSTOP))
	w.wire.Cut(false)
	for _, passed := range []time.Duration{0, 10 * time.Minute, time.Hour} {
		w.ahead.set(passed)
		began := time.Now()
		must(t, w.pods.Check(t.Context(), claims))
		must(t, refused(w.pods.Check(t.Context(), young), "does not exist any more"))
		if took := time.Since(began); took > time.Second {
			t.Errorf("who is known waited for %v", took)
		}
		began = time.Now()
		reason := "no answer within 3s"
		if passed > 5*time.Minute {
			reason = "nothing has been heard of the cluster's pods"
		}
		must(t, unknown(w.pods.Check(t.Context(), stranger), reason))
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("who is not known waited for %v", took)
		}
	}
	if err := w.pods.Degraded(); err == nil {
		t.Error("nothing seems to be wrong")
	}
	must(t, w.pods.Ready())
	must(t, w.APIServer().Signal(syscall.SIGCONT))
	w.ahead.set(0)
	w.caughtUp(t, 30*time.Second, "after")
	must(t, w.pods.Check(t.Context(), claims))
	must(t, w.pods.Check(t.Context(), stranger))
}

// A watch that is cut off while pods are deleted, and that cannot go on where it was
// since etcd has forgotten, and the API server with it, loses no deletion.
func TestF25_Compacted(t *testing.T) {
	w := newWorld(t)
	const count = 5
	gone := make([]workload, count)
	for i := range gone {
		gone[i] = w.cart.another(t, w.Cluster, fmt.Sprintf("gone-%d", i))
	}
	claims := make([]*token.Claims, count)
	for i := range gone {
		claims[i] = gone[i].claims(t, w.Cluster)
		must(t, w.pods.Check(t.Context(), claims[i]))
	}
	stays := w.cart.claims(t, w.Cluster)
	w.wire.Cut(true)
	for i := range gone {
		must(t, w.DeletePod(t.Context(), "shop", gone[i].pod))
	}
	same := w.cart.another(t, w.Cluster, gone[0].pod) // under a name that was
	must(t, w.Compact(t.Context()))
	must(t, w.APIServer().Kill())
	must(t, w.RestartAPIServer(t.Context()))
	w.wire.Cut(false)
	within(t, 30*time.Second, "refusing what was deleted meanwhile", func() error {
		var errs []error
		for i := range claims {
			errs = append(errs, refused(w.pods.Check(t.Context(), claims[i]), "does not exist any more"))
		}
		return errors.Join(errs...)
	})
	must(t, w.pods.Check(t.Context(), stays))
	must(t, w.pods.Check(t.Context(), same.claims(t, w.Cluster)))
}

// etcd and the API server are killed, and come back with what they had: nobody loses
// an identity, and nobody gets another's.
func TestF26_EtcdAndAPIServerAreKilled(t *testing.T) {
	w := newWorld(t)
	claims := w.cart.claims(t, w.Cluster)
	stop := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				if err := w.pods.Check(t.Context(), claims); err != nil {
					t.Errorf("meanwhile: %v", err)
					return
				}
			}
		}
	})
	must(t, w.Etcd().Kill())
	must(t, w.RestartEtcd(t.Context()))
	w.caughtUp(t, 30*time.Second, "after-etcd")
	must(t, w.APIServer().Kill())
	within(t, 30*time.Second, "noticing that it is away", func() error {
		if w.pods.Degraded() == nil {
			return errors.New("nothing seems to be wrong")
		}
		return nil
	})
	must(t, w.RestartAPIServer(t.Context()))
	w.caughtUp(t, 30*time.Second, "after-api-server")
	close(stop)
	watching.Wait()
	must(t, w.DeletePod(t.Context(), "shop", w.cart.pod))
	within(t, 5*time.Second, "refusing the pod", func() error {
		return refused(w.pods.Check(t.Context(), claims), "does not exist any more")
	})
}

// An API server that was restarted knows no history from before: no watch goes on,
// though etcd forgets nothing. What happened meanwhile is known all the same.
func TestF26_NoHistory(t *testing.T) {
	w := newWorld(t)
	gone := w.cart.claims(t, w.Cluster)
	w.wire.Cut(true)
	must(t, w.DeletePod(t.Context(), "shop", w.cart.pod))
	same := w.cart.another(t, w.Cluster, w.cart.pod)
	must(t, w.APIServer().Kill())
	must(t, w.RestartAPIServer(t.Context()))
	w.wire.Cut(false)
	within(t, 30*time.Second, "refusing what was deleted meanwhile", func() error {
		return refused(w.pods.Check(t.Context(), gone), "does not exist any more")
	})
	w.caughtUp(t, 10*time.Second, "after")
	must(t, w.pods.Check(t.Context(), same.claims(t, w.Cluster)))
}

// Behind a network that holds everything back for 4 s a lookup ends after 3, whoever
// is known waits for nothing, and what is late is heard all the same.
func TestF22_SlowNetwork(t *testing.T) {
	w := newWorld(t)
	claims := w.cart.claims(t, w.Cluster)
	w.wire.Delay(4 * time.Second)
	strangers := make([]*token.Claims, 8)
	for i := range strangers {
		strangers[i] = w.cart.another(t, w.Cluster, fmt.Sprintf("late-%d", i)).claims(t, w.Cluster)
	}
	var callers sync.WaitGroup
	for _, s := range strangers {
		callers.Go(func() {
			began := time.Now()
			if err := w.pods.Check(t.Context(), s); err != nil { // the watch may have been faster
				if bad := unknown(err, "cannot be looked up"); bad != nil {
					t.Error(bad)
				}
			}
			if took := time.Since(began); took > 4*time.Second {
				t.Errorf("a lookup took %v", took)
			}
		})
	}
	worst := time.Duration(0)
	for range 1000 {
		began := time.Now()
		must(t, w.pods.Check(t.Context(), claims))
		worst = max(worst, time.Since(began))
	}
	callers.Wait()
	if worst > time.Second {
		t.Errorf("who is known waited for up to %v", worst)
	}
	w.wire.Delay(0)
	for _, s := range strangers {
		within(t, 30*time.Second, "hearing of a pod", func() error { return w.pods.Check(t.Context(), s) })
	}
}

// Permissions are withdrawn while all runs. What is missing is named once it is
// needed, who is known stays known, and it heals within 30 s.
func TestF32_PermissionsWithdrawn(t *testing.T) {
	w := newWorld(t)
	claims := w.cart.claims(t, w.Cluster)
	must(t, w.Update(t.Context(), w.role, roleOf("meshca", slices.DeleteFunc(grants(), func(g grant) bool {
		return g.resource == "pods" && g.verb == "watch"
	}))))
	w.wire.Cut(true) // the API server itself ends no watch for that
	w.wire.Cut(false)
	within(t, 30*time.Second, "naming what is missing", func() error {
		if err := w.pods.Degraded(); err == nil || !strings.Contains(err.Error(), `the verb "watch" on the resource "pods"`) {
			return errors.Join(errors.New("not named"), err)
		}
		return nil
	})
	must(t, w.pods.Check(t.Context(), claims))
	must(t, w.Update(t.Context(), w.role, roleOf("meshca", grants())))
	within(t, 30*time.Second, "healing", w.pods.Degraded)
	w.caughtUp(t, 10*time.Second, "healed")
}
