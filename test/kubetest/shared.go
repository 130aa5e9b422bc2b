package kubetest

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/test/testenv"
)

// Shared is a cluster for all tests of one test binary, started when the first
// one asks. TestMain calls [Main], or Stop after the tests. The zero value is ready.
type Shared struct {
	once    sync.Once
	cluster *Cluster
	dir     string
	err     error
}

// Get returns the cluster, or fails the test.
func (s *Shared) Get(t testing.TB) *Cluster {
	t.Helper()
	s.once.Do(func() {
		// Not the test's context: the cluster outlives the test that starts it.
		s.cluster, s.err = s.start(context.Background())
	})
	if s.err != nil {
		t.Fatalf("starting Kubernetes: %v", s.err)
	}
	return s.cluster
}

// New starts a cluster that no other test has, for what would disturb them. It ends
// with the test.
func New(t testing.TB) *Cluster {
	t.Helper()
	cache, err := testenv.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	binaries, err := testenv.Kubernetes(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Start(t.Context(), binaries, t.TempDir())
	if err != nil {
		t.Fatalf("starting Kubernetes: %v", err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (s *Shared) start(ctx context.Context) (*Cluster, error) {
	cache, err := testenv.OpenCache(os.Stderr)
	if err != nil {
		return nil, err
	}
	binaries, err := testenv.Kubernetes(ctx, cache)
	if err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp("", "kubetest"); err != nil {
		return nil, err
	}
	return Start(ctx, binaries, s.dir)
}

// Stop ends the cluster if there is one and removes its files.
func (s *Shared) Stop() error {
	if s.dir != "" {
		defer os.RemoveAll(s.dir)
	}
	if s.cluster == nil {
		return nil
	}
	return s.cluster.Stop()
}

// Main runs the tests of a package that share a cluster, ends the cluster, and looks
// for goroutines that are left. It does not return.
func Main(m *testing.M, s *Shared) {
	code := m.Run()
	err := s.Stop()
	if err == nil && code == 0 {
		err = goleak.Find()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}
