// Package rig starts what benchmarks measure: a real API server, and our programs
// built as users build them, each in a process of its own.
package rig

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/test/bench/table"
	"github.com/meshca/meshca/test/testenv"
)

// Run is one run of the benchmarks.
type Run struct {
	Quick  bool
	Rounds int
	Dir    string // temporary, removed after the run
	Cache  *testenv.Cache
	// Profiles is the directory for the files of profiles; they are not kept if it is
	// empty.
	Profiles string
	Renewals time.Duration // how long renewals at a steady rate go on
	// MeshConfig is what StartMesh adds to the CA's configuration file.
	MeshConfig string

	out   io.Writer
	began time.Time
	part  string
	built sync.Map // programs, by package
}

// NewRun makes a run whose progress goes to out.
func NewRun(quick bool, dir string, out io.Writer) (*Run, error) {
	cache, err := testenv.OpenCache(out)
	if err != nil {
		return nil, err
	}
	r := &Run{Quick: quick, Rounds: 5, Dir: dir, Cache: cache, out: out, began: time.Now()}
	if quick {
		r.Rounds = 1
	}
	return r, nil
}

// Part begins a part: what Say says is of it from now on.
func (r *Run) Part(name string) { r.part = name }

// Say tells whoever waits what goes on.
func (r *Run) Say(format string, args ...any) {
	fmt.Fprintf(r.out, "%5.0fs %s: %s\n", time.Since(r.began).Seconds(), r.part, fmt.Sprintf(format, args...))
}

// For is how long to measure: a tenth of the time, and at least half a second, in a
// quick run.
func (r *Run) For(full time.Duration) time.Duration {
	if r.Quick {
		return max(full/10, 500*time.Millisecond)
	}
	return full
}

// Count is how many to measure: a tenth, in a quick run.
func (r *Run) Count(full int) int {
	if r.Quick {
		return max(full/10, 1)
	}
	return full
}

// Program builds one of our programs, such as "./cmd/meshca", once a run.
func (r *Run) Program(ctx context.Context, pkg string) (path string, err error) {
	if p, ok := r.built.Load(pkg); ok {
		return p.(string), nil
	}
	r.Say("building %s", pkg)
	path, err = testenv.Build(ctx, r.Dir, ".", pkg)
	if err == nil {
		r.built.Store(pkg, path)
	}
	return path, err
}

// Start runs a program until the returned stop, with its output in a file of the
// run's directory. Stop returns the end of its log in its error if it had ended
// before.
func (r *Run) Start(name, path string, args ...string) (p *testenv.Process, stop func() error, err error) {
	p, err = testenv.Start(filepath.Join(r.Dir, name+".log"), path, args...)
	if err != nil {
		return nil, nil, err
	}
	return p, func() error {
		if err := p.Exited(); err != nil {
			return err
		}
		return p.Stop(5 * time.Second)
	}, nil
}

// Commit names what is measured.
func Commit(ctx context.Context) string {
	root, err := testenv.RepositoryRoot()
	if err != nil {
		return "unknown"
	}
	git := func(args ...string) string {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = root
		out, _ := cmd.Output() // without git, or outside a checkout, nobody knows
		return strings.TrimSpace(string(out))
	}
	commit := git("rev-parse", "--short=10", "HEAD")
	if commit == "" {
		return "unknown"
	}
	if git("status", "--porcelain", "--", "*.go", "go.mod") != "" {
		commit += " with changes"
	}
	return commit
}

// Write puts a file into the run's directory.
func (r *Run) Write(name string, content []byte) (path string, err error) {
	path = filepath.Join(r.Dir, name)
	return path, os.WriteFile(path, content, 0o600)
}

// errOver ends a Poll: what is waited for will not come.
var errOver = errors.New("it never will")

// Poll asks until something holds, ctx ends, or the time is over.
func Poll(ctx context.Context, what string, within time.Duration, ask func() error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		if errors.Is(err, errOver) {
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w; last: %w", what, context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// Versions are those of what is measured everywhere.
func Versions() map[string]string {
	versions := map[string]string{"Go": strings.TrimPrefix(runtime.Version(), "go")}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "google.golang.org/grpc" {
				versions["gRPC"] = strings.TrimPrefix(d.Version, "v")
			}
		}
	}
	return versions
}

// Profiled are the flags by which our programs let themselves be profiled.
func Profiled() []string { return []string{"--pprof"} }

// Profile takes profiles of the program with that ops address, and adds them to a
// part: of its processor's time while load runs, and of what is on its heap then. title
// says what load is.
func (r *Run) Profile(ctx context.Context, p *table.Part, ops, name, title string, d time.Duration, load func(context.Context) error) error {
	r.Say("profiling: %s", title)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return load(ctx) })
	group.Go(func() error {
		return r.profile(ctx, p, fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%d", ops, max(1, int(d.Seconds()))), name+"-cpu", "processor, "+title)
	})
	return group.Wait()
}

// Heap adds what is on a program's heap after a collection.
func (r *Run) Heap(ctx context.Context, p *table.Part, ops, name, title string) error {
	return r.profile(ctx, p, "http://"+ops+"/debug/pprof/heap?gc=1", name+"-heap", "heap, "+title)
}

// rows is how much of a profile is kept as text.
const rows = 70

func (r *Run) profile(ctx context.Context, p *table.Part, url, name, title string) error {
	folder := cmp.Or(r.Profiles, r.Dir)
	file := filepath.Join(folder, name+".pprof")
	if err := fetch(ctx, url, file); err != nil {
		return fmt.Errorf("profiling: %w", err)
	}
	top := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", "-cum", fmt.Sprint("-nodecount=", rows), file)
	var said strings.Builder
	top.Stderr = &said
	text, err := top.Output()
	if err != nil {
		return fmt.Errorf("profiling: go tool pprof: %w: %s", err, said.String())
	}
	p.Profiles = append(p.Profiles, table.Profile{Name: name, Title: title, Text: string(text)})
	return nil
}

func fetch(ctx context.Context, url, file string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	profile, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %w", resp.Status, err)
	}
	return os.WriteFile(file, profile, 0o644)
}
