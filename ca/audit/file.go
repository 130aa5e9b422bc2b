package audit

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// file is a sink that follows its path. A log that has been rotated or removed
// under the process would otherwise take records that nobody will ever read,
// and signing would go on without a trail. Only the holder of [Log]'s turn
// writes.
type file struct {
	path string
	f    *os.File
}

func openFile(path string) (*os.File, error) {
	// Without O_NONBLOCK the opening of a FIFO that nobody reads would wait for
	// ever, and nothing could say what for. Go turns it into a blocking write.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NONBLOCK, 0o600)
	if errors.Is(err, syscall.ENXIO) {
		return nil, fmt.Errorf("%q is a FIFO that nobody reads; start its reader first: %w", path, err)
	}
	return f, err
}

// Write appends to the file that is at the path now.
func (s *file) Write(p []byte) (int, error) {
	if err := s.follow(); err != nil {
		return 0, err
	}
	return s.f.Write(p)
}

// Close closes the file.
func (s *file) Close() error { return s.f.Close() }

// follow opens the path again if another file, or none, stands there.
func (s *file) follow() error {
	held, err := s.f.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Stat(s.path); err == nil && os.SameFile(held, there) {
		return nil
	}
	f, err := openFile(s.path)
	if err != nil {
		return fmt.Errorf("it has been moved or removed, and cannot be opened anew: %w", err)
	}
	old := s.f
	s.f = f
	return old.Close()
}
