package kubestate

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/state"
)

// rewrite changes one text of a ConfigMap as kubectl edit would.
func rewrite(t testing.TB, ns, name, key string, change func(string) string) {
	t.Helper()
	ctx := context.Background()
	eventually(t, "editing "+name, func() error {
		cm, err := admin(t).ConfigMaps(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		cm.Data[key] = change(cm.Data[key])
		_, err = admin(t).ConfigMaps(ns).Update(ctx, cm, metav1.UpdateOptions{})
		return err
	})
}

// settled waits until the marker knows of the state's epoch, and keeps doing so.
func settled(t testing.TB, ns string) {
	t.Helper()
	epoch := regexp.MustCompile(`"(?:highest_)?epoch": (\d+)`)
	last, same := "", 0
	eventually(t, "marker and state at rest", func() error {
		m, s := epoch.FindString(marker(t, ns)), epoch.FindString(shared(t, ns))
		if now := m + s; now == last && strings.TrimPrefix(m, `"highest_`) == strings.TrimPrefix(s, `"`) {
			same++
		} else {
			last, same = now, 0
		}
		if same < 10 { // 200 ms, four rounds of every replica
			return fmt.Errorf("%s, %s", m, s)
		}
		return nil
	})
}

func replaced(old, new string) func(string) string {
	return func(s string) string { return strings.Replace(s, old, new, 1) }
}

// becomes waits until an object has the text.
func becomes(t testing.TB, ns, name, key, want string) {
	t.Helper()
	eventually(t, name+" put back", func() error {
		cm, err := admin(t).ConfigMaps(ns).Get(context.Background(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if cm.Data[key] != want {
			return fmt.Errorf("it is %s", cm.Data[key])
		}
		return nil
	})
}

func TestF64_WhatIsDeletedLiveIsPutBack(t *testing.T) {
	ctx := context.Background()
	for _, replicas := range []int{1, 3} {
		t.Run(fmt.Sprint(replicas), func(t *testing.T) {
			ns := newNamespace(t)
			var all []*replica
			for range replicas {
				all = append(all, start(t, ns, options{}))
			}
			root := all[0].root(t)
			for _, r := range all {
				r.root(t)
			}
			m := marker(t, ns)
			check(t, admin(t).Secrets(ns).Delete(ctx, state.SecretName(1), metav1.DeleteOptions{}))
			eventually(t, "the root put back", func() error {
				if n := len(secrets(t, ns)); n != 1 {
					return fmt.Errorf("%d roots", n)
				}
				return nil
			})
			if !onlyRoot(t, ns).Equal(root) {
				t.Fatal("another root was put back")
			}
			check(t, admin(t).ConfigMaps(ns).Delete(ctx, state.MarkerName, metav1.DeleteOptions{}))
			becomes(t, ns, state.MarkerName, "roots.json", m)
			check(t, admin(t).ConfigMaps(ns).Delete(ctx, state.StateName, metav1.DeleteOptions{}))
			eventually(t, "the state put back", func() error {
				_, err := admin(t).ConfigMaps(ns).Get(ctx, state.StateName, metav1.GetOptions{})
				return err
			})
			for _, r := range all {
				if !r.root(t).Equal(root) {
					t.Error("another root")
				}
			}
			// All three at once.
			check(t, admin(t).ConfigMaps(ns).Delete(ctx, state.MarkerName, metav1.DeleteOptions{}))
			check(t, admin(t).ConfigMaps(ns).Delete(ctx, state.StateName, metav1.DeleteOptions{}))
			check(t, admin(t).Secrets(ns).Delete(ctx, state.SecretName(1), metav1.DeleteOptions{}))
			eventually(t, "everything put back", func() error {
				_, err1 := admin(t).ConfigMaps(ns).Get(ctx, state.StateName, metav1.GetOptions{})
				_, err2 := admin(t).ConfigMaps(ns).Get(ctx, state.MarkerName, metav1.GetOptions{})
				_, err3 := admin(t).Secrets(ns).Get(ctx, state.SecretName(1), metav1.GetOptions{})
				return errors.Join(err1, err2, err3)
			})
			settled(t, ns)
			for _, r := range all {
				eventually(t, "all mended", r.Trouble)
				r.stop()
			}
			reloaded(t, ns, root)
		})
	}
}

// A Secret cannot be edited, but it can be deleted and made again with a root of
// somebody else. Its maker gets nothing signed with it.
func TestF64_ReplacedRootIsReportedAndNotBelieved(t *testing.T) {
	ctx := context.Background()
	ns, foreign := newNamespace(t), newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	start(t, foreign, options{}).root(t)
	own := secrets(t, ns)[0]
	edited := own.DeepCopy()
	edited.Data["root.pem"] = []byte("none")
	if _, err := admin(t).Secrets(ns).Update(ctx, edited, metav1.UpdateOptions{}); err == nil {
		t.Fatal("the Secret can be edited")
	}
	for name, data := range map[string]map[string][]byte{
		"another root": secrets(t, foreign)[0].Data,
		"no root":      {"root.pem": []byte("none"), "root.key": []byte("none")},
	} {
		eventually(t, "exchanging the Secret", func() error {
			_ = admin(t).Secrets(ns).Delete(ctx, own.Name, metav1.DeleteOptions{}) // may be gone already
			_, err := admin(t).Secrets(ns).Create(ctx, &corev1.Secret{
				ObjectMeta: metav1.ObjectMeta{Name: own.Name}, Type: state.SecretType, Data: data,
			}, metav1.CreateOptions{})
			return err // until this comes before the replica's
		})
		eventually(t, name+" reported", func() error {
			if err := r.Trouble(); err == nil || !strings.Contains(err.Error(), own.Name) {
				return fmt.Errorf("trouble %v", err)
			}
			if r.metric(t, "meshca_state_trouble", "root") != 1 {
				return errors.New("the metric does not show it")
			}
			return r.logs.says("cause=root")
		})
		if !r.root(t).Equal(root) {
			t.Fatalf("%s: it is signed with", name)
		}
		late := start(t, ns, options{})
		if name == "another root" {
			late.refuses(t, new(*state.ReplacedError), "delete it")
		} else {
			late.refuses(t, new(*state.CorruptError))
		}
		check(t, admin(t).Secrets(ns).Delete(ctx, own.Name, metav1.DeleteOptions{}))
		eventually(t, "trouble over", r.Trouble)
		if r.metric(t, "meshca_state_trouble", "root") != 0 || r.metric(t, "meshca_state_restored_total", "root") == 0 {
			t.Error("the metrics do not show that it is over, and how")
		}
		if !late.root(t).Equal(root) {
			t.Error("another root")
		}
		late.stop()
	}
	r.stop()
	reloaded(t, ns, root)
}

func TestF64_EditsOfMarkerAndState(t *testing.T) {
	ns := newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	// Put back: what is damaged or older, or was changed without a new epoch.
	eventually(t, "marker raised", func() error {
		if !strings.Contains(marker(t, ns), `"highest_epoch": 1`) {
			return errors.New("not yet")
		}
		return nil
	})
	for _, change := range []func(string) string{
		func(string) string { return "" },
		func(s string) string { return s[:len(s)/2] },
		replaced(`"highest_epoch": 1`, `"highest_epoch": 0`),
		replaced(`"roots"`, `"Roots"`),
	} {
		m := marker(t, ns)
		rewrite(t, ns, state.MarkerName, "roots.json", change)
		becomes(t, ns, state.MarkerName, "roots.json", m)
	}
	for i, change := range []func(string) string{
		func(string) string { return "" },
		func(string) string { return "{}\n" },
		replaced(`"active": 1`, `"active": 2`),
		replaced(`"sequence": 1`, `"sequence": 0`),
		replaced(`"step": "none"`, `"step": "renew"`), // without a new epoch
		replaced(`"step": "none"`, `"step": "nonsense"`),
	} {
		before, _, _ := r.State()
		rewrite(t, ns, state.StateName, "state.json", change)
		eventually(t, fmt.Sprintf("state put back (%d)", i), func() error {
			now, _, _ := r.State()
			want := before
			want.Epoch = before.Epoch + 1
			if now.Epoch != want.Epoch || now.Active != want.Active || now.Sequence != want.Sequence || now.Step != want.Step {
				return fmt.Errorf("%+v, want %+v", now, want)
			}
			return nil
		})
	}
	// Left alone: what somebody else must judge.
	for _, change := range []func(string) string{
		replaced(`"version": 1`, `"version": 2`),
		replaced(`"trust_domain": "cluster.local"`, `"trust_domain": "other.test"`),
	} {
		m := marker(t, ns)
		rewrite(t, ns, state.MarkerName, "roots.json", change)
		eventually(t, "marker reported", func() error {
			if r.Trouble() == nil {
				return errors.New("no trouble")
			}
			return r.logs.says("cause=marker")
		})
		if marker(t, ns) == m {
			t.Error("it was overwritten")
		}
		if !r.root(t).Equal(root) {
			t.Error("another root")
		}
		rewrite(t, ns, state.MarkerName, "roots.json", func(string) string { return m })
		eventually(t, "mended", r.Trouble)
	}
}

// A replica whose memory is older than what there has been puts nothing back.
func TestF64_T12_ReplicaThatIsBehindRestoresNothing(t *testing.T) {
	ns := newNamespace(t)
	var cutOff atomic.Bool
	lagging := start(t, ns, options{judge: func(r *request) fault {
		if cutOff.Load() {
			return before
		}
		return pass
	}})
	lagging.root(t)
	cutOff.Store(true)
	ahead := start(t, ns, options{})
	ahead.root(t)
	from, _, _ := ahead.State()
	to := from
	to.Step = state.StepPrepare
	eventually(t, "a step", func() error { return ahead.Advance(context.Background(), from, to) })
	ahead.stop()
	check(t, admin(t).ConfigMaps(ns).Delete(context.Background(), state.StateName, metav1.DeleteOptions{}))
	cutOff.Store(false)
	eventually(t, "reported", func() error { return lagging.logs.says("this replica knows epoch 1 while the marker has seen 2") })
	if _, err := admin(t).ConfigMaps(ns).Get(context.Background(), state.StateName, metav1.GetOptions{}); err == nil {
		t.Error("it has put an old state back")
	}
}

// Two leaders: one decides and stops; the other one decides and writes; the first
// one goes on. Its decision is stale at the API server, whatever it believes.
func TestF14_StaleDecisionIsRefused(t *testing.T) {
	ctx := context.Background()
	for name, stop := range map[string]func(*request) bool{
		"before it reads": func(r *request) bool { return r.verb == "GET" && r.kind == "configmaps" },
		"before it writes": func(r *request) bool {
			return r.verb == "PUT" && r.name == state.StateName
		},
	} {
		t.Run(name, func(t *testing.T) {
			ns := newNamespace(t)
			var armed atomic.Bool
			stopped, goOn := make(chan struct{}), make(chan struct{})
			var once atomic.Bool
			sleeper := start(t, ns, options{judge: func(r *request) fault {
				if armed.Load() && stop(r) && once.CompareAndSwap(false, true) {
					close(stopped)
					<-goOn
				}
				return pass
			}})
			sleeper.root(t)
			other := start(t, ns, options{})
			other.root(t)
			from, _, _ := sleeper.State()
			to := from
			to.Step = state.StepPrepare
			armed.Store(true)
			result := make(chan error, 1)
			go func() { result <- sleeper.Advance(ctx, from, to) }()
			<-stopped
			eventually(t, "the other's step", func() error {
				now, _, _ := other.State()
				next := now
				next.Step = state.StepDistribute
				return other.Advance(ctx, now, next)
			})
			close(goOn)
			var stale *state.EpochError
			if err := <-result; !errors.As(err, &stale) {
				t.Errorf("the sleeper's step: %v", err)
			}
			eventually(t, "the sleeper follows", func() error {
				now, _, _ := sleeper.State()
				if now.Step != state.StepDistribute {
					return fmt.Errorf("%+v", now)
				}
				return nil
			})
		})
	}
}

func TestF14_AdvanceWithLostAnswers(t *testing.T) {
	for _, f := range []fault{before, after} {
		ns := newNamespace(t)
		var armed atomic.Bool
		r := start(t, ns, options{judge: func(r *request) fault {
			if r.verb == "PUT" && r.name == state.StateName && armed.CompareAndSwap(true, false) {
				return f
			}
			return pass
		}})
		r.root(t)
		from, _, _ := r.State()
		to := from
		to.Step = state.StepPrepare
		armed.Store(true)
		if err := r.Advance(t.Context(), from, to); (err == nil) != (f == after) {
			t.Errorf("fault %d: %v", f, err)
		}
		eventually(t, "memory and cluster agree", func() error {
			now, _, _ := r.State()
			if !strings.Contains(shared(t, ns), fmt.Sprintf(`"epoch": %d`, now.Epoch)) || now.Step == state.StepPrepare != (f == after) {
				return fmt.Errorf("%+v", now)
			}
			return nil
		})
	}
}

func TestT12_SequenceNeverFalls(t *testing.T) {
	ns := newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	from, _, _ := r.State()
	to := from
	to.Sequence = 7
	check(t, r.Advance(t.Context(), from, to))
	older := shared(t, ns)
	from, _, _ = r.State()
	for name, change := range map[string]func(*state.State){
		"falls":                     func(s *state.State) { s.Sequence = 6 },
		"root that is not there":    func(s *state.State) { s.Bundle, s.Sequence = []int{1, 2}, 8 },
		"bundle without the active": func(s *state.State) { s.Bundle, s.Sequence = nil, 8 },
	} {
		to := from
		change(&to)
		if err := r.Advance(t.Context(), from, to); err == nil {
			t.Errorf("%s: written", name)
		}
	}
	to = from
	to.Sequence = 9
	check(t, r.Advance(t.Context(), from, to))
	r.stop()
	// An older state, put in place while nobody runs.
	newest := shared(t, ns)
	rewrite(t, ns, state.StateName, "state.json", func(string) string { return older })
	r = start(t, ns, options{})
	var e *state.RollbackError
	r.refuses(t, &e, "meshca restore")
	if e.Have != 7 || e.Highest != 9 {
		t.Errorf("%+v", e)
	}
	rewrite(t, ns, state.StateName, "state.json", func(string) string { return newest })
	if !r.root(t).Equal(root) {
		t.Error("another root")
	}
	// The same while a replica runs that knows better: put back.
	rewrite(t, ns, state.StateName, "state.json", func(string) string { return older })
	eventually(t, "put back", func() error {
		if s := shared(t, ns); !strings.Contains(s, `"sequence": 9`) {
			return errors.New(s)
		}
		return nil
	})
}

// Who cannot read the state for 10 min signs no more, if a rotation is under way.
func TestF14_SigningStopsWhereARotationCouldBeRunning(t *testing.T) {
	for _, step := range []state.Step{state.StepNone, state.StepActivate} {
		t.Run(string(step), func(t *testing.T) {
			ns := newNamespace(t)
			var cutOff atomic.Bool
			var skew atomic.Int64
			r := start(t, ns, options{
				judge: func(r *request) fault {
					if cutOff.Load() {
						return before
					}
					return pass
				},
				now: func() time.Time { return time.Now().Add(time.Duration(skew.Load())) },
			})
			r.root(t)
			if step != state.StepNone {
				from, _, _ := r.State()
				to := from
				to.Step = step
				check(t, r.Advance(t.Context(), from, to))
			}
			cutOff.Store(true)
			eventually(t, "cut off", func() error {
				if r.Trouble() == nil {
					return errors.New("not yet")
				}
				return nil
			})
			skew.Store(int64(9 * time.Minute))
			check(t, r.MaySign())
			skew.Store(int64(11 * time.Minute))
			err := r.MaySign()
			if step == state.StepNone {
				check(t, err)
				r.root(t)
				return
			}
			if !errors.As(err, new(*state.StaleError)) {
				t.Fatalf("MaySign = %v", err)
			}
			r.refuses(t, new(*state.StaleError), "rotation")
			cutOff.Store(false)
			eventually(t, "signing again", r.MaySign)
		})
	}
}

func TestConcurrentRepairsAgree(t *testing.T) {
	ns := newNamespace(t)
	var all []*replica
	for range 3 {
		all = append(all, start(t, ns, options{}))
	}
	root := all[0].root(t)
	for range 5 {
		rewrite(t, ns, state.StateName, "state.json", func(string) string { return "" })
		eventually(t, "agreement", func() error {
			var epochs []uint64
			for _, r := range all {
				s, _, _ := r.State()
				epochs = append(epochs, s.Epoch)
			}
			if s := shared(t, ns); len(slices.Compact(epochs)) != 1 || !strings.Contains(s, fmt.Sprintf(`"epoch": %d`, epochs[0])) {
				return fmt.Errorf("epochs %v, state %s", epochs, s)
			}
			return nil
		})
	}
	if !root.Equal(onlyRoot(t, ns)) {
		t.Error("another root")
	}
}
