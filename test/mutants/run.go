package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/test/mutants/mutant"
)

// runner runs mutants. Binaries and edited files go to a temporary directory.
type runner struct {
	root           string
	parallel       int
	stdout, stderr io.Writer

	temp  string
	total int

	mu   sync.Mutex
	done int
}

// outcome is what became of one mutant.
type outcome struct {
	mutant *mutant.Mutant
	red    []string // tests that noticed
	err    error    // why it proves nothing
	took   time.Duration
}

// baseline is how a package's tests do with nothing switched off.
type baseline struct {
	green   []string      // those that pass
	timeout time.Duration // for each mutant's tests
}

func (r *runner) run(ctx context.Context, all []*mutant.Mutant) (err error) {
	if r.temp, err = os.MkdirTemp("", "mutants"); err != nil {
		return err
	}
	defer os.RemoveAll(r.temp)
	r.total = len(all)

	byPackage := make(map[string][]*mutant.Mutant)
	for _, m := range all {
		byPackage[m.Package] = append(byPackage[m.Package], m)
	}
	outcomes := make(map[*mutant.Mutant]outcome)
	var mu sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(max(1, r.parallel))
	for pkg, mutants := range byPackage {
		// A broken baseline is told by each of the package's mutants.
		base, baseErr := r.baseline(ctx, pkg, mutants)
		for _, m := range mutants {
			group.Go(func() error {
				began := time.Now()
				o := outcome{mutant: m, err: baseErr}
				if o.err == nil {
					o.red, o.err = r.mutate(ctx, m, base)
				}
				o.took = time.Since(began)
				r.progress(o)
				mu.Lock()
				defer mu.Unlock()
				outcomes[m] = o
				return ctx.Err()
			})
		}
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return r.summary(all, outcomes)
}

// baseline runs the tests of all the package's mutants with nothing switched
// off.
func (r *runner) baseline(ctx context.Context, pkg string, mutants []*mutant.Mutant) (*baseline, error) {
	fmt.Fprintf(r.stderr, "mutants: %s: are the tests green by themselves?\n", pkg)
	b, err := r.build(ctx, pkg, "")
	if err != nil {
		return nil, err
	}
	var selected []string
	for _, m := range mutants {
		names, err := b.list(ctx, m.Run)
		if err != nil {
			return nil, err
		}
		selected = append(selected, names...)
	}
	slices.Sort(selected)
	selected = slices.Compact(selected)
	began := time.Now()
	result := b.run(ctx, exactly(selected), baselineTimeout)
	if len(result.failed) > 0 || result.crashed {
		return nil, fmt.Errorf("tests of %s are red with nothing switched off: %s\n%s",
			pkg, strings.Join(result.failed, ", "), tail(result.output))
	}
	return &baseline{green: result.passed, timeout: mutantFactor*time.Since(began) + mutantGrace}, nil
}

// mutate switches one control off and returns the tests that noticed. It is an
// error if there is an id of the mutant's that none of them answers.
func (r *runner) mutate(ctx context.Context, m *mutant.Mutant, base *baseline) ([]string, error) {
	overlay, err := r.overlay(m)
	if err != nil {
		return nil, err
	}
	b, err := r.build(ctx, m.Package, overlay)
	if err != nil {
		return nil, fmt.Errorf("with the control switched off it does not compile: %w", err)
	}
	defer os.Remove(b.path)
	tests, err := b.list(ctx, m.Run)
	if err != nil {
		return nil, err
	}
	for _, id := range m.IDs {
		if !intersect(mutant.Answering(tests, id), base.green) {
			return nil, fmt.Errorf("every test for %s that %q selects is skipped", id, m.Run)
		}
	}
	result := b.run(ctx, m.Run, base.timeout)
	red := result.failed
	var errs []error
	for _, id := range m.IDs {
		answering := mutant.Answering(tests, id)
		if !intersect(answering, red) && result.crashed {
			// Whatever crashed kept the others from running.
			again := b.run(ctx, exactly(answering), base.timeout)
			red = append(red, again.failed...)
			if again.crashed && len(again.failed) == 0 {
				// All passed, yet the binary failed: a leaked goroutine, say.
				red = append(red, answering...)
			}
		}
		if !intersect(answering, red) {
			errs = append(errs, fmt.Errorf("no test for %s noticed (%s)", id, strings.Join(answering, ", ")))
		}
	}
	return red, errors.Join(errs...)
}

// overlay writes the edited file and the go command's description of it.
func (r *runner) overlay(m *mutant.Mutant) (string, error) {
	content, err := m.Apply(r.root)
	if err != nil {
		return "", err
	}
	base := filepath.Join(r.temp, fmt.Sprintf("%s-%d", m.Area, m.Nth))
	if err := os.WriteFile(base+".go", content, 0o600); err != nil {
		return "", err
	}
	description, err := json.Marshal(map[string]any{
		"Replace": map[string]string{filepath.Join(r.root, m.File): base + ".go"},
	})
	if err != nil {
		return "", err
	}
	return base + ".json", os.WriteFile(base+".json", description, 0o600)
}

func (r *runner) progress(o outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done++
	fmt.Fprintf(r.stderr, "mutants: %d of %d: %s %s (%s, %.1f s)\n",
		r.done, r.total, verdict(o), o.mutant.Name(), o.mutant.Control, o.took.Seconds())
}

func (r *runner) summary(all []*mutant.Mutant, outcomes map[*mutant.Mutant]outcome) error {
	hollow := 0
	for _, m := range all {
		o := outcomes[m]
		fmt.Fprintf(r.stdout, "%-6s %-12s %-24s %s\n", verdict(o), m.Name(), strings.Join(m.IDs, " "), m.Control)
		if o.err != nil {
			hollow++
			fmt.Fprintf(r.stdout, "       %s\n", strings.ReplaceAll(o.err.Error(), "\n", "\n       "))
		}
	}
	fmt.Fprintf(r.stdout, "\n%d of %d: tests go red when the control is switched off\n", len(all)-hollow, len(all))
	if hollow > 0 {
		return fmt.Errorf("%d of %d mutants prove nothing", hollow, len(all))
	}
	return nil
}

func verdict(o outcome) string {
	if o.err != nil {
		return "HOLLOW"
	}
	return "red"
}

func intersect(a, b []string) bool {
	return slices.ContainsFunc(a, func(s string) bool { return slices.Contains(b, s) })
}
