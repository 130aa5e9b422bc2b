// Package supervise runs a program as a child that is started again at once when it is
// killed or crashes.
//
// It is for programs whose clients feel each second that they are away, in containers:
// there the restart of a container takes the kubelet a second, and longer each time.
// What a restart cannot mend, such as a wrong configuration, is left to whoever started
// us: the child's own end is ours too.
package supervise

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

const (
	// steady is how long a child lives that was well: it is started again at once,
	// however it ended.
	steady = 10 * time.Second
	// Of children that end earlier the next waits longer each time, and after some of
	// them we end too.
	firstPause   = 100 * time.Millisecond
	longestPause = 2 * time.Second
	mostInARow   = 8
)

// Config is what is run.
type Config struct {
	Path string // the program
	// Args returns the arguments of the child, given how many there were before it.
	Args           func(restarts int) []string
	Stdout, Stderr io.Writer
	Log            *slog.Logger
}

// EndedError says that the child has ended in a way that another one would too.
type EndedError struct {
	State string // as the system describes it, such as "exit status 1"
	Early int    // how many in a row have ended within seconds
}

func (e *EndedError) Error() string {
	if e.Early < mostInARow {
		return "the program that was supervised ended: " + e.State
	}
	return fmt.Sprintf("the program that was supervised ended %d times in a row within %v of its start, the last time: %s", e.Early, steady, e.State)
}

// Run starts the child, and another when it was killed by a signal, or has ended with
// an error after it had been well for a while. It returns an [*EndedError] when the
// child ends in another way, or eight times in a row within seconds, and nil when the
// child has ended because ctx has: it is asked to by SIGTERM, and waited for.
func Run(ctx context.Context, c Config) error {
	// The kernel kills the child with the thread that has started it: with us.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	early := 0
	for restarts := 0; ; restarts++ {
		began := time.Now()
		state, err := c.once(ctx, restarts)
		if err != nil {
			return err
		}
		lived := time.Since(began)
		if early++; lived >= steady {
			early = 0
		}
		switch {
		case ctx.Err() != nil && (state == nil || state.Success() || killedBy(state) == syscall.SIGTERM):
			return nil
		case ctx.Err() != nil, !again(state, lived), early == mostInARow:
			return &EndedError{State: state.String(), Early: early}
		}
		pause := pauseAfter(early)
		c.Log.Error("the program was killed or has crashed, and is started again", "end", state.String(),
			"lived", lived.Round(time.Millisecond).String(), "restarts", restarts+1, "pause", pause.String())
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// once runs one child to its end. There is no state if ctx has ended before it began.
func (c *Config) once(ctx context.Context, restarts int) (*os.ProcessState, error) {
	child := exec.CommandContext(ctx, c.Path, c.Args(restarts)...)
	child.Args[0] = os.Args[0] // what lists of processes show
	child.Stdout, child.Stderr = c.Stdout, c.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	child.Cancel = func() error { return child.Process.Signal(syscall.SIGTERM) }
	err := child.Run() // of how it ended the state says more
	if child.ProcessState == nil && ctx.Err() == nil {
		return nil, fmt.Errorf("starting %q: %w", c.Path, err)
	}
	return child.ProcessState, nil
}

// killedBy is the signal that has ended a process; 0 if none has.
func killedBy(s *os.ProcessState) syscall.Signal {
	if w, ok := s.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		return w.Signal()
	}
	return 0
}

// again reports whether another child may do better than one that ended like this.
func again(s *os.ProcessState, lived time.Duration) bool {
	return killedBy(s) != 0 || s.ExitCode() > 0 && lived >= steady
}

// pauseAfter is how long the next child waits after so many that ended early.
func pauseAfter(early int) time.Duration {
	if early <= 1 {
		return 0 // the first one of a row may have been anything
	}
	return min(firstPause<<(early-2), longestPause)
}
