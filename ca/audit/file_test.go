package audit

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

// lines counts the records in a file.
func lines(t *testing.T, path string) int {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(data, []byte{'\n'})
}

// A log that is rotated or removed while the CA runs goes on at its path; when
// that cannot be, nothing is signed.
func TestFileIsFollowed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log", "audit.jsonl")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := Open(path, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	record := func() error { return l.Record(t.Context(), ca.Event{Kind: ca.KindProof}) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(record())
	must(os.Rename(path, path+".1"))
	must(record())
	must(record())
	if before, after := lines(t, path+".1"), lines(t, path); before != 1 || after != 2 {
		t.Errorf("%d records before the rotation and %d after it; want 1 and 2", before, after)
	}
	must(os.Remove(path))
	must(record())
	if n := lines(t, path); n != 1 {
		t.Errorf("%d records after the file was removed; want 1", n)
	}
	must(os.RemoveAll(filepath.Dir(path)))
	if err := record(); err == nil {
		t.Error("a record counted although nothing can be at the path")
	}
	must(os.Mkdir(filepath.Dir(path), 0o700))
	must(record())
}
