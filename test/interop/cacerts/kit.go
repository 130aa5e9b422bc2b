package cacerts

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/files"
	"github.com/meshca/meshca/ca/roots"
	"github.com/meshca/meshca/identity"
)

// New runs a CA whose upstream are the files in dir, until the test ends.
func New(tb testing.TB, dir string) (*catest.Kit, *files.Upstream) {
	tb.Helper()
	td, err := identity.ParseTrustDomain("cluster.local")
	if err != nil {
		tb.Fatal(err)
	}
	keeper, err := roots.New(roots.Config{
		TrustDomain: td, Store: roots.File{Path: filepath.Join(tb.TempDir(), roots.FileName)}, Ceiling: 24 * time.Hour, Now: time.Now,
	})
	if err != nil {
		tb.Fatal(err)
	}
	upstream, err := files.New(files.Config{Dir: dir, TrustDomain: td, Judge: keeper.Judge})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(tb.Context()))
	ended := make(chan error, 2)
	for _, run := range []func(context.Context) error{keeper.Run, upstream.Run} {
		go func() { ended <- run(ctx) }()
	}
	tb.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				tb.Error(err)
			}
		}
	})
	kit := catest.New(tb, catest.WithUpstream(func(ca.Upstream) ca.Upstream { return upstream }), catest.WithRoots(keeper))
	return kit, upstream
}
