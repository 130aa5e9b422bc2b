package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// baselineTimeout is for tests that are expected to pass. Those of a mutant
// often wait for something that now never comes, so they get a time measured by
// what they took when all was well.
const (
	baselineTimeout = 5 * time.Minute
	mutantGrace     = 20 * time.Second
	mutantFactor    = 5
)

// binary is a compiled test binary.
type binary struct {
	path    string
	dir     string // the package's, where its tests expect to run
	overlay string // it was built with; empty for none
}

// environ lets the programs that a test itself builds have the overlay, too.
func (b *binary) environ() []string {
	if b.overlay == "" {
		return nil // as is
	}
	return append(os.Environ(), "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -overlay="+b.overlay))
}

// build compiles a package's tests, with an overlay if one is given.
func (r *runner) build(ctx context.Context, pkg, overlay string) (*binary, error) {
	dir := filepath.Join(r.root, pkg)
	out, err := os.CreateTemp(r.temp, "*.test")
	if err != nil {
		return nil, err
	}
	out.Close()
	args := []string{"test", "-c", "-vet=off", "-o", out.Name()}
	if overlay != "" {
		args = append(args, "-overlay", overlay)
	}
	// The package may belong to a module of its own, so build where it lies.
	cmd := exec.CommandContext(ctx, "go", append(args, ".")...)
	cmd.Dir = dir
	if output, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the tests of %s: %w\n%s", pkg, err, tail(output))
	}
	return &binary{path: out.Name(), dir: dir, overlay: overlay}, nil
}

// list names the tests that a -run pattern selects.
func (b *binary) list(ctx context.Context, pattern string) ([]string, error) {
	top, _, _ := strings.Cut(pattern, "/")
	cmd := exec.CommandContext(ctx, b.path, "-test.list", top)
	cmd.Dir = b.dir
	output, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("listing tests: %w", err)
	}
	var names []string
	for name := range strings.Lines(string(output)) {
		name = strings.TrimSpace(name)
		if strings.HasPrefix(name, "Test") || strings.HasPrefix(name, "Fuzz") {
			names = append(names, name)
		}
	}
	return names, nil
}

// result is what the top-level tests of one run came to.
type result struct {
	passed, failed []string
	crashed        bool // it ended before all had run
	output         []byte
}

var (
	verdictLine = regexp.MustCompile(`(?m)^--- (PASS|FAIL): (\S+)`)
	// What still runs when the deadline passes has noticed, in its way.
	hangingLine = regexp.MustCompile(`(?m)^\t((?:Test|Fuzz)\w+)(?:/\S+)? \(`)
)

func (b *binary) run(ctx context.Context, pattern string, timeout time.Duration) result {
	// The binary ends itself, with the names of what hangs; the context is for
	// one that cannot.
	ctx, cancel := context.WithTimeout(ctx, timeout+15*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.path, "-test.run", pattern, "-test.v", "-test.timeout", timeout.String())
	cmd.Dir, cmd.Env = b.dir, b.environ()
	cmd.WaitDelay = 5 * time.Second
	output, err := cmd.CombinedOutput()
	r := result{output: output}
	for _, m := range verdictLine.FindAllSubmatch(output, -1) {
		if string(m[1]) == "PASS" {
			r.passed = append(r.passed, string(m[2]))
		} else {
			r.failed = append(r.failed, string(m[2]))
		}
	}
	if bytes.Contains(output, []byte("\npanic: test timed out")) {
		for _, m := range hangingLine.FindAllSubmatch(output, -1) {
			r.failed = append(r.failed, string(m[1]))
		}
	}
	var exit *exec.ExitError
	r.crashed = err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1)
	// goleak, for one, lets all tests pass and fails the binary.
	r.crashed = r.crashed || err != nil && len(r.failed) == 0
	return r
}

// exactly selects just these tests.
func exactly(names []string) string { return "^(" + strings.Join(names, "|") + ")$" }

// tail is the end of a long output.
func tail(output []byte) string {
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}
