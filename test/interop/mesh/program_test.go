package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/test/testenv"
)

// patience is how long anything may take that has to happen. It is a deadline
// for tests that would hang, not a promise.
const patience = 30 * time.Second

// eventually tries until it succeeds, patience is over, or the test ends.
func eventually(ctx context.Context, what string, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w; last: %w", what, context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// program is one of our two programs, which lives through several processes:
// each start after the first is a restart.
type program struct {
	name    string // of its log files
	binary  string
	dir     string
	args    []string
	process *testenv.Process
	starts  int
}

// launch runs a process, with a log of its own.
func (p *program) launch() error {
	p.starts++
	process, err := testenv.Start(filepath.Join(p.dir, fmt.Sprintf("%s-%d.log", p.name, p.starts)), p.binary, p.args...)
	if err != nil {
		return err
	}
	p.process = process
	return nil
}

// start is launch, and waits for the line that says where the program serves.
func (p *program) start(ctx context.Context) (logLine, error) {
	if err := p.launch(); err != nil {
		return nil, err
	}
	return p.waitLine(ctx, "that it serves", func(l logLine) bool { return l.text("msg") == "serving" })
}

// Kill9 ends the process as kill -9 does.
func (p *program) Kill9(t testing.TB) {
	t.Helper()
	if err := p.process.Kill(); err != nil {
		t.Fatal(err)
	}
}

// stop asks the process to end and wants it to do so in good order.
func (p *program) stop(t testing.TB) {
	if p.process == nil {
		return // it could not be started
	}
	select {
	case <-p.process.Done():
		return // the test has killed it
	default:
	}
	if err := p.process.Stop(10 * time.Second); err != nil {
		t.Error(err)
	}
	if err := p.process.Exited(); !strings.Contains(err.Error(), "(status 0)") {
		t.Errorf("%s did not end in good order: %v", p.name, err)
	}
}

// logLine is one line of a program's log.
type logLine map[string]any

func (l logLine) text(key string) string {
	s, _ := l[key].(string)
	return s
}

// lines are what the present process has logged. Each line has to be JSON,
// which the race detector's would not be.
func (p *program) lines() ([]logLine, error) {
	var lines []logLine
	for line := range bytes.Lines(p.process.Log()) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break // still being written
		}
		l := make(logLine)
		if err := json.Unmarshal(line, &l); err != nil {
			return nil, fmt.Errorf("%s logged what is not JSON: %q", p.name, line)
		}
		lines = append(lines, l)
	}
	return lines, nil
}

// matching are the lines of the present process that match, so far.
func (p *program) matching(match func(logLine) bool) ([]logLine, error) {
	lines, err := p.lines()
	return slices.DeleteFunc(lines, func(l logLine) bool { return !match(l) }), err
}

// count is how many match.
func (p *program) count(t testing.TB, match func(logLine) bool) int {
	t.Helper()
	lines, err := p.matching(match)
	if err != nil {
		t.Fatal(err)
	}
	return len(lines)
}

// waitLine returns the first line of the present process that matches.
func (p *program) waitLine(ctx context.Context, what string, match func(logLine) bool) (found logLine, err error) {
	err = eventually(ctx, p.name+" to log "+what, func() error {
		lines, err := p.matching(match)
		if err != nil {
			return err
		}
		if len(lines) > 0 {
			found = lines[0]
			return nil
		}
		if err := p.process.Exited(); err != nil {
			return err
		}
		return fmt.Errorf("its log:\n%s", p.process.LogTail(20))
	})
	return found, err
}

// waitReady polls /readyz.
func waitReady(ctx context.Context, what, address string) error {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return eventually(ctx, what+" to be ready", func() error {
		resp, err := client.Get("http://" + address + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return errors.New(string(bytes.TrimSpace(body)))
		}
		return nil
	})
}
