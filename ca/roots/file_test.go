package roots_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/meshca/meshca/ca/roots"
)

func TestT12_FileStore(t *testing.T) {
	store := roots.File{Path: filepath.Join(t.TempDir(), roots.FileName)}
	if _, version, err := store.Load(t.Context()); version != "" || err != nil {
		t.Fatalf("version %q, %v", version, err)
	}
	check(t, store.Save(t.Context(), []byte("one"), ""))
	if err := store.Save(t.Context(), []byte("two"), ""); !errors.Is(err, roots.ErrConflict) {
		t.Errorf("a second first: %v", err)
	}
	data, version, err := store.Load(t.Context())
	check(t, err)
	if string(data) != "one" {
		t.Errorf("read %q", data)
	}
	check(t, store.Save(t.Context(), []byte("two"), version))
	if err := store.Save(t.Context(), []byte("three"), version); !errors.Is(err, roots.ErrConflict) {
		t.Errorf("over a newer one: %v", err)
	}
	// From many at once, as many as there were attempts are counted.
	check(t, store.Save(t.Context(), []byte{}, fmt.Sprintf("%x", sha256.Sum256([]byte("two")))))
	var writers sync.WaitGroup
	for range 8 {
		writers.Go(func() {
			for {
				data, version, err := store.Load(t.Context())
				if err == nil {
					err = store.Save(t.Context(), append(data, 'x'), version)
				}
				if err == nil {
					return
				}
				if !errors.Is(err, roots.ErrConflict) {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	if data, _, err = store.Load(t.Context()); err != nil || string(data) != "xxxxxxxx" {
		t.Errorf("%q, %v", data, err)
	}
	names, err := filepath.Glob(store.Path + "*")
	check(t, err)
	if len(names) != 2 {
		t.Errorf("left behind: %q", names)
	}
}
