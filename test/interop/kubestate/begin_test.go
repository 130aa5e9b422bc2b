package kubestate

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/state"
)

// cleanStart is what a replica asks for in an empty namespace until it signs.
func cleanStart(t *testing.T) []string {
	t.Helper()
	r := start(t, newNamespace(t), options{})
	r.root(t)
	r.stop()
	var all []string
	for _, q := range r.wire.requests() {
		all = append(all, q)
		if strings.Contains(q, "PUT configmaps "+state.MarkerName) {
			return all // the last write before it signs
		}
	}
	t.Fatalf("the marker was never raised: %q", r.wire.requests())
	return nil
}

// Every request of the first start, cut before and after it was executed. The
// replica dies there, or lives on; who comes next finds one root and no other.
func TestF4_F13_FirstStartCutAtEveryRequest(t *testing.T) {
	steps := cleanStart(t)
	t.Logf("%d requests:\n%s", len(steps), strings.Join(steps, "\n"))
	for nth := range len(steps) {
		for _, f := range []fault{before, after} {
			for _, dies := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/%d/dies=%v", steps[nth], f, dies), func(t *testing.T) {
					t.Parallel()
					cutAt(t, nth+1, f, dies)
				})
			}
		}
	}
}

func cutAt(t *testing.T, nth int, f fault, dies bool) {
	ns := newNamespace(t)
	var cut atomic.Bool
	first := start(t, ns, options{judge: func(r *request) fault {
		switch {
		case r.nth == nth:
			cut.Store(true)
			return f
		case r.nth > nth && dies:
			return before
		}
		return pass
	}})
	eventually(t, "the cut", func() error {
		if !cut.Load() {
			return fmt.Errorf("request %d was not made yet", nth)
		}
		return nil
	})
	left := ""
	if dies {
		first.stop()
		if all := secrets(t, ns); len(all) > 0 {
			left = string(all[0].Data["root.pem"])
		}
	}
	root := start(t, ns, options{}).root(t)
	if left != "" && left != string(identityPEM(root)) {
		t.Error("the root that was there was not used")
	}
	if !dies && !first.root(t).Equal(root) {
		t.Error("the replica that lived on uses another root")
	}
	reloaded(t, ns, root)
}

// Any number of replicas that start at once, some of whose answers are lost, make
// one root.
func TestF15_F14_V8_ReplicasThatRaceMakeOneRoot(t *testing.T) {
	for _, n := range []int{2, 3} {
		for round := range 6 {
			t.Run(fmt.Sprintf("%d replicas/%d", n, round), func(t *testing.T) {
				ns := newNamespace(t)
				var all []*replica
				for i := range n {
					all = append(all, start(t, ns, options{judge: func(r *request) fault {
						// A different answer is lost for each, and in each round.
						if r.verb != "GET" && (r.nth+i+round)%3 == 0 {
							return after
						}
						return pass
					}}))
				}
				root := all[0].root(t)
				for _, r := range all[1:] {
					if !r.root(t).Equal(root) {
						t.Error("two roots")
					}
				}
				for _, r := range all {
					r.stop()
				}
				reloaded(t, ns, root)
			})
		}
	}
}

// reloaded demands that a new replica finds all as it was left.
func reloaded(t *testing.T, ns string, root interface{ Equal(*certificate) bool }) {
	t.Helper()
	if !root.Equal(onlyRoot(t, ns)) {
		t.Error("another root is in the Secret")
	}
	m, s := marker(t, ns), shared(t, ns)
	r := start(t, ns, options{})
	if !root.Equal(r.root(t)) {
		t.Error("another root after a reload")
	}
	r.stop()
	if marker(t, ns) != m || shared(t, ns) != s {
		t.Error("a reload has changed the objects")
	}
	if !strings.Contains(s, `"sequence": 1`) {
		t.Errorf("state %s", s)
	}
}

// A create that the API server executes late, after its sender has gone on.
func TestF13_CreateThatComesLate(t *testing.T) {
	ns := newNamespace(t)
	held, released := make(chan struct{}), make(chan struct{})
	var once atomic.Bool
	slow := start(t, ns, options{judge: func(r *request) fault {
		if r.verb == "POST" && r.kind == "secrets" && once.CompareAndSwap(false, true) {
			close(held)
			<-released
		}
		return pass
	}})
	<-held
	root := start(t, ns, options{}).root(t)
	close(released)
	if !slow.root(t).Equal(root) {
		t.Error("the late one uses a root of its own")
	}
	reloaded(t, ns, root)
}

// What must not be taken for a namespace that never had a root.
func TestF13_F64_LostIsNeverTakenForNew(t *testing.T) {
	ctx := context.Background()
	remove := func(t *testing.T, ns string, names ...string) {
		for _, n := range names {
			var err error
			if strings.HasPrefix(n, "meshca-root-") {
				err = admin(t).Secrets(ns).Delete(ctx, n, metav1.DeleteOptions{})
			} else {
				err = admin(t).ConfigMaps(ns).Delete(ctx, n, metav1.DeleteOptions{})
			}
			check(t, err)
		}
	}
	for name, gone := range map[string][]string{
		"key":               {"meshca-root-1"},
		"key and state":     {"meshca-root-1", state.StateName},
		"marker":            {state.MarkerName},
		"marker and key":    {state.MarkerName, "meshca-root-1"},
		"":                  nil,
		"state":             {state.StateName},
		"marker and state ": {state.MarkerName, state.StateName},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r := start(t, ns, options{})
			root := r.root(t)
			r.stop()
			remove(t, ns, gone...)
			r = start(t, ns, options{})
			switch name {
			case "", "state", "marker and state ":
				// The first root, whose bundle was never another: nothing is lost.
				if !r.root(t).Equal(root) {
					t.Error("another root")
				}
			default:
				r.refuses(t, new(*state.LostError), "meshca restore", ns)
				r.stop()
				if n := len(secrets(t, ns)); name != "marker" && n != 0 {
					t.Errorf("%d roots were made", n)
				}
			}
		})
	}
}

func TestF65_TrustDomainOfANamespaceCannotChange(t *testing.T) {
	ns := newNamespace(t)
	root := start(t, ns, options{}).root(t)
	other := start(t, ns, options{domain: "other.test"})
	other.refuses(t, new(*state.TrustDomainError), `"cluster.local"`, `"other.test"`)
	other.stop()
	reloaded(t, ns, root)
}

// What was damaged, or written by a newer program, while nobody ran.
func TestF13_DamagedOrNewerObjectsAreRefusedAtTheStart(t *testing.T) {
	for name, tt := range map[string]struct {
		object, key string
		change      func(string) string
		target      any
	}{
		"marker empty":    {state.MarkerName, "roots.json", func(string) string { return "" }, new(*state.CorruptError)},
		"marker cut":      {state.MarkerName, "roots.json", func(s string) string { return s[:len(s)-5] }, new(*state.CorruptError)},
		"marker newer":    {state.MarkerName, "roots.json", replaced(`"version": 1`, `"version": 2`), new(*state.VersionError)},
		"marker of no CA": {state.MarkerName, "roots.json", replaced(`"number": 1`, `"number": 2`), new(*state.CorruptError)},
		"other root":      {state.MarkerName, "roots.json", replaced(`"certificate_sha256": "`, `"certificate_sha256": "0123456789abcdef`), new(*state.CorruptError)},
		"state empty":     {state.StateName, "state.json", func(string) string { return "" }, new(*state.CorruptError)},
		"state newer":     {state.StateName, "state.json", replaced(`"version": 1`, `"version": 2`), new(*state.VersionError)},
		"state unknown":   {state.StateName, "state.json", replaced(`"step": "none"`, `"step": "leap"`), new(*state.CorruptError)},
		"state twice":     {state.StateName, "state.json", replaced(`"active": 1`, `"active": 1, "active": 1`), new(*state.CorruptError)},
		"state of others": {state.StateName, "state.json", replaced("cluster.local", "other.test"), new(*state.TrustDomainError)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r := start(t, ns, options{})
			root := r.root(t)
			settled(t, ns)
			r.stop()
			good := text(t, ns, tt.object, tt.key)
			rewrite(t, ns, tt.object, tt.key, tt.change)
			r = start(t, ns, options{})
			r.refuses(t, tt.target, tt.object)
			if !onlyRoot(t, ns).Equal(root) {
				t.Error("another root")
			}
			rewrite(t, ns, tt.object, tt.key, func(string) string { return good })
			if !r.root(t).Equal(root) {
				t.Error("another root")
			}
		})
	}
}

// All replicas stop and start together: they sign again within 5 s.
func TestF15_ReplicasThatRestartTogetherSignAtOnce(t *testing.T) {
	ns := newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	r.stop()
	began := time.Now()
	var all []*replica
	for range 3 {
		all = append(all, start(t, ns, options{}))
	}
	for _, r := range all {
		if !r.root(t).Equal(root) {
			t.Error("another root")
		}
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	reloaded(t, ns, root)
}
