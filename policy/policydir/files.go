package policydir

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// List returns the names of the policy files in a directory, sorted: those that end
// in .yaml, .yml or .json and do not begin with a dot. Directories in it are not
// entered.
func List(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		switch filepath.Ext(name) {
		case ".yaml", ".yml", ".json":
			return strings.HasPrefix(name, ".")
		}
		return true
	})
	slices.Sort(names)
	return names, nil
}

// ReadFile reads a regular file of at most so many bytes.
func ReadFile(path string, most int) ([]byte, error) {
	// Without O_NONBLOCK, opening a FIFO would wait for a writer without end.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("reading %q: it is not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		return nil, err
	}
	if len(b) > most {
		return nil, fmt.Errorf("reading %q: it has more than %d bytes", path, most)
	}
	return b, nil
}
