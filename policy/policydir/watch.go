package policydir

import (
	"fmt"
	"os"
	"syscall"
)

// watcher says that something has happened in a directory, not what: who hears it
// reads the directory.
type watcher struct {
	file   *os.File
	events chan struct{} // holds one
	done   chan struct{}
}

func newWatcher() (*watcher, error) {
	fd, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watching for changes: %w", err)
	}
	w := &watcher{os.NewFile(uintptr(fd), "inotify"), make(chan struct{}, 1), make(chan struct{})}
	go w.read()
	return w, nil
}

// add watches the directory that has the path now. Adding it again is no error.
func (w *watcher) add(dir string) error {
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

func (w *watcher) read() {
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

func (w *watcher) close() {
	w.file.Close()
	<-w.done
}
