package supervise

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// The test binary is its own child.
func TestMain(m *testing.M) {
	switch os.Getenv("SUPERVISE_TEST") {
	case "child":
		child(os.Args[1:])
	case "supervisor":
		supervisor()
	default:
		goleak.VerifyTestMain(m)
	}
}

// child says who it is, and then does as it is told: "wait", "exit N", "kill".
func child(args []string) {
	asked := make(chan os.Signal, 1)
	if args[0] != "deaf" {
		signal.Notify(asked, syscall.SIGTERM)
	}
	fmt.Println(os.Getpid(), args[1])
	if code, err := strconv.Atoi(args[0]); err == nil {
		os.Exit(code)
	}
	<-asked
	fmt.Println("asked to end")
}

// supervisor supervises a child that waits, until it is killed.
func supervisor() {
	_ = os.Setenv("SUPERVISE_TEST", "child")
	_ = Run(context.Background(), Config{Path: os.Args[0], Args: args("wait"), Stdout: os.Stdout, Log: slog.New(slog.DiscardHandler)})
}

func args(what string) func(int) []string {
	return func(restarts int) []string { return []string{what, strconv.Itoa(restarts)} }
}

// run supervises a child and returns what it writes.
func run(t *testing.T, what string) (lines *bufio.Scanner, stop func() error) {
	t.Helper()
	t.Setenv("SUPERVISE_TEST", "child")
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		err := Run(ctx, Config{Path: os.Args[0], Args: args(what), Stdout: w, Stderr: os.Stderr, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
		w.Close()
		ended <- err
	}()
	lines = bufio.NewScanner(r)
	return lines, func() error { cancel(); _, _ = io.Copy(io.Discard, r); return <-ended }
}

// next reads which process is running, and how many there were before.
func next(t *testing.T, lines *bufio.Scanner) (pid, restarts int) {
	t.Helper()
	if !lines.Scan() {
		t.Fatal("there is no other child")
	}
	if _, err := fmt.Sscan(lines.Text(), &pid, &restarts); err != nil {
		t.Fatalf("%q: %v", lines.Text(), err)
	}
	return pid, restarts
}

// Killed again and again: another one is there at once, and the first one at least
// without any pause.
func TestF36_KilledChildIsStartedAgain(t *testing.T) {
	lines, stop := run(t, "wait")
	pid, _ := next(t, lines)
	for n := range 3 {
		began := time.Now()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		was := pid
		var restarts int
		pid, restarts = next(t, lines)
		t.Logf("another one was there after %v", time.Since(began))
		if restarts != n+1 || pid == was {
			t.Errorf("child %d (was %d) is told of %d restarts", pid, was, restarts)
		}
	}
	if err := stop(); err != nil {
		t.Errorf("asked to end: %v", err)
	}
}

// What another start would not mend is handed on.
func TestF63_ChildThatRefusesEndsUs(t *testing.T) {
	lines, stop := run(t, "2")
	next(t, lines)
	if lines.Scan() {
		t.Errorf("started again: %q", lines.Text())
	}
	var ended *EndedError
	if err := stop(); !errors.As(err, &ended) || ended.State != "exit status 2" {
		t.Errorf("got %v", err)
	}
}

// A child that is killed whenever it starts is not started for ever.
func TestF36_ChildThatNeverStays(t *testing.T) {
	lines, stop := run(t, "wait")
	var last int
	for lines.Scan() {
		var pid int
		if _, err := fmt.Sscan(lines.Text(), &pid, &last); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	var ended *EndedError
	if err := stop(); !errors.As(err, &ended) || ended.Early != mostInARow || last != mostInARow-1 {
		t.Errorf("after %d restarts: %v", last, err)
	}
}

func TestChildIsAskedToEnd(t *testing.T) {
	for what, heard := range map[string]bool{"wait": true, "deaf": false} {
		t.Run(what, func(t *testing.T) {
			t.Setenv("SUPERVISE_TEST", "child")
			ctx, cancel := context.WithCancel(t.Context())
			var out strings.Builder
			r, w := io.Pipe()
			read := make(chan struct{})
			go func() {
				defer close(read)
				lines := bufio.NewScanner(r)
				for lines.Scan() {
					fmt.Fprintln(&out, lines.Text())
					cancel()
				}
			}()
			err := Run(ctx, Config{Path: os.Args[0], Args: args(what), Stdout: w, Log: slog.New(slog.DiscardHandler)})
			w.Close()
			if err != nil {
				t.Error(err)
			}
			<-read
			if got := strings.Contains(out.String(), "asked to end"); got != heard {
				t.Errorf("it said %q", out.String())
			}
		})
	}
}

func TestProgramThatIsNotThere(t *testing.T) {
	err := Run(t.Context(), Config{Path: "/nowhere", Args: args(""), Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), `starting "/nowhere"`) {
		t.Errorf("got %v", err)
	}
}

// Whoever kills us, kills the child: two agents must not be at work.
func TestF36_ChildDiesWithItsSupervisor(t *testing.T) {
	c := exec.CommandContext(t.Context(), os.Args[0])
	c.Env = append(os.Environ(), "SUPERVISE_TEST=supervisor")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	next(t, lines)
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// The pipe ends when the last process has let go of it.
	ended := make(chan bool)
	go func() { defer close(ended); lines.Scan() }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("the child lives")
	}
	_ = c.Wait() // it was killed
}

func TestPauses(t *testing.T) {
	var all []string
	for early := range mostInARow {
		all = append(all, pauseAfter(early).String())
	}
	if got := strings.Join(all, " "); got != "0s 0s 100ms 200ms 400ms 800ms 1.6s 2s" {
		t.Errorf("pauses are %s", got)
	}
}
