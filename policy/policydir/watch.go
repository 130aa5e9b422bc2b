package policydir

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"
)

// Watcher says that something has happened in a directory, not what: who hears it
// reads the directory. Some filesystems tell of nothing, so who watches polls too.
type Watcher struct {
	file   *os.File
	events chan struct{} // holds one
	done   chan struct{}
}

// NewWatcher makes a Watcher of no directory yet. It has to be closed.
func NewWatcher() (*Watcher, error) {
	fd, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watching for changes: %w", err)
	}
	w := &Watcher{os.NewFile(uintptr(fd), "inotify"), make(chan struct{}, 1), make(chan struct{})}
	go w.read()
	return w, nil
}

// Add watches the directory that has the path now. Adding it again is no error.
func (w *Watcher) Add(dir string) error {
	const mask = syscall.IN_CLOSE_WRITE | syscall.IN_CREATE | syscall.IN_DELETE | syscall.IN_MOVED_FROM | syscall.IN_MOVED_TO |
		syscall.IN_DELETE_SELF | syscall.IN_MOVE_SELF | syscall.IN_ONLYDIR
	raw, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var added error
	if err := raw.Control(func(fd uintptr) { _, added = syscall.InotifyAddWatch(int(fd), dir, mask) }); err != nil {
		return err
	}
	if added != nil {
		return fmt.Errorf("watching %q for changes: %w", dir, added)
	}
	return nil
}

func (w *Watcher) read() {
	defer close(w.done)
	buf := make([]byte, 64<<10)
	for {
		if _, err := w.file.Read(buf); err != nil {
			return // closed
		}
		select {
		case w.events <- struct{}{}:
		default:
		}
	}
}

// Follow calls look at once, when the time is over that it returned last, and settle
// after w has seen something: a write makes several events, and they may never end. It
// returns when ctx ends. A nil Watcher sees nothing, so that only the times count.
func (w *Watcher) Follow(ctx context.Context, settle time.Duration, look func() (next time.Duration)) {
	var events <-chan struct{}
	if w != nil {
		events = w.events
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	soon := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-events:
			if !soon {
				soon = true
				timer.Reset(settle)
			}
		case <-timer.C:
			soon = false
			timer.Reset(look())
		}
	}
}

// Close ends the watching.
func (w *Watcher) Close() {
	w.file.Close()
	<-w.done
}
