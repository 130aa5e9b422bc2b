package kubestate

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/state"
)

func backup(t testing.TB, ns string) *state.Backup {
	t.Helper()
	b, err := state.TakeBackup(context.Background(), admin(t), ns, time.Now())
	check(t, err)
	again, err := state.ParseBackup("file", b.Encode())
	check(t, err)
	return again
}

// emptied removes everything of ours from a namespace.
func emptied(t testing.TB, ns string) {
	t.Helper()
	ctx := context.Background()
	for _, s := range secrets(t, ns) {
		check(t, admin(t).Secrets(ns).Delete(ctx, s.Name, metav1.DeleteOptions{}))
	}
	check(t, admin(t).ConfigMaps(ns).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
}

// Whatever is missing comes back, while replicas that refuse look on; and they go
// on by themselves.
func TestF64_F13_RestoreBringsTheSameRootBack(t *testing.T) {
	ctx := context.Background()
	for name, lose := range map[string][]string{
		"key":        {state.SecretName(1)},
		"marker":     {state.MarkerName},
		"key, state": {state.SecretName(1), state.StateName},
	} {
		t.Run(name, func(t *testing.T) {
			ns := newNamespace(t)
			r := start(t, ns, options{})
			root := r.root(t)
			settled(t, ns)
			r.stop()
			b := backup(t, ns)
			for _, n := range lose {
				err := errors.Join(admin(t).Secrets(ns).Delete(ctx, n, metav1.DeleteOptions{}), admin(t).ConfigMaps(ns).Delete(ctx, n, metav1.DeleteOptions{}))
				if strings.Count(err.Error(), "not found") != 1 || strings.Contains(err.Error(), "\n") {
					t.Fatal(err) // each name is of one kind
				}
			}
			waiting := []*replica{start(t, ns, options{}), start(t, ns, options{})}
			for _, w := range waiting {
				w.refuses(t, new(*state.LostError), "meshca restore")
			}
			done, err := b.Restore(ctx, admin(t), ns, false)
			check(t, err)
			for _, n := range lose {
				if !slices.ContainsFunc(done.Created, func(s string) bool { return strings.HasSuffix(s, " "+n) }) {
					t.Errorf("%s is not among %q", n, done.Created)
				}
			}
			for _, w := range waiting {
				if !w.root(t).Equal(root) {
					t.Error("another root")
				}
				w.stop()
			}
			done, err = b.Restore(ctx, admin(t), ns, false)
			check(t, err)
			if len(done.Created)+len(done.Replaced) != 0 || len(done.Kept) != 3 {
				t.Errorf("restored again: %+v", done)
			}
		})
	}
}

func TestF13_RestoreIntoAnEmptyNamespace(t *testing.T) {
	ns := newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	r.stop()
	b := backup(t, ns)
	emptied(t, ns)
	_, err := b.Restore(t.Context(), admin(t), ns, false)
	check(t, err)
	r2 := start(t, ns, options{})
	if !r2.root(t).Equal(root) {
		t.Error("another root")
	}
}

func TestF13_F64_RestoreNeverReplacesARoot(t *testing.T) {
	ctx := t.Context()
	ns, other := newNamespace(t), newNamespace(t)
	for _, n := range []string{ns, other} {
		r := start(t, n, options{})
		r.root(t)
		settled(t, n)
		r.stop()
	}
	b := backup(t, ns)
	if _, err := b.Restore(ctx, admin(t), other, true); !errors.As(err, new(*state.ReplacedError)) {
		t.Errorf("over another root with its marker: %v", err)
	}
	// Without the marker the Secret alone tells.
	check(t, admin(t).ConfigMaps(other).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
	if _, err := b.Restore(ctx, admin(t), other, true); !errors.As(err, new(*state.ReplacedError)) {
		t.Errorf("over another root: %v", err)
	}
	if all, err := admin(t).ConfigMaps(other).List(ctx, metav1.ListOptions{}); err != nil || len(all.Items) != 0 {
		t.Errorf("a refused restore has written %d objects (%v)", len(all.Items), err)
	}
	domain := newNamespace(t)
	r := start(t, domain, options{domain: "other.test"})
	r.root(t)
	r.stop()
	if _, err := b.Restore(ctx, admin(t), domain, true); !errors.As(err, new(*state.TrustDomainError)) {
		t.Errorf("over another trust domain: %v", err)
	}
}

func TestT12_OlderBackupIsRefusedOrBecomesTheNewest(t *testing.T) {
	ctx := t.Context()
	ns := newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	b := backup(t, ns)
	from, _, _ := r.State()
	to := from
	to.Sequence = 9
	check(t, r.Advance(ctx, from, to))
	r.stop()
	check(t, admin(t).ConfigMaps(ns).Delete(ctx, state.StateName, metav1.DeleteOptions{}))
	var e *state.RollbackError
	if _, err := b.Restore(ctx, admin(t), ns, false); !errors.As(err, &e) || !strings.Contains(err.Error(), "--as-newest") {
		t.Fatalf("an older backup: %v", err)
	}
	if _, err := admin(t).ConfigMaps(ns).Get(ctx, state.StateName, metav1.GetOptions{}); err == nil {
		t.Fatal("it was written")
	}
	done, err := b.Restore(ctx, admin(t), ns, true)
	check(t, err)
	if done.Sequence != 10 {
		t.Errorf("sequence %d, want one above all that there have been", done.Sequence)
	}
	r = start(t, ns, options{})
	if !r.root(t).Equal(root) {
		t.Error("another root")
	}
	s, err := r.signs(t)
	check(t, err)
	if s.Sequence != 10 {
		t.Errorf("sequence %d", s.Sequence)
	}
}

// A newer state than the backup's is kept.
func TestT12_RestoreDoesNotTakeBack(t *testing.T) {
	ns := newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	b := backup(t, ns)
	from, _, _ := r.State()
	to := from
	to.Sequence = 9
	check(t, r.Advance(t.Context(), from, to))
	r.stop()
	check(t, admin(t).Secrets(ns).Delete(t.Context(), state.SecretName(1), metav1.DeleteOptions{}))
	done, err := b.Restore(t.Context(), admin(t), ns, false)
	check(t, err)
	if done.Sequence != 9 || !slices.Contains(done.Kept, "ConfigMap "+state.StateName) {
		t.Errorf("%+v", done)
	}
	if !start(t, ns, options{}).root(t).Equal(root) {
		t.Error("another root")
	}
}

// A backup of what the CA itself would refuse is none.
func TestF13_BackupOfAnIncompleteNamespaceIsRefused(t *testing.T) {
	ns := newNamespace(t)
	if _, err := state.TakeBackup(t.Context(), admin(t), ns, time.Now()); !errors.As(err, new(*state.NothingError)) {
		t.Errorf("of an empty namespace: %v", err)
	}
	r := start(t, ns, options{})
	r.root(t)
	r.stop()
	data := backup(t, ns).Encode()
	// The last part of the file is the roots, whose every byte counts.
	for i := bytes.LastIndex(data, []byte(`"roots": [`)); i < len(data); i += 7 {
		flipped := slices.Clone(data)
		flipped[i] ^= 1
		if _, err := state.ParseBackup("file", flipped); err == nil {
			t.Errorf("a bit flipped in byte %d is not noticed", i)
		}
	}
	check(t, admin(t).Secrets(ns).Delete(t.Context(), state.SecretName(1), metav1.DeleteOptions{}))
	_, err := state.TakeBackup(t.Context(), admin(t), ns, time.Now())
	if !errors.As(err, new(*state.LostError)) {
		t.Errorf("without the key: %v", err)
	}
	_, err = admin(t).Secrets(ns).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: state.SecretName(1)}}, metav1.CreateOptions{})
	check(t, err)
	if _, err = state.TakeBackup(t.Context(), admin(t), ns, time.Now()); !errors.As(err, new(*state.CorruptError)) {
		t.Errorf("with an empty key: %v", err)
	}
}
