// Package inputfile reads the small files that a program is given: tokens, keys,
// certificates, policies. Whoever writes them may be careless or worse, so [Read]
// neither waits for a FIFO nor reads without end.
//
// It says nothing about what is in a file, or who may read it.
package inputfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// ErrNotRegular is in the error about what is no regular file: a folder, a FIFO.
var ErrNotRegular = errors.New("it is not a regular file")

// Read reads a regular file of at most so many bytes. Symbolic links are followed,
// since that is how the kubelet swaps files. Each error is a [*fs.PathError], which
// names the path.
func Read(path string, most int) ([]byte, error) {
	data, _, err := ReadWithMode(path, most)
	return data, err
}

// ReadWithMode is [Read], and returns the mode of the file that was read.
func ReadWithMode(path string, most int) ([]byte, fs.FileMode, error) {
	// Without O_NONBLOCK, opening a FIFO would wait for a writer without end.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = f.Close() }() // it was only read
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, &fs.PathError{Op: "read", Path: path, Err: ErrNotRegular}
	}
	data, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		return nil, 0, err
	}
	if len(data) > most {
		return nil, 0, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("it has more than %d bytes", most)}
	}
	return data, info.Mode(), nil
}
