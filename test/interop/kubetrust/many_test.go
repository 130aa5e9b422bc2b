package kubetrust

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/meshca/meshca/ca/kube/leader"
	"github.com/meshca/meshca/ca/kube/trust"
)

// count is how many namespaces are many.
const count = 1000

// thousand makes as many namespaces that ask for the bundle.
func thousand(t *testing.T, prefix string) {
	t.Helper()
	client := dial(t, "", nil)
	each := func(do func(name string) error) {
		var all errgroup.Group
		all.SetLimit(16)
		for i := range count {
			all.Go(func() error { return do(fmt.Sprintf("%s-%d", prefix, i)) })
		}
		check(t, all.Wait())
	}
	each(func(name string) error {
		_, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"meshca.dev/inject": "enabled"}},
		}, metav1.CreateOptions{})
		return err
	})
	t.Cleanup(func() {
		each(func(name string) error {
			label(t, client, name, `{"meshca.dev/inject":null}`)
			return client.CoreV1().ConfigMaps(name).Delete(context.Background(), trust.ConfigMapName, metav1.DeleteOptions{})
		})
	})
}

// have is how many namespaces have a bundle.
func have(t *testing.T, client kubernetes.Interface) int {
	t.Helper()
	list, err := client.CoreV1().ConfigMaps("").List(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + trust.ConfigMapName})
	check(t, err)
	return len(list.Items)
}

// A thousand namespaces are served no faster than was asked for.
func TestAThousandNamespacesAreWrittenSlowly(t *testing.T) {
	const qps = 200
	client := dial(t, "", nil)
	agents := place(t, "many-agents", nil)
	thousand(t, "many")
	var mu sync.Mutex
	var writes []time.Time
	b := newBundle(t, "cluster.local", 1)
	began := time.Now()
	d := distribute(t, agents, newSource(b), options{qps: qps, see: func(r *http.Request) *http.Response {
		if r.Method != http.MethodGet {
			mu.Lock()
			defer mu.Unlock()
			writes = append(writes, time.Now())
		}
		return nil
	}})
	eventually(t, "all of them", func() error {
		if n := have(t, client); n != count+1 {
			return fmt.Errorf("%d of %d", n, count+1)
		}
		return nil
	})
	took := time.Since(began)
	d.stop()
	mu.Lock()
	defer mu.Unlock()
	slices.SortFunc(writes, time.Time.Compare)
	most := 0
	for i, from := range writes {
		n := 0
		for n < len(writes)-i && writes[i+n].Sub(from) < time.Second {
			n++
		}
		most = max(most, n)
	}
	t.Logf("%d writes in %v, at most %d in a second", len(writes), took, most)
	// The bucket holds one second's worth, which may be spent in the second in which
	// as much again comes in.
	if most > 2*qps {
		t.Errorf("%d writes in one second, %d were asked for", most, qps)
	}
	if len(writes) > count+2+count/100 {
		t.Errorf("%d writes for %d objects", len(writes), count+2)
	}
}

// One of two replicas works; when it goes, the other one does.
func TestOneReplicaDistributesAtATime(t *testing.T) {
	client := dial(t, "", nil)
	agents := place(t, "lease", nil)
	s := newSource(newBundle(t, "cluster.local", 1))
	started := make(chan string, 4)
	run := func(replica string) (stop func()) {
		d, err := trust.New(trust.Config{Client: dial(t, "", nil), Namespace: agents, Replica: replica, Bundle: s.Bundle})
		check(t, err)
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			ended <- leader.Run(ctx, leader.Config{Client: dial(t, "", nil), Namespace: agents, Replica: replica}, func(ctx context.Context) error {
				started <- replica
				return d.Run(ctx)
			})
		}()
		stop = sync.OnceFunc(func() { cancel(); check(t, <-ended) })
		t.Cleanup(stop)
		return stop
	}
	stop := run("meshca-0")
	if first := <-started; first != "meshca-0" {
		t.Fatal(first)
	}
	run("meshca-1")
	first, _ := s.Bundle()
	eventually(t, "by the first", func() error { return holds(t, client, agents, first) })
	select {
	case second := <-started:
		t.Errorf("%s works while another leads", second)
	default:
	}
	stop()
	next := newBundle(t, "cluster.local", 2)
	s.set(next)
	if second := <-started; second != "meshca-1" {
		t.Errorf("%s leads", second)
	}
	eventually(t, "by the second", func() error { return holds(t, client, agents, next) })
}

// Work that fails ends Run, and a lease that is taken by force ends the work.
func TestF14_LeaseThatIsLostEndsTheWork(t *testing.T) {
	client := dial(t, "", nil)
	ns := place(t, "lost-lease", nil)
	working, ended := make(chan struct{}, 1), make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- leader.Run(ctx, leader.Config{Client: client, Namespace: ns, Replica: "meshca-0"}, func(ctx context.Context) error {
			working <- struct{}{}
			<-ctx.Done()
			ended <- struct{}{}
			return nil
		})
	}()
	<-working
	eventually(t, "taking the lease", func() error {
		l, err := client.CoordinationV1().Leases(ns).Get(t.Context(), leader.DefaultLease, metav1.GetOptions{})
		if err != nil {
			return err
		}
		other, now, long := "meshca-1", metav1.NowMicro(), int32(600)
		l.Spec = coordinationv1.LeaseSpec{HolderIdentity: &other, LeaseDurationSeconds: &long, AcquireTime: &now, RenewTime: &now}
		_, err = client.CoordinationV1().Leases(ns).Update(t.Context(), l, metav1.UpdateOptions{})
		return err
	})
	<-ended
	cancel()
	check(t, <-done)
	broken := errors.New("broken")
	err := leader.Run(t.Context(), leader.Config{Client: client, Namespace: ns, Lease: "another", Replica: "meshca-0"}, func(context.Context) error { return broken })
	if !errors.Is(err, broken) {
		t.Errorf("Run = %v", err)
	}
}
