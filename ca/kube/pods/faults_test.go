package pods

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/apitest"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// of makes the change that has a token be of another pod on the cart's node.
func of(name, uid string) func(*tokenissuer.Claims) {
	return func(c *tokenissuer.Claims) { c.PodName, c.PodUID = name, uid }
}

func uidOf(i int) string { return fmt.Sprintf("cccccccc-0000-4000-8000-%012d", i) }

// Without the API server who is known stays known, for an hour and longer; who is
// not is told for what reason that cannot be found out, and costs no request once
// nothing has been heard for 5 min.
func TestF21_APIServerAwayForAnHour(t *testing.T) {
	bubble(t, func(r *rig) {
		var away atomic.Bool
		r.api.Answer = func(*http.Request) *http.Response {
			if away.Load() {
				return apitest.Status(http.StatusServiceUnavailable, meta.StatusReasonServiceUnavailable, 0)
			}
			return nil
		}
		away.Store(true)
		r.run()
		r.unknown("never read", r.check(nil), "have not been read yet")
		if err := r.pods.Ready(); err == nil || !strings.Contains(err.Error(), "pods have not been read yet: list pods") {
			t.Errorf("never read: Ready = %v", err)
		}
		away.Store(false)
		r.pass(15 * time.Second)
		r.must(r.pods.Ready())
		r.must(r.pods.Degraded())
		r.alive("at first")

		away.Store(true)
		r.api.Cut(false)
		r.pass(4 * time.Minute)
		r.unknown("a new pod", r.check(of("new", uidOf(1))), "cannot be looked up")
		for range 56 {
			r.pass(time.Minute)
			r.alive("the API server is away")
		}
		before := r.api.Requests("get pods")
		r.unknown("a new pod", r.check(of("new", uidOf(2))), "nothing has been heard of the cluster's pods for 1h0m")
		if n := r.api.Requests("get pods"); n != before {
			t.Errorf("%d requests for a pod that cannot be known", n-before)
		}
		if n := strings.Count(r.log.String(), "\n"); n > 20 {
			t.Errorf("an hour without the API server fills %d lines of the log: %s", n, r.log)
		}
		if err := r.pods.Degraded(); err == nil || r.pods.Age() < time.Hour {
			t.Errorf("Degraded = %v after %v", err, r.pods.Age())
		}
		r.must(r.pods.Ready())

		away.Store(false)
		r.pass(15 * time.Second) // in which nothing happens
		r.must(r.pods.Degraded())
		r.api.Lag(time.Hour)
		r.api.Put("pods", apitest.Pod("shop", "new", uidOf(1), "cart", "node-1"))
		r.must(r.check(of("new", uidOf(1))))
		if age := r.pods.Age(); age > 15*time.Second {
			t.Errorf("after it came back: Age = %v", age)
		}
	})
}

// Where connections are taken and then end, as behind a balancer that has nobody to
// give them to, nothing has been heard either.
func TestF21_ConnectionsEnd(t *testing.T) {
	bubble(t, func(r *rig) {
		away := r.away(io.EOF)
		r.run()
		r.pass(15 * time.Second)
		r.must(r.pods.Degraded())
		away.Store(true)
		r.api.Cut(false)
		r.pass(time.Hour)
		if age := r.pods.Age(); age < time.Hour-time.Second {
			t.Errorf("an hour of no answers, and something was heard %v ago", age)
		}
		r.unknown("a new pod", r.check(of("new", uidOf(2))), "nothing has been heard of the cluster's pods for")
		r.alive("known before")
	})
}

// However long the API server was away, its watches go on within 6 s.
func TestF26_BackAfterAnHour(t *testing.T) {
	for name, err := range map[string]error{
		"nobody listens": syscall.ECONNREFUSED,
		"no way there":   syscall.EHOSTUNREACH,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				away := r.away(err)
				r.run()
				r.pass(15 * time.Second)
				away.Store(true)
				r.api.Cut(false)
				r.pass(time.Hour)
				if r.pods.Degraded() == nil {
					t.Error("away for an hour, and nothing seems to be wrong")
				}
				away.Store(false)
				r.pass(7 * time.Second)
				r.must(r.pods.Degraded())
			})
		})
	}
}

// A watch that ends, with or without a place to go on from, loses no deletion.
func TestF25_NoDeletionIsLost(t *testing.T) {
	for name, compact := range map[string]bool{"dropped": false, "410 Gone": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				r.run()
				r.api.Lag(time.Hour) // nothing is reported any more
				r.api.Delete("pods", "shop", "cart-0")
				r.pass(time.Second)
				r.alive("the watch has not said so")
				r.api.Cut(compact)
				synctest.Wait()
				r.api.Lag(0)
				r.pass(5 * time.Second)
				r.refused("after the watch came back", r.check(nil), "does not exist any more")
			})
		})
	}
}

// While nothing happens bookmarks tell that all is well; a watch that says nothing
// at all is given up and made anew.
func TestF25_Silence(t *testing.T) {
	bubble(t, func(r *rig) {
		r.run()
		worst := time.Duration(0)
		for range 60 {
			r.pass(30 * time.Second)
			worst = max(worst, r.pods.Age())
		}
		if worst > 3*time.Minute {
			t.Errorf("nothing was heard for %v while all was well", worst)
		}
		r.alive("after half an hour in which nothing happened")
	})
}

// A watch 20 s late refuses no pod: what is newer costs one lookup, however many ask
// and however often.
func TestT2_PodNewerThanTheWatch(t *testing.T) {
	bubble(t, func(r *rig) {
		r.run()
		r.api.Lag(20 * time.Second)
		const node = "dddddddd-0000-4000-8000-000000000001"
		r.api.Put("nodes", apitest.Named("", "node-2", node))
		r.api.Put("serviceaccounts", apitest.Named("shop", "new", "new-account"))
		r.api.Put("pods", apitest.Pod("shop", "new", uidOf(1), "new", "node-2"))
		fresh := r.claims(func(c *tokenissuer.Claims) {
			c.ServiceAccount, c.ServiceAccountUID, c.PodName, c.PodUID, c.NodeName, c.NodeUID = "new", "new-account", "new", uidOf(1), "node-2", node
		})
		changed, stop := r.pods.Watch(uidOf(1))
		defer stop()
		var callers sync.WaitGroup
		for range 50 {
			callers.Go(func() {
				if err := r.pods.Check(r.t.Context(), fresh); err != nil {
					t.Errorf("a pod newer than the watch: %v", err)
				}
			})
		}
		callers.Wait()
		<-changed
		if _, _, ok := r.pods.Live(uidOf(1), "node-2"); !ok {
			t.Error("what was looked up is not shown")
		}
		for range 30 {
			r.pass(time.Second)
			r.must(r.pods.Check(r.t.Context(), fresh))
		}
		for _, resource := range []string{"pods", "nodes", "serviceaccounts"} {
			if n := r.api.Requests("get " + resource); n != 1 {
				t.Errorf("%d lookups of %s; want one", n, resource)
			}
		}
		r.pods.pods.mu.Lock()
		defer r.pods.pods.mu.Unlock()
		if n := len(r.pods.pods.ahead); n != 0 {
			t.Errorf("%d pods are kept beside the watch, which has come as far", n)
		}
	})
}

// A pod that was put onto its node after the watch last heard of it is no other pod.
func TestT2_PodScheduledAfterTheWatch(t *testing.T) {
	bubble(t, func(r *rig) {
		r.api.Put("pods", apitest.Pod("shop", "cart-0", cartUID, "cart", ""))
		r.run()
		r.api.Lag(20 * time.Second)
		r.api.Put("pods", cart())
		r.alive("scheduled since")
	})
}

// An API server that takes 10 s costs nobody more than 3 s, those who are known
// nothing, and one node's flood holds up no other node.
func TestF22_SlowAPIServer(t *testing.T) {
	bubble(t, func(r *rig) {
		r.api.Answer = func(req *http.Request) *http.Response {
			if strings.Contains(req.URL.Path, "/pods/slow") {
				select {
				case <-time.After(10 * time.Second):
				case <-req.Context().Done():
				}
			}
			return nil
		}
		r.run()
		r.api.Lag(time.Hour)
		const node = "dddddddd-0000-4000-8000-000000000001"
		r.api.Put("nodes", apitest.Named("", "node-2", node))
		r.api.Put("pods", apitest.Pod("shop", "fast", uidOf(9999), "cart", "node-2"))
		var callers sync.WaitGroup
		for i := range 400 {
			c := r.claims(of(fmt.Sprintf("slow-%d", i), uidOf(i)))
			callers.Go(func() {
				began := time.Now()
				err := r.pods.Check(r.t.Context(), c)
				if took := time.Since(began); took > 3*time.Second {
					t.Errorf("a lookup took %v", took)
				}
				r.unknown("slow", err, "cannot be looked up")
			})
		}
		synctest.Wait()
		began := time.Now()
		r.alive("known")
		r.must(r.check(func(c *tokenissuer.Claims) {
			c.PodName, c.PodUID, c.NodeName, c.NodeUID = "fast", uidOf(9999), "node-2", node
		}))
		if took := time.Since(began); took > 0 {
			t.Errorf("others waited for %v", took)
		}
		callers.Wait()
	})
}

// An API server that says 429 is left alone for as long as it wants.
func TestF23_TooManyRequests(t *testing.T) {
	bubble(t, func(r *rig) {
		var busy atomic.Bool
		r.api.Answer = func(req *http.Request) *http.Response {
			if busy.Load() {
				return apitest.Status(http.StatusTooManyRequests, meta.StatusReasonTooManyRequests, 20)
			}
			return nil
		}
		r.run()
		busy.Store(true)
		r.unknown("the first", r.check(of("new", uidOf(1))), "cannot be looked up")
		asked := r.api.Requests("get pods")
		for i := range 100 {
			r.unknown("within 20 s", r.check(of("new", uidOf(2+i))), "wants no request within")
		}
		if n := r.api.Requests("get pods"); n != asked || n > 2 {
			t.Errorf("%d requests, %d of them after the API server asked for none", n, n-asked)
		}
		r.alive("known")
		busy.Store(false)
		r.api.Put("pods", apitest.Pod("shop", "new", uidOf(1), "cart", "node-1"))
		r.pass(20 * time.Second)
		r.must(r.check(of("new", uidOf(1))))
	})
}

// The budget of lookups holds whatever is asked for.
func TestF23_Budget(t *testing.T) {
	bubble(t, func(r *rig) {
		r.run()
		var callers sync.WaitGroup
		for i := range 1000 {
			c := r.claims(func(c *tokenissuer.Claims) {
				c.PodName, c.PodUID, c.NodeName = "none", uidOf(i), fmt.Sprintf("node-%d", i%50)
			})
			callers.Go(func() { _ = r.pods.Check(r.t.Context(), c) })
		}
		callers.Wait()
		if n := r.api.Requests("get pods"); n > limits.Burst+int(limits.PerSecond*4) {
			t.Errorf("%d lookups within 3 s", n)
		}
	})
}

// A permission that is withdrawn is named, and its return noticed within 30 s.
func TestF32_PermissionWithdrawn(t *testing.T) {
	for _, verb := range []string{"list", "watch", "get"} {
		t.Run(verb, func(t *testing.T) {
			bubble(t, func(r *rig) {
				var withdrawn atomic.Bool
				r.api.Answer = func(req *http.Request) *http.Response {
					watch, get := req.URL.Query().Get("watch") == "true", strings.HasPrefix(req.URL.Path, "/api/v1/namespaces/shop/pods/")
					is := map[string]bool{"list": !watch && req.URL.Path == "/api/v1/pods", "watch": watch && req.URL.Path == "/api/v1/pods", "get": get}
					if withdrawn.Load() && is[verb] {
						return apitest.Status(http.StatusForbidden, meta.StatusReasonForbidden, 0)
					}
					return nil
				}
				r.run()
				withdrawn.Store(true)
				r.api.Cut(true)
				r.pass(5 * time.Second)
				_ = r.check(of("new", uidOf(1)))
				want := fmt.Sprintf("grant the CA's ServiceAccount the verb %q on the resource \"pods\"", verb)
				if err := r.pods.Degraded(); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("Degraded = %v; want %q in it", err, want)
				}
				if !strings.Contains(r.log.String(), "the API server cannot be asked") {
					t.Errorf("the log says nothing of it: %s", r.log)
				}
				r.pass(2 * time.Minute)
				r.alive("known")
				withdrawn.Store(false)
				r.pass(30 * time.Second)
				_ = r.check(of("new", uidOf(2)))
				r.must(r.pods.Degraded())
			})
		})
	}
}

// Who waits for a pod learns of its coming, changing and going, and of nothing else,
// and is forgotten when it waits no more.
func TestFollow(t *testing.T) {
	bubble(t, func(r *rig) {
		r.run()
		told := 0
		stop := r.pods.Follow(cartUID, func() { told++ })
		expect := func(what string, want int) {
			t.Helper()
			if synctest.Wait(); told != want {
				t.Errorf("%s: told %d times; want %d", what, told, want)
			}
		}
		r.api.Put("pods", apitest.Pod("shop", "other", uidOf(1), "cart", "node-1"))
		expect("another pod", 0)
		noise := cart()
		noise["status"] = map[string]any{"phase": "Running", "message": "something else"}
		r.api.Put("pods", noise)
		expect("a change of no consequence", 0)
		r.api.Put("pods", cart().InPhase("Succeeded"))
		expect("a change", 1)
		r.api.Delete("pods", "shop", "cart-0")
		expect("its end", 2)
		stop()
		r.api.Put("pods", cart())
		expect("after stop", 2)
		if n := len(r.pods.followers); n != 0 {
			t.Errorf("%d are still followed", n)
		}
	})
}

// What is remembered of lookups is bounded.
func TestV12_MemoryOfLookupsIsBounded(t *testing.T) {
	table := newTable("pods", time.Now, func(any) (Pod, bool) { return Pod{}, false })
	for i := range maxGone + 100 {
		table.remember(Pod{UID: uidOf(i), Version: 7})
		table.forget(uidOf(i))
	}
	if len(table.ahead) > maxAhead || len(table.gone) > maxGone {
		t.Errorf("%d pods and %d UIDs are remembered", len(table.ahead), len(table.gone))
	}
}

// A pod costs a kilobyte, however large it is: ten thousand are ten megabytes.
func TestMemoryOfAPod(t *testing.T) {
	const n, most = 2000, 1500 // bytes a pod
	r := &apitest.API{}
	for i := range n {
		o := apitest.Pod(fmt.Sprintf("ns-%d", i%100), fmt.Sprintf("app-%d-7d4b9c6f5d-x%d", i%500, i), uidOf(i), "app", fmt.Sprintf("node-%d", i%100))
		o["spec"].(map[string]any)["containers"] = []any{map[string]any{"name": "app", "image": strings.Repeat("x", 4096)}}
		r.Put("pods", o)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	p, err := New(Config{API: r.Config()})
	if err != nil {
		t.Fatal(err)
	}
	list, err := p.listPods(context.Background(), meta.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.pods.Replace(slices.Clip(itemsOf(list)), "1"); err != nil {
		t.Fatal(err)
	}
	list = nil
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := int(after.HeapAlloc-before.HeapAlloc) / n
	t.Logf("%d bytes a pod", each)
	if p.pods.size() != n || each > most {
		t.Errorf("%d pods at %d bytes each; want %d at %d at most", p.pods.size(), each, n, most)
	}
	runtime.KeepAlive(r)
}

// Lists are what the API server has now, and not what it happens to remember: what
// another replica has acted on must not be undone here.
func TestF25_ListsAreConsistent(t *testing.T) {
	bubble(t, func(r *rig) {
		var asked []string
		var mu sync.Mutex
		r.api.Answer = func(req *http.Request) *http.Response {
			mu.Lock()
			defer mu.Unlock()
			if q := req.URL.Query(); q.Get("watch") != "true" {
				asked = append(asked, q.Get("resourceVersion"))
			}
			return nil
		}
		r.run()
		mu.Lock()
		defer mu.Unlock()
		if len(asked) != 4 || slices.Contains(asked, "0") {
			t.Errorf("lists were asked for at the versions %q", asked)
		}
	})
}

// Watches that a restarted API server cannot let go on are begun anew from a list of
// what there is now, not of what there was when they were heard last.
func TestF25_WatchesThatCannotGoOn(t *testing.T) {
	bubble(t, func(r *rig) {
		r.run()
		r.alive("at first")
		r.api.Cut(false)
		r.api.Put("pods", apitest.Pod("shop", "new", uidOf(1), "cart", "node-1"))
		r.api.Delete("pods", "shop", "cart-0")
		r.api.Cut(true)
		r.pass(15 * time.Second)
		if _, ok := r.pods.Pod(uidOf(1)); !ok {
			t.Error("a pod that came meanwhile is not known")
		}
		if _, ok := r.pods.Pod(cartUID); ok {
			t.Error("a pod that went meanwhile is")
		}
		before := r.api.Requests("list pods")
		r.pass(time.Hour)
		if n := r.api.Requests("list pods"); n != before {
			t.Errorf("%d more lists in an hour in which nothing happened", n-before)
		}
	})
}

// No watch outlasts two minutes, whatever the API server makes of that.
func TestF32_WatchesAreShort(t *testing.T) {
	bubble(t, func(r *rig) {
		r.api.Answer = func(req *http.Request) *http.Response {
			q := req.URL.Query()
			if seconds, err := strconv.Atoi(q.Get("timeoutSeconds")); q.Get("watch") == "true" && (err != nil || seconds < 60 || seconds > 90) {
				t.Errorf("a watch for %q s", q.Get("timeoutSeconds"))
			}
			return nil
		}
		r.run()
		before := r.api.Requests("watch pods")
		r.pass(2 * time.Minute)
		if n := r.api.Requests("watch pods"); n == before {
			t.Error("after two minutes the watch is the same")
		}
	})
}
