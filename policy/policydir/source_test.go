package policydir

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/policy"
)

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "."+name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "."+name), filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// start runs a source until the test ends.
func start(t *testing.T, c Config) *Source {
	t.Helper()
	c.RootNamespace = "root"
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

// await waits for a snapshot in which namespace shop has the mode, and checks that
// versions only rise.
func await(t *testing.T, s *Source, want policy.Mode) *Snapshot {
	t.Helper()
	timeout := time.After(20 * time.Second)
	var last uint64
	for {
		snapshot, changed := s.Snapshot()
		if snapshot.Version < last {
			t.Fatalf("version %d after %d", snapshot.Version, last)
		}
		last = snapshot.Version
		if snapshot.Version > 0 && snapshot.Set.Resolve("shop", nil).Mode == want {
			return snapshot
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("namespace shop did not become %v; version %d, broken %v", want, snapshot.Version, snapshot.Broken)
		}
	}
}

func TestSourceFollows(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{Dir: dir})
	if snapshot, _ := s.Snapshot(); snapshot.Version == 0 && snapshot.Set.Resolve("shop", nil).Mode != policy.Strict {
		t.Error("before anything was read it is not STRICT")
	}
	await(t, s, policy.Permissive)
	write(t, dir, "shop.yaml", pa("shop", "default", "STRICT"))
	first := await(t, s, policy.Strict)
	write(t, dir, "shop.yaml", pa("shop", "default", "DISABLE"))
	second := await(t, s, policy.Disable)
	if first.Set.Resolve("shop", nil).Mode != policy.Strict || second.Version <= first.Version {
		t.Errorf("an old snapshot has changed, or version %d follows %d", second.Version, first.Version)
	}
	if err := os.Remove(filepath.Join(dir, "shop.yaml")); err != nil {
		t.Fatal(err)
	}
	await(t, s, policy.Permissive)
}

// TestPollingAloneIsFastEnough runs by the bubble's clock: a change that nobody
// announces is in force within a second.
func TestPollingAloneIsFastEnough(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := start(t, Config{Dir: dir, noWatch: true})
		await(t, s, policy.Permissive)
		for _, change := range []struct {
			make func()
			want policy.Mode
		}{
			{func() { write(t, dir, "shop.yaml", pa("shop", "default", "STRICT")) }, policy.Strict},
			{func() { write(t, dir, "shop.yaml", pa("shop", "default", "DISABLE")) }, policy.Disable},
			{func() { _ = os.Remove(filepath.Join(dir, "shop.yaml")) }, policy.Permissive},
		} {
			change.make()
			made := time.Now()
			await(t, s, change.want)
			if took := time.Since(made); took > time.Second {
				t.Errorf("%v came into force after %v", change.want, took)
			}
		}
	})
}

func TestT10_V21_StartWithABrokenFileIsStrict(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "bank.yaml", pa("bank", "default", "DISABLE"))
	write(t, dir, "shop.yaml", "spec: [")
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		metrics := prometheus.NewRegistry()
		s := start(t, Config{Dir: dir, noWatch: true, Log: slog.New(slog.NewTextHandler(&log, nil)), Metrics: metrics})
		snapshot := await(t, s, policy.Strict)
		if m := snapshot.Set.Resolve("bank", nil).Mode; m != policy.Strict {
			t.Errorf("a namespace whose file is good is %v: what the broken file says about it is not known", m)
		}
		if why := snapshot.Set.Closed(); !strings.Contains(why, "shop.yaml") {
			t.Errorf("closed: %q", why)
		}
		time.Sleep(time.Minute)
		write(t, dir, "shop.yaml", pa("shop", "default", "PERMISSIVE"))
		if snapshot := await(t, s, policy.Permissive); snapshot.Set.Resolve("bank", nil).Mode != policy.Disable {
			t.Error("the good file is not in force")
		}
		if snapshot, _ := s.Snapshot(); snapshot.Set.Closed() != "" {
			t.Error(snapshot.Set.Closed())
		}
		write(t, dir, "shop.yaml", "")
		time.Sleep(time.Minute)
		snapshot, _ = s.Snapshot()
		if m := snapshot.Set.Resolve("shop", nil).Mode; m != policy.Permissive || len(snapshot.Broken) != 1 || snapshot.Set.Closed() != "" {
			t.Errorf("with the file emptied: %v, broken %v, closed %q", m, snapshot.Broken, snapshot.Set.Closed())
		}
		synctest.Wait()
		if n := strings.Count(log.String(), "is not in force"); n != 2 {
			t.Errorf("%d lines about broken files, want one each:\n%s", n, &log)
		}
		families, err := metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			want, ok := map[string]float64{"meshca_policy_broken_files": 1, "meshca_policy_closed": 0, "meshca_policy_policies": 2}[f.GetName()]
			if got := f.GetMetric()[0].GetGauge().GetValue(); ok && got != want {
				t.Errorf("%s is %v, want %v", f.GetName(), got, want)
			}
		}
	})
}

func TestWatcherHears(t *testing.T) {
	dir := t.TempDir()
	w, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Add(dir); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "a.yaml", "a")
	select {
	case <-w.events:
	case <-time.After(20 * time.Second):
		t.Error("nothing heard")
	}
	if err := w.Add(filepath.Join(dir, "missing")); err == nil {
		t.Error("a missing directory is watched")
	}
}

func TestConfigIsChecked(t *testing.T) {
	taken := prometheus.NewRegistry()
	if _, err := New(Config{Dir: "x", RootNamespace: "root", Metrics: taken}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []Config{
		{RootNamespace: "root"}, {Dir: "x"}, {Dir: "x", RootNamespace: "root", Poll: 2 * time.Second}, {Dir: "x", RootNamespace: "root", Poll: -1},
		{Dir: "x", RootNamespace: "root", Metrics: taken},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
}
