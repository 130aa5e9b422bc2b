package roots

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// FileName is the record's name in a state directory.
const FileName = "bundle.json"

// File is a [Store] in a file, whose folder must be there and be writable to us
// alone. Processes that share the folder share the record.
type File struct{ Path string }

// Load implements [Store]. The version is the content's checksum.
func (f File) Load(context.Context) ([]byte, string, error) { return f.load() }

func (f File) load() ([]byte, string, error) {
	file, err := os.Open(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxRecord+1))
	if err != nil {
		return nil, "", err
	}
	return data, fmt.Sprintf("%x", sha256.Sum256(data)), nil
}

// Save implements [Store]: the file is the old one or the new one, whenever the
// process or the machine ends.
func (f File) Save(_ context.Context, data []byte, version string) (err error) {
	lock, err := os.OpenFile(f.Path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close() // which gives the lock back
	for err = syscall.EINTR; errors.Is(err, syscall.EINTR); {
		err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		return fmt.Errorf("locking %q: %w", lock.Name(), err)
	}
	if _, found, err := f.load(); err != nil {
		return err
	} else if found != version {
		return ErrConflict
	}
	dir := filepath.Dir(f.Path)
	half, err := os.CreateTemp(dir, filepath.Base(f.Path)+".*")
	if err != nil {
		return err
	}
	_, err = half.Write(data)
	err = errors.Join(err, half.Sync(), half.Close())
	if err == nil {
		err = os.Rename(half.Name(), f.Path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(half.Name()))
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
