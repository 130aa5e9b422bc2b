package testenv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Cache is a directory of things that are costly to get, shared by checkouts
// and by parallel test binaries. An entry is a directory that appears whole or
// not at all and never changes afterwards.
type Cache struct {
	dir      string
	progress io.Writer
}

// OpenCache opens $MESHCA_CACHE, or else meshca in the user's cache directory
// ($XDG_CACHE_HOME, ~/.cache). What is waited for is told on progress.
func OpenCache(progress io.Writer) (*Cache, error) {
	dir := os.Getenv("MESHCA_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("finding a place for the test cache: %w; set MESHCA_CACHE to a directory", err)
		}
		dir = filepath.Join(base, "meshca")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("finding the test cache: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the test cache: %w; set MESHCA_CACHE to a directory that can be written", err)
	}
	return &Cache{dir: dir, progress: progress}, nil
}

// Dir is the cache's directory.
func (c *Cache) Dir() string { return c.dir }

// entry returns the directory of the entry named key. Where it is missing,
// fill gets an empty directory to put the content in. The key must name
// everything that the content depends on, because it is never made again.
func (c *Cache) entry(ctx context.Context, key, what string, fill func(ctx context.Context, dir string) error) (string, error) {
	final := filepath.Join(c.dir, key)
	if exists(final) {
		return final, nil
	}
	unlock, err := c.lock(ctx, key, what)
	if err != nil {
		return "", err
	}
	defer unlock()
	if exists(final) { // another process filled it while we waited
		return final, nil
	}
	temp, err := os.MkdirTemp(c.dir, "."+key+".")
	if err != nil {
		return "", fmt.Errorf("filling the test cache with %s: %w", what, err)
	}
	defer os.RemoveAll(temp) // gone by then if all went well
	done := c.report("getting " + what)
	err = fill(ctx, temp)
	done(err)
	if err != nil {
		return "", err
	}
	if err := os.Chmod(temp, 0o755); err != nil {
		return "", err
	}
	if err := os.Rename(temp, final); err != nil {
		return "", fmt.Errorf("filling the test cache with %s: %w", what, err)
	}
	return final, nil
}

// lock holds off other processes that want the same entry. The kernel lets go
// of it when the process dies, however it dies.
func (c *Cache) lock(ctx context.Context, key, what string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(c.dir, "."+key+".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("locking the test cache: %w", err)
	}
	done := func(error) {}
	defer func() { done(err) }()
	for first := true; ; first = false {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking the test cache: %w", err)
		}
		if first {
			done = c.report("waiting for another process that gets " + what)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for another process that gets %s: %w", what, context.Cause(ctx))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// report tells that something began, every ten seconds that it goes on, and by
// the function it returns that it ended.
func (c *Cache) report(what string) (done func(error)) {
	began := time.Now()
	fmt.Fprintf(c.progress, "testenv: %s\n", what)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(10 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				fmt.Fprintf(c.progress, "testenv: %s, %s so far\n", what, time.Since(began).Round(time.Second))
			}
		}
	}()
	return func(err error) {
		close(stop)
		<-stopped
		if err == nil {
			fmt.Fprintf(c.progress, "testenv: %s took %s\n", what, time.Since(began).Round(100*time.Millisecond))
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
