package roots_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/roots"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const ceiling = time.Hour

// margin is what the keeper adds to the ceiling.
const margin = 10 * time.Minute

func newRoot(t testing.TB) *x509.Certificate {
	t.Helper()
	c, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Now: time.Now})
	check(t, err)
	return c
}

// memory is a store in memory that can be told to fail.
type memory struct {
	mu      sync.Mutex
	data    []byte
	saves   int
	loadErr error
	saveErr error
	lost    bool   // saveErr comes after the record was written
	before  func() // runs before a save
}

func (m *memory) Load(ctx context.Context) ([]byte, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.loadErr != nil {
		return nil, "", m.loadErr
	}
	return bytes.Clone(m.data), m.version(), ctx.Err()
}

func (m *memory) version() string {
	if m.data == nil {
		return ""
	}
	return fmt.Sprintf("%x", sha256.Sum256(m.data))
}

func (m *memory) Save(_ context.Context, data []byte, version string) error {
	m.mu.Lock()
	before := m.before
	m.before = nil
	m.mu.Unlock()
	if before != nil {
		before()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.version() != version {
		return fmt.Errorf("saving: %w", roots.ErrConflict)
	}
	if m.saveErr == nil || m.lost {
		m.data = bytes.Clone(data)
		m.saves++
	}
	return m.saveErr
}

func (m *memory) set(data []byte) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.data
	m.data = data
	return old
}

// written is how often the record was saved.
func (m *memory) written() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.saves
}

// replica makes a keeper that runs until the test ends.
func replica(t *testing.T, store roots.Store) *roots.Keeper {
	t.Helper()
	k, _ := logged(t, store)
	return k
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func logged(t *testing.T, store roots.Store) (*roots.Keeper, *safeBuffer) {
	t.Helper()
	log := new(safeBuffer)
	k, err := roots.New(roots.Config{
		TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Store: store, Ceiling: ceiling,
		Now: time.Now, Log: slog.New(slog.NewTextHandler(log, nil)),
	})
	check(t, err)
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { check(t, k.Run(ctx)) })
	t.Cleanup(func() { stop(); running.Wait() })
	return k, log
}

func agree(t *testing.T, k *roots.Keeper, anchor *x509.Certificate, shown ...*x509.Certificate) *identity.Bundle {
	t.Helper()
	b, err := k.Agree(t.Context(), anchor, shown)
	check(t, err)
	return b
}

func holds(t *testing.T, k *roots.Keeper, want ...*x509.Certificate) *identity.Bundle {
	t.Helper()
	b, _ := k.Bundle()
	if b == nil || !slices.EqualFunc(b.Authorities(), want, (*x509.Certificate).Equal) {
		t.Fatalf("the bundle is %v, want %d roots", b, len(want))
	}
	return b
}

// A root replaced by the book, with two replicas of which one sees its files late.
func TestT12_F10_RootIsReplacedWithoutCuttingAnybodyOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(memory)
		one, two := replica(t, store), replica(t, store)
		a, b := newRoot(t), newRoot(t)
		first := agree(t, one, a, a)
		if second := agree(t, two, a, a); !second.Equal(first) {
			t.Errorf("two replicas, two bundles: %d and %d", first.Sequence(), second.Sequence())
		}

		// All at once: refused.
		var untrusted *roots.UntrustedError
		if err := one.Judge(b, []*x509.Certificate{a, b}); !errors.As(err, &untrusted) || !untrusted.Ready.IsZero() {
			t.Errorf("a root that nobody knows: %v", err)
		}
		if _, err := one.Agree(t.Context(), b, []*x509.Certificate{a, b}); !errors.As(err, &untrusted) {
			t.Errorf("a root that nobody knows: %v", err)
		}
		holds(t, one, a)

		// Beside the old one.
		began := time.Now()
		both := agree(t, one, a, a, b)
		if both.Sequence() <= first.Sequence() {
			t.Errorf("sequence %d after %d", both.Sequence(), first.Sequence())
		}
		time.Sleep(6 * time.Second)
		holds(t, two, a, b) // which shows only a
		if _, err := one.Agree(t.Context(), b, []*x509.Certificate{a, b}); !errors.As(err, &untrusted) || untrusted.Ready.Sub(began).Round(time.Second) != roots.DefaultSettle {
			t.Errorf("a root that has not reached everybody: %v", err)
		}
		time.Sleep(roots.DefaultSettle)
		agree(t, one, b, a, b)
		agree(t, two, b, a, b)
		moved := time.Now()
		holds(t, two, a, b)

		// The old one is left out.
		var orphan *roots.OrphanError
		time.Sleep(ceiling - time.Minute)
		if err := one.Judge(b, []*x509.Certificate{b}); !errors.As(err, &orphan) || orphan.Until.Sub(moved).Abs() > ceiling+margin {
			t.Errorf("a root with living certificates is left out: %v", err)
		}
		if _, err := one.Agree(t.Context(), b, []*x509.Certificate{b}); !errors.As(err, &orphan) {
			t.Errorf("a root with living certificates is left out: %v", err)
		}
		holds(t, one, a, b)
		time.Sleep(margin + 2*time.Minute)
		agree(t, one, b, b)
		time.Sleep(6 * time.Second)
		last := holds(t, one, b)
		if last.Sequence() <= both.Sequence() {
			t.Errorf("sequence %d after %d", last.Sequence(), both.Sequence())
		}
		time.Sleep(20 * time.Second)
		holds(t, two, b) // takes over what the first has done
	})
}

// A root that is signed under stays, however long ago the last intermediate was made.
func TestT12_F10_RootInUseStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(memory)
		one, two := replica(t, store), replica(t, store)
		a, b := newRoot(t), newRoot(t)
		agree(t, one, a, a, b)
		agree(t, two, b, a, b) // roots of the first bundle can be used at once
		time.Sleep(3 * ceiling)
		for _, dropped := range []*x509.Certificate{a, b} {
			left := slices.DeleteFunc([]*x509.Certificate{a, b}, dropped.Equal)
			if err := one.Judge(left[0], left); !errors.As(err, new(*roots.OrphanError)) {
				t.Errorf("a root in use is left out: %v", err)
			}
		}
	})
}

// All that was signed is over: whatever the upstream shows is better than nothing.
func TestF50_DeadMeshTakesAnyRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(memory)
		a, b := newRoot(t), newRoot(t)
		k, err := roots.New(roots.Config{TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Store: store, Ceiling: ceiling, Now: time.Now})
		check(t, err)
		first := agree(t, k, a, a)
		time.Sleep(ceiling + margin + time.Minute)
		next := replica(t, store)
		if got := agree(t, next, b, b); got.Sequence() <= first.Sequence() {
			t.Errorf("sequence %d after %d", got.Sequence(), first.Sequence())
		}
		time.Sleep(6 * time.Second)
		holds(t, next, b)
	})
}

// What becomes of the record behind the replicas' backs is mended from memory, and
// the sequence never falls.
func TestT12_F13_RecordIsPutBack(t *testing.T) {
	for name, harm := range map[string]func(now, old []byte) []byte{
		"deleted":   func([]byte, []byte) []byte { return nil },
		"emptied":   func([]byte, []byte) []byte { return []byte{} },
		"hollow":    func([]byte, []byte) []byte { return []byte("{}") },
		"torn":      func(now, _ []byte) []byte { return now[:len(now)/2] },
		"rewritten": func(now, _ []byte) []byte { return append(now, '\n') },
		"older":     func(_, old []byte) []byte { return old },
		"a root taken out, the sequence kept": func(now, old []byte) []byte {
			sequence := func(b []byte) []byte {
				return b[bytes.Index(b, []byte(`"sequence"`)):bytes.Index(b, []byte(`"roots"`))]
			}
			return bytes.Replace(old, sequence(old), sequence(now), 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := new(memory)
				k, log := logged(t, store)
				a, b := newRoot(t), newRoot(t)
				agree(t, k, a, a)
				old := store.set(nil)
				store.set(old)
				time.Sleep(time.Minute)
				agree(t, k, a, a, b)
				now := store.set(nil)
				store.set(harm(bytes.Clone(now), bytes.Clone(old)))
				time.Sleep(6 * time.Second)
				holds(t, k, a, b)
				if got := store.set(nil); !bytes.Equal(got, now) {
					t.Errorf("the record is\n%s\nwant\n%s", got, now)
				}
				if !strings.Contains(log.String(), "put back from memory") {
					t.Errorf("nobody is told:\n%s", log)
				}
			})
		})
	}
}

// A record that was lost while nobody was there: the new one begins above whatever
// consumers may hold.
func TestT12_LostRecordIsNoRollback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(memory)
		a, b := newRoot(t), newRoot(t)
		k, err := roots.New(roots.Config{TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Store: store, Ceiling: ceiling, Now: time.Now})
		check(t, err)
		agree(t, k, a, a)
		time.Sleep(time.Minute)
		before := agree(t, k, a, a, b)
		store.set(nil)
		time.Sleep(time.Minute)
		if got := agree(t, replica(t, store), a, a); got.Sequence() <= before.Sequence() {
			t.Errorf("sequence %d after %d", got.Sequence(), before.Sequence())
		}
	})
}

// A replica that starts with a damaged record, or another domain's, or a newer
// program's, says so and overwrites nothing.
func TestF13_DamagedRecordIsNotReplacedAtStart(t *testing.T) {
	good := new(memory)
	a := newRoot(t)
	agree(t, replica(t, good), a, a)
	text := string(good.set(nil))
	for name, tt := range map[string]struct{ text, want string }{
		"torn":           {text[:len(text)/2], "damaged"},
		"other domain":   {strings.Replace(text, "cluster.local", "cluster.other", 1), "cannot be renamed"},
		"newer":          {strings.Replace(text, `"version": 1`, `"version": 2`, 1), "newer program"},
		"no root":        {strings.Split(text, `"roots"`)[0] + "\"roots\": null\n}\n", "no root"},
		"no certificate": {strings.Replace(text, "BEGIN CERT", "BEGIN SERT", 1), "root 1 of 1"},
		"too large":      {strings.Repeat(" ", 1<<20) + text, "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			store := &memory{data: []byte(tt.text)}
			_, err := replica(t, store).Agree(t.Context(), a, []*x509.Certificate{a})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if store.saves != 0 {
				t.Error("it was overwritten")
			}
		})
	}
}

// Two replicas whose operators add different roots at once: both are kept.
func TestReplicasAddAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(memory)
		one, two := replica(t, store), replica(t, store)
		a, b, c := newRoot(t), newRoot(t), newRoot(t)
		agree(t, one, a, a)
		agree(t, two, a, a)
		store.before = func() { agree(t, two, a, a, c) }
		agree(t, one, a, a, b)
		holds(t, one, a, c, b)
	})
}

// Writes that fail, before and after they have taken effect.
func TestWritesThatFail(t *testing.T) {
	for _, lost := range []bool{false, true} {
		t.Run(fmt.Sprintf("written %v", lost), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := new(memory)
				k := replica(t, store)
				a, b := newRoot(t), newRoot(t)
				first := agree(t, k, a, a)
				store.saveErr, store.lost = errors.New("no space"), lost
				if _, err := k.Agree(t.Context(), a, []*x509.Certificate{a, b}); err == nil || !strings.Contains(err.Error(), "no space") {
					t.Fatalf("got %v", err)
				}
				if got := holds(t, k, a); got != first {
					t.Error("another bundle is in force")
				}
				store.saveErr = nil
				both := agree(t, k, a, a, b)
				again := agree(t, replica(t, store), a, a, b)
				if !again.Equal(both) || both.Sequence() <= first.Sequence() {
					t.Errorf("bundles %d, %d, %d", first.Sequence(), both.Sequence(), again.Sequence())
				}
			})
		})
	}
}

// A store that is away for a day changes nothing, and is told of once.
func TestF21_StoreAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(memory)
		k, log := logged(t, store)
		a := newRoot(t)
		first := agree(t, k, a, a)
		store.mu.Lock()
		store.loadErr = errors.New("connection refused")
		store.mu.Unlock()
		time.Sleep(24 * time.Hour)
		if got := holds(t, k, a); got != first || k.Trouble() == nil {
			t.Errorf("trouble %v", k.Trouble())
		}
		if n := strings.Count(log.String(), "connection refused"); n != 1 {
			t.Errorf("told %d times", n)
		}
		store.mu.Lock()
		store.loadErr = nil
		store.mu.Unlock()
		time.Sleep(6 * time.Second)
		if err := k.Trouble(); err != nil {
			t.Errorf("still %v", err)
		}
	})
}

// A quiet mesh writes its record every ten minutes, and not each time it looks.
func TestFewWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(memory)
		one, two := replica(t, store), replica(t, store)
		a := newRoot(t)
		agree(t, one, a, a)
		agree(t, two, a, a)
		before := store.written()
		time.Sleep(10 * time.Hour)
		if n := store.written() - before; n < 50 || n > 61 {
			t.Errorf("%d writes in 10 h", n)
		}
	})
}

func FuzzRecord(f *testing.F) {
	store := new(memory)
	k, err := roots.New(roots.Config{TrustDomain: identitytest.TrustDomain(f, "cluster.local"), Store: store, Ceiling: ceiling, Now: time.Now})
	check(f, err)
	a := newRoot(f)
	_, err = k.Agree(f.Context(), a, []*x509.Certificate{a})
	check(f, err)
	f.Add(store.data)
	f.Add([]byte(`{"version":1,"trust_domain":"cluster.local","sequence":0,"roots":[{}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		store := &memory{data: data}
		k, err := roots.New(roots.Config{TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Store: store, Ceiling: ceiling, Now: time.Now})
		check(t, err)
		b, err := k.Agree(t.Context(), a, []*x509.Certificate{a})
		if err == nil && (b.Sequence() == 0 || !slices.ContainsFunc(b.Authorities(), a.Equal)) {
			t.Errorf("agreed on %v", b)
		}
	})
}

func TestReadBundle(t *testing.T) {
	store := new(memory)
	a := newRoot(t)
	b := agree(t, replica(t, store), a, a)
	data := store.set(nil)
	if got, err := roots.ReadBundle(data); err != nil || !got.Equal(b) {
		t.Errorf("read %v, %v", got, err)
	}
	for _, bad := range []string{"", "{}", string(data[:len(data)/2]), `{"version":1,"trust_domain":"Not One"}`} {
		if _, err := roots.ReadBundle([]byte(bad)); !errors.As(err, new(*roots.CorruptError)) {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
}
