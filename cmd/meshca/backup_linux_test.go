package main

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/cmd/internal/cli"
)

// terminal opens one, as programs see it.
func terminal(t *testing.T) *os.File {
	t.Helper()
	control, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	if err := unix.IoctlSetPointerInt(int(control.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	// The other end by its master, so that it need not be found below /dev.
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY)
	if errno != 0 {
		t.Fatal(errno)
	}
	f := os.NewFile(fd, "terminal")
	t.Cleanup(func() { f.Close() })
	return f
}

// The root key goes into a file or a pipe, never into a scrollback. It is judged
// before the cluster is asked for anything.
func TestBackupIsNotPrintedOnATerminal(t *testing.T) {
	c := newBackup()
	c.SilenceErrors, c.SilenceUsage = true, true
	c.SetOut(terminal(t))
	c.SetArgs([]string{"--file", "-", "--kubeconfig", "/nowhere"})
	var usage *cli.UsageError
	if err := c.Execute(); !errors.As(err, &usage) || !strings.Contains(err.Error(), "terminal") {
		t.Errorf("to a terminal: %v", err)
	}
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	defer out.Close()
	c.SetOut(out)
	if err := c.Execute(); err == nil || strings.Contains(err.Error(), "terminal") {
		t.Errorf("to a pipe: %v", err)
	}
}
