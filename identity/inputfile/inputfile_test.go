package inputfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/meshca/meshca/identity/inputfile"
)

func TestV53_Read(t *testing.T) {
	dir := t.TempDir()
	file, link, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	err := errors.Join(os.WriteFile(file, []byte("12345"), 0o640), os.Symlink("file", link), syscall.Mkfifo(fifo, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, link} {
		data, mode, err := inputfile.ReadWithMode(path, 5)
		if string(data) != "12345" || mode.Perm() != 0o640 || err != nil {
			t.Errorf("%s: %q, %v, %v", path, data, mode, err)
		}
	}
	for name, tt := range map[string]struct {
		path string
		most int
		want error // nil for any
	}{
		"one byte too many": {file, 4, nil},
		"not there":         {filepath.Join(dir, "none"), 5, fs.ErrNotExist},
		"a folder":          {dir, 5, inputfile.ErrNotRegular},
		"a FIFO":            {fifo, 5, inputfile.ErrNotRegular},
	} {
		_, err := inputfile.Read(tt.path, tt.most)
		var named *fs.PathError
		if !errors.As(err, &named) || named.Path != tt.path || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
