package jwks

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"errors"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
	"github.com/meshca/meshca/identity/token/tokentest"
)

// fakeSource is a source whose content the test sets.
type fakeSource struct {
	mu       sync.Mutex
	document []byte
	err      error
	hang     bool // until the context ends
	loads    int
}

func (f *fakeSource) set(document []byte, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.document, f.err = document, err
}

func (f *fakeSource) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.loads
}

func (f *fakeSource) Load(ctx context.Context) ([]byte, error) {
	f.mu.Lock()
	f.loads++
	document, err, hang := f.document, f.err, f.hang
	f.mu.Unlock()
	if hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return document, err
}

func (f *fakeSource) interval() time.Duration { return httpInterval }
func (f *fakeSource) String() string          { return "fake" }

// keyDocument returns a set with a new P-256 key for each ID.
func keyDocument(t testing.TB, kids ...string) []byte {
	t.Helper()
	var keys []any
	for _, kid := range kids {
		keys = append(keys, jwk(t, tokentest.NewKey(t, elliptic.P256()).Public(), kid, nil))
	}
	return document(t, keys...)
}

func newCache(t testing.TB, source Source, log *bytes.Buffer) *Cache {
	t.Helper()
	c := Config{Source: source, Issuer: "https://issuer.example"}
	if log != nil {
		c.Log = slog.New(slog.NewTextHandler(log, nil))
	}
	k, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// has checks which keys there are for an ID; a negative number stands for an
// error.
func has(t *testing.T, k *Cache, kid string, want int) {
	t.Helper()
	keys, err := k.Keys(t.Context(), kid)
	switch {
	case want < 0 && err == nil:
		t.Errorf("%q: %d keys, expected an error", kid, len(keys))
	case want >= 0 && err != nil:
		t.Errorf("%q: error %v, expected %d keys", kid, err, want)
	case want >= 0 && len(keys) != want:
		t.Errorf("%q: %d keys, expected %d", kid, len(keys), want)
	}
}

// However many callers ask for keys that do not exist, the source is asked once
// in 10 s.
func TestF28_UnknownKeyStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{document: keyDocument(t, "a")}
		k := newCache(t, source, nil)
		storm := func() {
			var all sync.WaitGroup
			for range 100 {
				all.Go(func() {
					// Whether it is known that there are none depends on who came first.
					if keys, _ := k.Keys(t.Context(), "unknown"); keys != nil {
						t.Errorf("keys %v", keys)
					}
				})
			}
			all.Wait()
		}
		storm()
		if n := source.count(); n != 1 {
			t.Errorf("%d loads in the first storm, expected 1", n)
		}
		time.Sleep(onDemand - time.Nanosecond)
		storm()
		if n := source.count(); n != 1 {
			t.Errorf("%d loads before 10 s, expected 1", n)
		}
		time.Sleep(time.Nanosecond)
		storm()
		if n := source.count(); n != 2 {
			t.Errorf("%d loads after 10 s, expected 2", n)
		}
		has(t, k, "a", 1)
		if n := source.count(); n != 2 {
			t.Errorf("a known key caused a load")
		}
	})
}

// A key that is published while the set may not be loaded again is not known,
// and not unknown either: its tokens are good ones.
func TestV16_F28_NewKeyBetweenLoads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{document: keyDocument(t, "a")}
		k := newCache(t, source, nil)
		has(t, k, "stranger's", 0)
		source.set(keyDocument(t, "a", "new"), nil)
		time.Sleep(onDemand / 2)
		has(t, k, "new", -1)
		has(t, k, "a", 1)
		time.Sleep(onDemand / 2)
		has(t, k, "stranger's", 0) // strangers cause the load as well as anybody
		has(t, k, "new", 1)
	})
}

func TestF28_T13_RotationIsSeenAndOldKeysKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{document: keyDocument(t, "old", "stays")}
		k := newCache(t, source, nil)
		has(t, k, "old", 1)
		time.Sleep(onDemand)
		source.set(keyDocument(t, "new", "stays"), nil)
		has(t, k, "old", 1)
		has(t, k, "new", 1)   // looked for, and found
		has(t, k, "old", 1)   // gone, and still given out
		has(t, k, "stays", 2) // under the same ID another key: both, for a minute
		time.Sleep(keepGone - time.Nanosecond)
		has(t, k, "old", 1)
		time.Sleep(time.Nanosecond)
		has(t, k, "old", 0)
		has(t, k, "stays", 1)
		has(t, k, "new", 1)
	})
}

// A key that has gone ends by the clock, though nothing is read any more that
// could sweep it out.
func TestV46_AGoneKeyEndsAtUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{document: keyDocument(t, "old")}
		k := newCache(t, source, nil)
		has(t, k, "old", 1)
		time.Sleep(onDemand)
		source.set(keyDocument(t, "new"), nil)
		has(t, k, "new", 1)
		source.set(nil, errors.New("gone away"))
		time.Sleep(keepGone - time.Nanosecond)
		has(t, k, "old", 1)
		time.Sleep(time.Nanosecond)
		has(t, k, "old", -1) // there is no telling now, and no key
		has(t, k, "new", 1)
	})
}

func TestT13_KeyThatComesBackStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		both, one := keyDocument(t, "a", "b"), keyDocument(t, "c")
		source := &fakeSource{document: both}
		k := newCache(t, source, nil)
		for _, document := range [][]byte{both, one, both} {
			source.set(document, nil)
			has(t, k, "?", 0)
			time.Sleep(onDemand)
		}
		time.Sleep(2 * keepGone)
		has(t, k, "a", 1)
		has(t, k, "c", 0)
	})
}

// A source that fails takes nothing away, and without any key set every
// question is an error.
func TestV16_F28_SourceAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := errors.New("connection refused")
		source := &fakeSource{err: away}
		var log bytes.Buffer
		k := newCache(t, source, &log)
		for range 3 {
			if _, err := k.Keys(t.Context(), "a"); !errors.Is(err, away) {
				t.Fatalf("error %v, expected the cause", err)
			}
		}
		if n := source.count(); n != 1 {
			t.Errorf("%d loads, expected 1", n)
		}
		time.Sleep(onDemand)
		source.set(keyDocument(t, "a"), nil)
		has(t, k, "a", 1)
		for _, bad := range []func(){
			func() { source.set(nil, away) },
			func() { source.set([]byte("<html>"), nil) },
			func() { source.set([]byte(`{"keys":[]}`), nil) },
		} {
			time.Sleep(onDemand)
			bad()
			has(t, k, "b", -1) // not known: it may have been published
			has(t, k, "a", 1)
		}
		time.Sleep(365 * 24 * time.Hour)
		has(t, k, "a", 1)
		for _, want := range []string{"every token is refused until they can", "connection refused", "the last good ones stay in use", "none of the 0 keys"} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("log lacks %q:\n%s", want, &log)
			}
		}
	})
}

// Ready from the first good set on, and whatever happens to the source then.
func TestT18_ReadyWithTheFirstKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{err: errors.New("connection refused")}
		k := newCache(t, source, nil)
		if err := k.Ready(); err == nil || !strings.Contains(err.Error(), "not been read yet") {
			t.Errorf("before the first attempt: %v", err)
		}
		has(t, k, "a", -1)
		if err := k.Ready(); err == nil || !strings.Contains(err.Error(), `"https://issuer.example"`) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("after a bad attempt: %v", err)
		}
		source.set(keyDocument(t, "a"), nil)
		time.Sleep(onDemand)
		has(t, k, "a", 1)
		source.set(nil, errors.New("connection refused"))
		time.Sleep(onDemand)
		has(t, k, "b", -1)
		if err := k.Ready(); err != nil {
			t.Errorf("with the last good keys: %v", err)
		}
	})
}

// A caller that hangs up neither breaks off the attempt for the others nor waits
// for one of theirs.
func TestF28_CallerHangsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{document: keyDocument(t, "a")}
		k := newCache(t, source, nil)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if keys, err := k.Keys(gone, "a"); err != nil && !errors.Is(err, context.Canceled) || err == nil && len(keys) != 1 {
			t.Errorf("keys %v, error %v", keys, err)
		}
		has(t, k, "a", 1)

		source.hang = true
		time.Sleep(onDemand)
		var leader sync.WaitGroup
		leader.Go(func() { has(t, k, "b", -1) })
		synctest.Wait()
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := k.Keys(short, "b"); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("error %v after %s, expected the deadline after 1s", err, time.Since(began))
		}
		has(t, k, "a", 1) // known keys wait for nobody
		leader.Wait()
		if d := time.Since(began); d != loadTimeout {
			t.Errorf("the attempt took %s, expected %s", d, loadTimeout)
		}
	})
}

// A source that hangs gathers a bounded number of callers; the next one learns at
// once that there is no answer now, and known keys are given out all the while.
func TestF28_T17_Waiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{document: keyDocument(t, "a")}
		k := newCache(t, source, nil)
		has(t, k, "a", 1)
		source.hang = true
		time.Sleep(onDemand)
		var waiters sync.WaitGroup
		for range maxWaiting {
			waiters.Go(func() { has(t, k, "b", -1) })
		}
		synctest.Wait()
		began := time.Now()
		has(t, k, "b", -1)
		has(t, k, "a", 1)
		if d := time.Since(began); d != 0 {
			t.Errorf("waited %s behind %d others", d, maxWaiting)
		}
		waiters.Wait()
		source.hang = false
		time.Sleep(onDemand)
		has(t, k, "b", 0) // there is room again
	})
}

// The caller whose question caused the attempt may hang up; the attempt goes on.
func TestF28_LeaderHangsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{hang: true}
		k := newCache(t, source, nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := k.Keys(ctx, "a"); err == nil || time.Since(began) != loadTimeout {
			t.Errorf("error %v after %s, expected one after %s", err, time.Since(began), loadTimeout)
		}
	})
}

func TestRunRefreshes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{err: errors.New("away")}
		k := newCache(t, source, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		synctest.Wait()
		has(t, k, "a", -1)
		source.set(keyDocument(t, "a"), nil)
		time.Sleep(onDemand) // after a failure soon
		synctest.Wait()
		if keys := k.held("a"); len(keys) != 1 {
			t.Fatal("not loaded again 10 s after a failure")
		}
		source.set(keyDocument(t, "b"), nil)
		time.Sleep(httpInterval - time.Second)
		synctest.Wait()
		if keys := k.held("b"); keys != nil {
			t.Fatal("loaded before its time")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if keys := k.held("b"); len(keys) != 1 {
			t.Fatal("not loaded after 5 min")
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run returned %v", err)
		}
	})
}

// A Run that ends in the middle of its first attempt has found out nothing.
func TestV16_NothingReadYetIsNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{hang: true}
		k := newCache(t, source, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		synctest.Wait()
		cancel()
		<-done
		has(t, k, "a", -1)
	})
}

// An attempt that was broken off while a question waited answers nothing either.
func TestV16_BrokenOffIsNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{document: keyDocument(t, "a")}
		k := newCache(t, source, nil)
		has(t, k, "a", 1)
		time.Sleep(onDemand)
		k.loading <- struct{}{}
		var asking sync.WaitGroup
		asking.Go(func() { has(t, k, "b", -1) })
		synctest.Wait()
		source.hang = true
		ending, cancel := context.WithCancel(t.Context())
		cancel()
		k.load(ending)
		<-k.loading
		asking.Wait()
	})
}

// A file is judged by its content, bad content changes nothing, and the log says
// why, once.
func TestFileIsPolledByContent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "jwks.json")
		write := func(b []byte) {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write(keyDocument(t, "a"))
		var log bytes.Buffer
		k := newCache(t, File(path), &log)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		synctest.Wait()
		has(t, k, "a", 1)
		write([]byte(`{"keys":[`))
		for range 5 {
			time.Sleep(fileInterval)
			synctest.Wait()
		}
		has(t, k, "a", 1)
		if n := strings.Count(log.String(), "the last good ones stay in use"); n != 1 {
			t.Errorf("the log says %d times that the file is bad:\n%s", n, &log)
		}
		write(keyDocument(t, "b"))
		time.Sleep(fileInterval)
		synctest.Wait()
		if k.held("b") == nil {
			t.Errorf("new content not read within %s", fileInterval)
		}
		cancel()
		<-done
	})
}

// From an issuer's set to a verified token, and over to its next key.
func TestCacheServesTheVerifier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const url = "https://issuer.example"
		old, next := tokentest.NewIssuer(t, url, nil, time.Now), tokentest.NewIssuer(t, url, tokentest.RSAKey(t), time.Now)
		source := &fakeSource{document: old.JWKS()}
		v, err := token.New(token.Config{Issuers: []token.Issuer{{
			URL: url, Keys: newCache(t, source, nil), Audiences: map[string]time.Duration{"meshca": time.Hour},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		issue := func(i *tokentest.Issuer) string {
			raw, err := i.Issue(tokenissuer.Claims{Namespace: "shop", ServiceAccount: "cart", Audience: []string{"meshca"}, Lifetime: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			return raw
		}
		if _, err := v.Verify(t.Context(), issue(old)); err != nil {
			t.Fatal(err)
		}
		source.set(next.JWKS(), nil)
		time.Sleep(onDemand)
		for _, raw := range []string{issue(next), issue(old)} {
			if _, err := v.Verify(t.Context(), raw); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(keepGone)
		var invalid *token.InvalidError
		if _, err := v.Verify(t.Context(), issue(old)); !errors.As(err, &invalid) {
			t.Errorf("error %v for a key that is gone", err)
		}
		source.set(nil, errors.New("away"))
		time.Sleep(onDemand)
		var unavailable *token.UnavailableError
		if _, err := v.Verify(t.Context(), issue(old)); !errors.As(err, &unavailable) {
			t.Errorf("error %v for an unknown key while the source is away", err)
		}
	})
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	now := time.Unix(1_800_000_000, 0)
	source := &fakeSource{document: keyDocument(t, "a")}
	for _, issuer := range []string{"one", "two"} {
		k, err := New(Config{Source: source, Issuer: issuer, Now: func() time.Time { return now }, Metrics: registry})
		if err != nil {
			t.Fatal(err)
		}
		if issuer == "one" {
			has(t, k, "a", 1)
			now = now.Add(onDemand)
			source.set(nil, errors.New("away"))
			has(t, k, "b", -1)
		}
	}
	if _, err := New(Config{Source: source, Issuer: "one", Metrics: registry}); err == nil {
		t.Error("two caches for one issuer share their metrics")
	}
	want := `# HELP meshca_token_key_loads_total Attempts to read a token issuer's public keys, by result (ok, error).
# TYPE meshca_token_key_loads_total counter
meshca_token_key_loads_total{issuer="one",result="error"} 1
meshca_token_key_loads_total{issuer="one",result="ok"} 1
meshca_token_key_loads_total{issuer="two",result="error"} 0
meshca_token_key_loads_total{issuer="two",result="ok"} 0
# HELP meshca_token_keys_read_timestamp_seconds When a token issuer's public keys were last read successfully, in seconds since 1970; 0 if never.
# TYPE meshca_token_keys_read_timestamp_seconds gauge
meshca_token_keys_read_timestamp_seconds{issuer="one"} 1.8e+09
meshca_token_keys_read_timestamp_seconds{issuer="two"} 0
`
	page := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
	if got := page.Body.String(); got != want {
		t.Errorf("metrics are\n%s\nexpected\n%s", got, want)
	}
}
