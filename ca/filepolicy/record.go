package filepolicy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// record is the file that remembers which version the policies had last, and what
// they were. With it a version never falls, whatever becomes of clocks and files,
// and the same policies have the same version in the next process, and in others
// that share the file.
type record struct{ path string }

// entry is the record's content.
type entry struct {
	Version  uint64 `json:"version"`
	Content  string `json:"content"`  // SHA-256 of what decides, hex
	Policies int    `json:"policies"` // how many
}

// load returns the last entry, which is zero where there was none.
func (r record) load() (entry, error) {
	data, err := os.ReadFile(r.path)
	if errors.Is(err, fs.ErrNotExist) {
		return entry{}, nil
	}
	if err != nil {
		return entry{}, fmt.Errorf("reading the version of the policies: %w", err)
	}
	var e entry
	if err := json.Unmarshal(data, &e); err != nil {
		return entry{}, fmt.Errorf("reading the version of the policies from %q: %w; it is written anew", r.path, err)
	}
	return e, nil
}

// next returns the version of a content that comes into force now, in
// milliseconds of the clock at least, and remembers it. The version is good even
// where it could not be remembered.
func (r record) next(content string, policies int, held uint64, now time.Time) (version uint64, err error) {
	unlock, err := r.lock()
	if err != nil {
		return r.after(entry{}, held, now), err
	}
	defer unlock()
	last, err := r.load()
	if last.Version >= held && last.Content == content {
		return last.Version, nil // another process was first, or we were before
	}
	e := entry{Version: r.after(last, held, now), Content: content, Policies: policies}
	return e.Version, errors.Join(err, r.store(e))
}

func (r record) after(last entry, held uint64, now time.Time) uint64 {
	return max(last.Version+1, held+1, uint64(max(0, now.UnixMilli())))
}

// store replaces the file, whole or not at all.
func (r record) store(e entry) error {
	data, err := json.Marshal(e)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(r.path), filepath.Base(r.path)+".*")
	if err == nil {
		_, err = f.Write(append(data, '\n'))
		err = errors.Join(err, f.Sync(), f.Close())
		if err == nil {
			err = os.Rename(f.Name(), r.path)
		}
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}
	if err != nil {
		return fmt.Errorf("remembering the version of the policies: %w", err)
	}
	return nil
}

// lock keeps processes that share the file apart. The kernel lets go of it when
// the process dies.
func (r record) lock() (unlock func(), err error) {
	f, err := os.OpenFile(r.path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the version of the policies: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("locking the version of the policies: %w", err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}
