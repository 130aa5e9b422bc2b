package files

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity/inputfile"
)

// next waits, in a bubble, until Run has looked at the files and taken them as settled.
func next() {
	<-time.After(defaultPoll + 2*settle)
	synctest.Wait()
}

// family is a CA under a root of its own, so that nothing of one fits another.
func family(t testing.TB, cn string) (a *authority, files fileSet) {
	root := newRoot(t, cn+" Root")
	policy := root.below(t, cn+" Policy")
	a = policy.below(t, cn)
	return a, a.cacerts(t, certs(policy), root.cert)
}

// wholly demands that all that is signed with is of one family.
func wholly(t *testing.T, u *Upstream, families ...string) string {
	t.Helper()
	s, key, err := ask(t, u, time.Hour)
	check(t, err)
	believe(t, s, key)
	got := append(subjects(s.Chain[1:]), subjects(s.Roots)...)
	for _, f := range families {
		if strings.Join(got, ", ") == f+", "+f+" Policy, "+f+" Root" {
			return f
		}
	}
	t.Errorf("it signs with %v; want all of one of %q", got, families)
	return ""
}

// Files that are replaced one after the other, in every order and with a pause after
// each: the old set signs until the new one is whole.
func TestF49_TornReplacementIsNeverUsed(t *testing.T) {
	order := []string{"ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"}
	for _, names := range permutations(order) {
		t.Run(strings.Join(names, ","), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, old := family(t, "Old")
				_, young := family(t, "New")
				dir := t.TempDir()
				old.put(t, dir)
				u := open(t, dir)
				run(t, u)
				for i, name := range names {
					// A copy that was cut off, then all of it.
					for _, data := range [][]byte{young[name][:len(young[name])/2], young[name]} {
						check(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
						next()
						done := i == len(names)-1 && len(data) == len(young[name])
						want := "Old"
						if done {
							want = "New"
						}
						if got := wholly(t, u, "Old", "New"); got != want {
							t.Errorf("after %d bytes of file %d, %s, it is %q", len(data), i+1, name, got)
						}
						if r := u.Report(); (r.State == StateOK) != done {
							t.Errorf("after file %d, %s: %+v", i+1, name, r)
						}
					}
				}
			})
		})
	}
}

func permutations(list []string) [][]string {
	if len(list) < 2 {
		return [][]string{list}
	}
	var all [][]string
	for i := range list {
		rest := append(append([]string(nil), list[:i]...), list[i+1:]...)
		for _, p := range permutations(rest) {
			all = append(all, append([]string{list[i]}, p...))
		}
	}
	return all
}

// A replacement that comes between the readings of two files.
func TestF49_ReplacedWhileItIsRead(t *testing.T) {
	for name, replace := range map[string]func(t testing.TB, f fileSet, dir, version string){
		"file by file": func(t testing.TB, f fileSet, dir, _ string) { f.put(t, dir) },
		"by a kubelet": func(t testing.TB, f fileSet, dir, version string) { f.project(t, dir, version) },
	} {
		for at := 1; at <= 8; at++ { // two readings of four files
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					_, old := family(t, "Old")
					_, young := family(t, "New")
					dir := made(t, filepath.Join(t.TempDir(), "ca"))
					replace(t, old, dir, "..1")
					var mu sync.Mutex // guards what follows
					reads, version, armed := 0, 1, young
					registry := prometheus.NewRegistry()
					u := open(t, dir, func(c *Config) {
						c.Metrics = registry
						c.readFile = func(path string, most int) ([]byte, fs.FileMode, error) {
							mu.Lock()
							defer mu.Unlock()
							if reads++; reads == at && armed != nil {
								version++
								replace(t, armed, dir, fmt.Sprintf("..%d", version))
								armed = nil
							}
							return inputfile.ReadWithMode(path, most)
						}
					})
					wholly(t, u, "Old", "New")
					run(t, u)
					next()
					wholly(t, u, "New")

					// The same, while it runs.
					_, younger := family(t, "Newer")
					mu.Lock()
					reads, armed = 0, younger
					mu.Unlock()
					for range 3 {
						next()
						wholly(t, u, "New", "Newer")
					}
					wholly(t, u, "Newer")
					const looks = "meshca_upstream_files_looks_total"
					if n := value(t, registry, looks, StateRefused) + value(t, registry, looks, StateMissing); n != 0 {
						t.Errorf("%v looks were taken for a set that is not used", n)
					}
				})
			})
		}
	}
}

// The mesh may not be ready for a set that is good in itself.
func TestT12_F49_JudgeHasTheLastWord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := newRoot(t, "First")
		second := newRoot(t, "Second")
		var log bytes.Buffer
		notYet := errors.New("root Second is not everywhere yet")
		var mu sync.Mutex // guards refusal and judged
		refusal := notYet
		var judged [][]string
		dir := t.TempDir()
		first.cacerts(t, nil, first.cert).put(t, dir)
		registry := prometheus.NewRegistry()
		u := open(t, dir, func(c *Config) {
			c.Log, c.Metrics = slog.New(slog.NewTextHandler(&log, nil)), registry
			c.Judge = func(anchor *x509.Certificate, roots []*x509.Certificate) error {
				mu.Lock()
				defer mu.Unlock()
				judged = append(judged, append(subjects([]*x509.Certificate{anchor}), subjects(roots)...))
				if anchor.Equal(second.cert) {
					return refusal
				}
				return nil
			}
		})
		run(t, u)

		// The new root beside the old: the same CA goes on, and both are told of.
		first.cacerts(t, nil, second.cert, first.cert).put(t, dir)
		next()
		s, _, err := ask(t, u, time.Hour)
		check(t, err)
		if got := subjects(s.Roots); strings.Join(got, ",") != "First,Second" {
			t.Errorf("the roots are %v", got)
		}
		mu.Lock()
		last := judged[len(judged)-1]
		mu.Unlock()
		if strings.Join(last, ",") != "First,First,Second" {
			t.Errorf("judged was %v", last)
		}

		// Then the CA, too early.
		second.cacerts(t, nil, first.cert, second.cert).put(t, dir)
		for range 5 {
			next()
		}
		s, key, err := ask(t, u, time.Hour)
		check(t, err)
		believe(t, s, key)
		r := u.Report()
		if !s.Roots[0].Equal(first.cert) || r.State != StateRefused || !errors.Is(u.trouble, notYet) || !strings.Contains(r.Detail, notYet.Error()) || !strings.Contains(r.Detail, "root-cert.pem") {
			t.Errorf("it signs under %v, and the report is %+v", subjects(s.Roots), r)
		}
		if n := strings.Count(log.String(), notYet.Error()); n != 1 {
			t.Errorf("the reason is in the log %d times:\n%s", n, log.String())
		}
		for _, state := range states {
			want := 0.0
			if state == StateRefused {
				want = 1
			}
			if got := value(t, registry, "meshca_upstream_files_state", state); got != want {
				t.Errorf("metric of state %s: %v", state, got)
			}
		}
		if value(t, registry, "meshca_upstream_files_looks_total", StateRefused) < 5 {
			t.Error("the refusals are not counted")
		}

		// It is asked again though the files stay as they are.
		mu.Lock()
		refusal = nil
		mu.Unlock()
		changed := u.Changed()
		next()
		<-changed
		s, _, err = ask(t, u, time.Hour)
		check(t, err)
		if r := u.Report(); !s.Roots[0].Equal(second.cert) || r.State != StateOK || r.Away {
			t.Errorf("it signs under %v, and the report is %+v", subjects(s.Roots), r)
		}
		if !strings.Contains(log.String(), "in order again") {
			t.Errorf("the log does not tell of the end:\n%s", log.String())
		}
	})
}

// At the start, too.
func TestT12_JudgeIsAskedAtTheStart(t *testing.T) {
	root := newRoot(t, "Root")
	dir := t.TempDir()
	root.tls(t, nil, root.cert).put(t, dir)
	no := errors.New("no")
	if _, err := New(conf(t, dir, func(c *Config) { c.Judge = func(*x509.Certificate, []*x509.Certificate) error { return no } })); !errors.Is(err, no) {
		t.Errorf("got %v", err)
	}
}

// Files that are taken away: what was read goes on, and a replica that starts without
// them does not.
func TestF71_FilesAreTakenAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newRoot(t, "Root")
		files := root.tls(t, nil, root.cert)
		dir := made(t, filepath.Join(t.TempDir(), "ca"))
		files.put(t, dir)
		u := open(t, dir)
		run(t, u)
		changed := u.Changed()
		check(t, os.RemoveAll(dir))
		next()
		s, key, err := ask(t, u, time.Hour)
		check(t, err)
		believe(t, s, key)
		if r := u.Report(); r.State != StateMissing || !r.Away || !strings.Contains(r.Detail, "restarted would be without") {
			t.Errorf("the report is %+v", r)
		}
		if _, err := New(conf(t, dir)); !errors.Is(err, fs.ErrNotExist) || !errors.As(err, new(*Error)) {
			t.Errorf("starting without: %v", err)
		}
		files.put(t, made(t, dir))
		next()
		if r := u.Report(); r.State != StateOK || r.Away {
			t.Errorf("back again: %+v", r)
		}
		select {
		case <-changed:
			t.Error("the same files are told of as a change")
		default:
		}
	})
}

// An authority that ends: a warning first, then nothing is signed, and a new
// certificate for the same key heals it.
func TestF20_CAEnds(t *testing.T) {
	for _, tt := range []struct {
		name       string
		life, warn time.Duration
	}{
		{"ten years", 10 * 365 * 24 * time.Hour, warnBefore},
		{"three months", 90 * 24 * time.Hour, 9 * 24 * time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				var clock atomic.Pointer[time.Time]
				clock.Store(&began)
				now := func() time.Time { return *clock.Load() }
				root := newRoot(t, "Root", func(c *x509.Certificate) { c.NotAfter = began.Add(20 * 365 * 24 * time.Hour) })
				mesh := root.below(t, "Mesh", func(c *x509.Certificate) { c.NotBefore = began; c.NotAfter = began.Add(tt.life) })
				dir := t.TempDir()
				mesh.cacerts(t, nil, root.cert).put(t, dir)
				registry := prometheus.NewRegistry()
				u := open(t, dir, func(c *Config) { c.Now, c.Metrics = now, registry })
				run(t, u)
				end := mesh.cert.NotAfter
				if got := value(t, registry, "meshca_upstream_files_end_timestamp_seconds", ""); got != float64(end.Unix()) {
					t.Errorf("the metric's end is %v", got)
				}
				for _, step := range []struct {
					at    time.Time
					state string
				}{
					{end.Add(-tt.warn - time.Minute), StateOK}, {end.Add(-tt.warn), StateExpiring},
					{end.Add(-time.Second), StateExpiring}, {end, StateExpired},
				} {
					clock.Store(&step.at)
					next()
					if r := u.Report(); r.State != step.state || (r.Detail == "") != (step.state == StateOK) || r.Away != (step.state == StateExpired) {
						t.Errorf("at %v: %+v", step.at, r)
					}
					if value(t, registry, "meshca_upstream_files_state", step.state) != 1 {
						t.Errorf("at %v the metric shows another state than %s", step.at, step.state)
					}
					_, _, err := ask(t, u, time.Hour)
					if step.state == StateExpired {
						var expired *ExpiredError
						if !errors.As(err, &expired) || expired.File != filepath.Join(dir, "ca-cert.pem") {
							t.Errorf("after its end: %v", err)
						}
					} else {
						check(t, err)
					}
				}
				c := template("Mesh")
				c.SubjectKeyId, c.NotBefore, c.NotAfter = mesh.cert.SubjectKeyId, now().Add(-time.Hour), now().Add(tt.life)
				again := &authority{cert: signed(t, c, root, mesh.key.Public()), key: mesh.key}
				again.cacerts(t, nil, root.cert).put(t, dir)
				next()
				if _, _, err := ask(t, u, time.Hour); err != nil || u.Report().State != StateOK {
					t.Errorf("a new certificate: %v, %+v", err, u.Report())
				}
			})
		})
	}
}

// A set that becomes good with time comes into use by itself.
func TestWaitsForItsBeginning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newRoot(t, "Root")
		dir := t.TempDir()
		root.below(t, "First").tls(t, nil, root.cert).put(t, dir)
		u := open(t, dir)
		run(t, u)
		later := root.below(t, "Later", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })
		later.tls(t, nil, root.cert).put(t, dir)
		next()
		if r := u.Report(); r.State != StateRefused {
			t.Errorf("before: %+v", r)
		}
		time.Sleep(time.Minute)
		next()
		if r := u.Report(); r.State != StateOK || !u.issuer().Equal(later.cert) {
			t.Errorf("after: %+v", r)
		}
	})
}

// A root beside the anchor that has expired, or that has the anchor's name and key,
// does no harm.
func TestF49_OtherRoots(t *testing.T) {
	root := newRoot(t, "Root")
	old := template("Root")
	old.SubjectKeyId, old.NotBefore, old.NotAfter = root.cert.SubjectKeyId, time.Now().Add(-48*time.Hour), time.Now().Add(-time.Hour)
	before := signed(t, old, &authority{old, root.key}, root.key.Public())
	dir := t.TempDir()
	root.below(t, "Mesh").cacerts(t, nil, before, root.cert).put(t, dir)
	u := open(t, dir)
	s, key, err := ask(t, u, time.Hour)
	check(t, err)
	believe(t, s, key)
	if !equal(s.Roots, []*x509.Certificate{root.cert, before}) {
		t.Errorf("the roots are %v", subjects(s.Roots))
	}
	if r := u.Report(); r.State != StateOK || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "can be left out") {
		t.Errorf("the report is %+v", r)
	}
}

// value is a metric's, with the label's value if it has one.
func value(t *testing.T, registry *prometheus.Registry, name, label string) float64 {
	t.Helper()
	families, err := registry.Gather()
	check(t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("there is no metric %s of %q", name, label)
	return 0
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	root := newRoot(t, "Root")
	for name, a := range map[string]*authority{"signs": root, "gives its key": root.below(t, "Istio", pathLen0)} {
		dir := t.TempDir()
		a.tls(t, nil, root.cert).put(t, dir)
		u := open(t, dir)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := u.SignIntermediate(ctx, ca.IntermediateRequest{TrustDomain: domain(t)}); !errors.Is(err, context.Canceled) {
			t.Errorf("%s, cancelled: %v", name, err)
		}
		if _, err := u.SignIntermediate(t.Context(), ca.IntermediateRequest{}); err == nil {
			t.Errorf("%s: no trust domain is taken", name)
		}
	}
	if _, err := New(Config{Dir: "x", TrustDomain: domain(t), Layout: "pkcs12"}); err == nil || !strings.Contains(err.Error(), `"pkcs12" is unknown`) {
		t.Errorf("got %v", err)
	}
	if _, err := New(Config{TrustDomain: domain(t)}); err == nil {
		t.Error("no directory is taken")
	}
}

// What is said must be chosen where there are two layouts.
func TestLayoutIsChosen(t *testing.T) {
	root := newRoot(t, "Root")
	one, other := root.below(t, "One"), root.below(t, "Other")
	dir := t.TempDir()
	one.tls(t, nil, root.cert).put(t, dir)
	other.cacerts(t, nil, root.cert).put(t, dir)
	for layout, want := range map[Layout]*authority{LayoutTLS: one, LayoutCACerts: other} {
		if u := open(t, dir, func(c *Config) { c.Layout = layout }); !u.issuer().Equal(want.cert) {
			t.Errorf("%s: it is %v", layout, u.issuer().Subject)
		}
	}
}
