package testenv

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openTestCache(t *testing.T) *Cache {
	t.Helper()
	t.Setenv("MESHCA_CACHE", t.TempDir())
	c, err := OpenCache(io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCacheFillsOnceForAll(t *testing.T) {
	c := openTestCache(t)
	var fills atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			dir, err := c.entry(t.Context(), "thing-1", "a thing", func(_ context.Context, dir string) error {
				fills.Add(1)
				return os.WriteFile(filepath.Join(dir, "content"), []byte("whole"), 0o600)
			})
			if err != nil {
				t.Error(err)
				return
			}
			if got, err := os.ReadFile(filepath.Join(dir, "content")); err != nil || string(got) != "whole" {
				t.Errorf("content = %q, %v", got, err)
			}
		})
	}
	wg.Wait()
	if n := fills.Load(); n != 1 {
		t.Errorf("filled %d times, want once", n)
	}
}

func TestCacheKeepsNothingOfAFailedFill(t *testing.T) {
	c := openTestCache(t)
	broken := errors.New("line went dead")
	_, err := c.entry(t.Context(), "thing-1", "a thing", func(_ context.Context, dir string) error {
		if err := os.WriteFile(filepath.Join(dir, "content"), []byte("ha"), 0o600); err != nil {
			return err
		}
		return broken
	})
	if !errors.Is(err, broken) {
		t.Fatalf("err = %v, want %v", err, broken)
	}
	entries, err := os.ReadDir(c.Dir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			t.Errorf("%q was left behind", e.Name())
		}
	}
}

func TestCacheWaitGivesUpWithItsContext(t *testing.T) {
	c := openTestCache(t)
	unlock, err := c.lock(t.Context(), "thing-1", "a thing")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithCancelCause(t.Context())
	tired := errors.New("tired of waiting")
	cancel(tired)
	if _, err := c.lock(ctx, "thing-1", "a thing"); !errors.Is(err, tired) {
		t.Errorf("err = %v, want %v", err, tired)
	}
}

func TestChecksum(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	if err := checkSHA256(file, abc); err != nil {
		t.Error(err)
	}
	if err := checkSHA256(file, strings.Replace(abc, "b", "c", 1)); err == nil {
		t.Error("another hash was accepted")
	}
}

func TestStopKillsWhatDoesNotListen(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	p, err := Start(log, "/bin/sh", "-c", `trap "" TERM; echo deaf; exec tail -f /dev/null`)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(10 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	default:
		t.Error("Stop returned before the process was gone")
	}
}

func TestExitedTellsTheLastWords(t *testing.T) {
	p, err := Start(filepath.Join(t.TempDir(), "log"), "/bin/sh", "-c", "echo no such luck; exit 3")
	if err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	err = p.Exited()
	if err == nil || !strings.Contains(err.Error(), "no such luck") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("Exited = %v", err)
	}
	if err := p.Kill(); err != nil {
		t.Errorf("killing a process that is gone: %v", err)
	}
}
