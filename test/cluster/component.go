package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Component is one of the cluster's processes. What it takes to start it again
// is kept in a file, so that whoever opens the cluster can.
type Component struct {
	Name string   `json:"name"`
	Path string   `json:"path"`
	Args []string `json:"args"`
	Env  []string `json:"env,omitempty"` // beside a PATH

	dir string // of the cluster
}

// process identifies a process for as long as the machine runs: a process id
// alone may be another's by now.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // /proc/PID/stat, field 22, in clock ticks after boot
}

func (c *Component) specFile() string { return filepath.Join(c.dir, "components", c.Name+".json") }
func (c *Component) pidFile() string  { return filepath.Join(c.dir, "components", c.Name+".pid") }

// LogFile is where the component's output goes.
func (c *Component) LogFile() string { return filepath.Join(c.dir, "logs", c.Name+".log") }

// Start starts the component in the cluster's network namespace.
func (c *Component) Start() error {
	if p, err := c.process(); err == nil && p.alive() {
		return fmt.Errorf("starting %s: it runs already, as process %d", c.Name, p.PID)
	}
	spec, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.specFile(), spec, 0o600); err != nil {
		return fmt.Errorf("starting %s: %w", c.Name, err)
	}
	log, err := os.OpenFile(c.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("starting %s: %w", c.Name, err)
	}
	defer log.Close()
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + c.dir}, c.Env...)
	cmd.Dir = c.dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a Ctrl-C is for us alone
	if err := inNamespace(c.dir, cmd.Start); err != nil {
		return fmt.Errorf("starting %s: %w", c.Name, err)
	}
	p, err := identify(cmd.Process.Pid)
	go cmd.Wait() //nolint:errcheck // only so that no zombie stays; the log tells why it ended
	if err != nil {
		return fmt.Errorf("starting %s: %w; the last of its log:\n%s", c.Name, err, c.LogTail(20))
	}
	content, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return os.WriteFile(c.pidFile(), content, 0o600)
}

// inNamespace runs f on a thread that is in the cluster's network namespace.
func inNamespace(dir string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// The thread is not given back: it ends with this goroutine, and nothing else
		// ever runs in the namespace by mistake.
		runtime.LockOSThread()
		ns, err := os.Open(namespaceFile(dir))
		if err != nil {
			done <- err
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("entering the network namespace %q: %w", ns.Name(), err)
			return
		}
		done <- f()
	}()
	return <-done
}

// identify reads when a process started.
func identify(pid int) (process, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, fmt.Errorf("process %d has ended already", pid)
	}
	// The second field is the name in parentheses, and may hold anything.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return process{}, fmt.Errorf("reading when process %d started: %q is not understood", pid, stat)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	return process{PID: pid, Start: start}, err
}

// alive reports whether the process is still this one, and no zombie.
func (p process) alive() bool {
	now, err := identify(p.PID)
	if err != nil || now != p {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func (c *Component) process() (process, error) {
	var p process
	content, err := os.ReadFile(c.pidFile())
	if err != nil {
		return p, err
	}
	return p, json.Unmarshal(content, &p)
}

// Running reports whether the component runs.
func (c *Component) Running() bool {
	p, err := c.process()
	return err == nil && p.alive()
}

// PID is the component's process id, 0 if it does not run.
func (c *Component) PID() int {
	if p, err := c.process(); err == nil && p.alive() {
		return p.PID
	}
	return 0
}

// Kill ends the component as kill -9 does, and returns when it is gone. One that
// does not run is no error.
func (c *Component) Kill() error { return c.end(syscall.SIGKILL, 0) }

// Stop asks the component to end, and kills it when it has not within grace.
func (c *Component) Stop(grace time.Duration) error { return c.end(syscall.SIGTERM, grace) }

// Signal sends a signal, such as SIGSTOP.
func (c *Component) Signal(s syscall.Signal) error {
	p, err := c.process()
	if err != nil || !p.alive() {
		return fmt.Errorf("sending %v to %s: it does not run", s, c.Name)
	}
	return syscall.Kill(p.PID, s)
}

func (c *Component) end(s syscall.Signal, grace time.Duration) error {
	p, err := c.process()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ending %s: %w", c.Name, err)
	}
	return p.end(s, grace)
}

// end signals the process and waits until it is gone.
func (p process) end(s syscall.Signal, grace time.Duration) error {
	// From here on the descriptor names the process, whatever its id becomes.
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || !p.alive() {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ending process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, s, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("ending process %d: %w", p.PID, err)
	}
	if s != syscall.SIGKILL {
		if gone(fd, grace) {
			return nil
		}
		if err := unix.PidfdSendSignal(fd, syscall.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("killing process %d: %w", p.PID, err)
		}
	}
	if !gone(fd, 10*time.Second) {
		return fmt.Errorf("process %d is still there 10 s after SIGKILL", p.PID)
	}
	return nil
}

// gone waits until the process of a pidfd has ended.
func gone(fd int, within time.Duration) bool {
	deadline := time.Now().Add(within)
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(max(time.Until(deadline).Milliseconds(), 0)))
		switch {
		case n > 0:
			return true
		case err != nil && errors.Is(err, unix.EINTR):
		default:
			return false
		}
	}
}

// LogTail is the last lines of the component's log.
func (c *Component) LogTail(lines int) string {
	content, err := os.ReadFile(c.LogFile())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(content)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// waitFor asks a question until it is answered by nil.
func waitFor(ctx context.Context, what string, within time.Duration, watch []*Component, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		if last = ask(ctx); last == nil {
			return nil
		}
		for _, c := range watch {
			if !c.Running() {
				return fmt.Errorf("waiting for %s: %s has ended; the last of its log:\n%s", what, c.Name, c.LogTail(20))
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s, %v long: %w", what, within, last)
		case <-tick.C:
		}
	}
}
