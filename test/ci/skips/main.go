// Command skips reads what go test -json prints and judges the tests that were
// skipped, so that a run in which half of them could not run never looks green:
//
//	go test -json ./... | go run ./test/ci/skips .ci/skips
//
// The file lists the skips that are allowed, one on a line: the test's name, a
// tab, and why. A name stands for its subtests too. Lines that begin with # are
// comments. The command prints failed tests with their output, every skip with
// its reason, and last one line: N passed, N failed, N skipped. It fails when
// a test failed, a build failed, a skip is not listed, or no test ran at all.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "skips:", err)
		os.Exit(1)
	}
}

func run(args []string, stdin io.Reader, stdout io.Writer) error {
	if len(args) != 1 {
		return errors.New("name the file that lists the allowed skips, and nothing else")
	}
	file, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	allowed, err := parseAllowed(string(file))
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	j := &judge{allowed: allowed, stdout: stdout, output: make(map[key]*bytes.Buffer)}
	lines := bufio.NewReader(stdin)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			j.line(line)
		}
		if errors.Is(err, io.EOF) {
			return j.verdict()
		} else if err != nil {
			return fmt.Errorf("reading test output: %w", err)
		}
	}
}

// parseAllowed returns reasons by test name.
func parseAllowed(file string) (map[string]string, error) {
	allowed := make(map[string]string)
	number := 0
	for line := range strings.Lines(file) {
		number++
		line = strings.TrimRight(line, "\r\n")
		if strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, reason, ok := strings.Cut(line, "\t")
		if !ok || name == "" || strings.TrimSpace(reason) == "" {
			return nil, fmt.Errorf("line %d is not a test's name, a tab and a reason: %q", number, line)
		}
		allowed[name] = strings.TrimSpace(reason)
	}
	return allowed, nil
}

// event is a line of go test -json.
type event struct {
	Action     string
	Package    string
	ImportPath string // of builds
	Test       string
	Output     string
	Elapsed    float64
}

type key struct{ pkg, test string }

// judge counts what happened.
type judge struct {
	allowed map[string]string
	stdout  io.Writer

	output                  map[key]*bytes.Buffer // until the outcome is known
	passed, failed, skipped int
	broken                  int      // packages that failed without a failed test
	unlisted                []string // skips
}

func (j *judge) line(line []byte) {
	var e event
	if !bytes.HasPrefix(line, []byte("{")) || json.Unmarshal(line, &e) != nil || e.Action == "" {
		j.stdout.Write(line) // other tools' output
		return
	}
	k := key{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(j.stdout, e.Output)
	case "output":
		if j.output[k] == nil {
			j.output[k] = new(bytes.Buffer)
		}
		j.output[k].WriteString(e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			j.packageDone(e, j.output[k])
		} else {
			j.testDone(e, j.output[k])
		}
		delete(j.output, k)
	}
}

func (j *judge) testDone(e event, output *bytes.Buffer) {
	switch e.Action {
	case "pass":
		j.passed++
	case "fail":
		j.failed++
		fmt.Fprintf(j.stdout, "%s: %s\n%s", e.Package, e.Test, text(output))
	case "skip":
		j.skipped++
		reason, ok := j.reason(e.Test)
		if !ok {
			j.unlisted = append(j.unlisted, e.Test)
			reason = "NOT LISTED: " + strings.Join(strings.Fields(text(output)), " ")
		}
		fmt.Fprintf(j.stdout, "skipped %s (%s): %s\n", e.Test, e.Package, reason)
	}
}

// reason looks for the test, then for what it is a subtest of.
func (j *judge) reason(test string) (string, bool) {
	for {
		if reason, ok := j.allowed[test]; ok {
			return reason, true
		}
		i := strings.LastIndexByte(test, '/')
		if i < 0 {
			return "", false
		}
		test = test[:i]
	}
}

func (j *judge) packageDone(e event, output *bytes.Buffer) {
	switch {
	case e.Action == "fail":
		j.broken++ // even where its tests passed: a build, a panic, a leak
		for k, unfinished := range j.output {
			if k.pkg == e.Package && k.test != "" { // what ran when the time was up
				fmt.Fprintf(j.stdout, "%s: %s\n%s", e.Package, k.test, unfinished)
				delete(j.output, k)
			}
		}
		fmt.Fprintf(j.stdout, "%sFAIL %s\n", text(output), e.Package)
	case e.Action == "pass":
		fmt.Fprintf(j.stdout, "ok   %s (%.1f s)\n", e.Package, e.Elapsed)
	}
}

func (j *judge) verdict() error {
	fmt.Fprintf(j.stdout, "%d passed, %d failed, %d skipped\n", j.passed, j.failed, j.skipped)
	switch {
	case j.failed > 0 || j.broken > 0:
		return fmt.Errorf("%d tests failed in %d packages", j.failed, j.broken)
	case len(j.unlisted) > 0:
		return fmt.Errorf("skipped and not listed: %s", strings.Join(j.unlisted, ", "))
	case j.passed == 0:
		return errors.New("no test ran")
	}
	return nil
}

func text(b *bytes.Buffer) string {
	if b == nil {
		return ""
	}
	return b.String()
}
