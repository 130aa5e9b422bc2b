package kubetest

import (
	"context"
	"os"
	"sync"
	"testing"

	"github.com/meshca/meshca/test/testenv"
)

// Shared is a cluster for all tests of one test binary, started when the first
// one asks. Call Stop in TestMain, after the tests. The zero value is ready.
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
