package certs

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// need skips the test where a program is not installed.
func need(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%s is not installed: %v", name, err)
		}
	}
}

// run runs a program to its end, with nothing to read, and returns all that it
// printed.
func run(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	return runReading(t, nil, name, args...)
}

// runHeld is run for a program that ends when its input does: it stays open.
func runHeld(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	stdin, hold, err := os.Pipe()
	must(t, err)
	defer hold.Close()
	defer stdin.Close()
	return runReading(t, stdin, name, args...)
}

func runReading(t *testing.T, stdin *os.File, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	if stdin != nil {
		cmd.Stdin = stdin
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// program is one that runs beside the test and is read line by line.
type program struct {
	name  string
	stdin io.WriteCloser
	done  chan struct{} // closed when its output has ended

	mu    sync.Mutex
	lines []string
	more  chan struct{} // closed at the next line
}

// start runs a program until the test ends, or until it does.
func start(t *testing.T, name string, args ...string) *program {
	t.Helper()
	cmd := exec.Command(name, args...)
	stdin, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	cmd.Stderr = cmd.Stdout
	must(t, cmd.Start())
	p := &program{name: name, stdin: stdin, done: make(chan struct{}), more: make(chan struct{})}
	go func() {
		defer close(p.done)
		scanner := bufio.NewScanner(out)
		for scanner.Scan() {
			p.mu.Lock()
			p.lines = append(p.lines, scanner.Text())
			close(p.more)
			p.more = make(chan struct{})
			p.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Process.Kill() // by its own id; one that has ended is no error
		<-p.done
		_ = cmd.Wait()
	})
	return p
}

// find returns what follows the prefix in the first line that has it, and a
// channel that tells of more lines.
func (p *program) find(prefix string) (rest string, ok bool, more <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.lines {
		if rest, ok := strings.CutPrefix(l, prefix); ok {
			return rest, true, nil
		}
	}
	return "", false, p.more
}

// await waits for a line that begins so and returns the rest of it.
func (p *program) await(prefix string) (string, error) {
	timer := time.NewTimer(2 * patience)
	defer timer.Stop()
	ended := false
	for {
		rest, ok, more := p.find(prefix)
		switch {
		case ok:
			return rest, nil
		case ended:
			return "", fmt.Errorf("%s ended without a line %q; it said:\n%s", p.name, prefix, p.output())
		}
		select {
		case <-more:
		case <-p.done:
			ended = true
		case <-timer.C:
			return "", fmt.Errorf("%s gave no line %q; it said:\n%s", p.name, prefix, p.output())
		}
	}
}

func (p *program) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}
