package self

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// disk is the part of a filesystem that [Init] changes. Besides the real one
// there is one in the tests that loses whatever had not been synced, at every
// instant at which the power can fail.
type disk interface {
	mkdir(path string, mode fs.FileMode) error
	write(path string, data []byte, mode fs.FileMode) error // makes the file, which must not be there
	syncFile(path string) error
	syncDir(path string) error
	rename(from, to string) error // fails if to is a folder that is not empty
	removeAll(path string) error
}

type osDisk struct{}

func (osDisk) mkdir(path string, mode fs.FileMode) error { return os.Mkdir(path, mode) }
func (osDisk) rename(from, to string) error              { return os.Rename(from, to) }
func (osDisk) removeAll(path string) error               { return os.RemoveAll(path) }
func (osDisk) syncDir(path string) error                 { return syncPath(path) }
func (osDisk) syncFile(path string) error                { return syncPath(path) }

func (osDisk) write(path string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	// The mode again, because the process's umask has cut the first one.
	return errors.Join(err, f.Chmod(mode), f.Close())
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// writeSynced writes a file and has it on the disk before it returns.
func writeSynced(d disk, path string, data []byte, mode fs.FileMode) error {
	if err := d.write(path, data, mode); err != nil {
		return err
	}
	return d.syncFile(path)
}

// replace puts a file into a folder whole or not at all.
func replace(d disk, dir, path string, data []byte, mode fs.FileMode) error {
	temporary := path + temporarySuffix
	if err := d.removeAll(temporary); err != nil {
		return err
	}
	if err := writeSynced(d, temporary, data, mode); err != nil {
		return err
	}
	if err := d.rename(temporary, path); err != nil {
		return err
	}
	return d.syncDir(dir)
}

// maxFile bounds what is read; our files have a few hundred bytes.
const maxFile = 64 << 10

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, &CorruptError{File: path, Reason: fmt.Sprintf("it has more than %d bytes", maxFile)}
	}
	return data, nil
}

// checkPrivate demands that path belongs to this user and is closed to others.
func checkPrivate(path string, mode fs.FileMode) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if info.IsDir() != mode.IsDir() || !info.IsDir() && !info.Mode().IsRegular() {
		return &CorruptError{File: path, Reason: fmt.Sprintf("it is of another kind than expected: %s", info.Mode())}
	}
	if perm := info.Mode().Perm(); perm&^mode.Perm() != 0 {
		return &PermissionError{File: path, Found: info.Mode().String(), Hint: fmt.Sprintf("run: chmod %o %s", mode.Perm(), path)}
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return &PermissionError{File: path, Found: fmt.Sprintf("owned by uid %d", st.Uid), Hint: fmt.Sprintf("it must belong to the user that runs meshca, uid %d", os.Geteuid())}
	}
	return nil
}

// lockDir takes the lock of a state directory, so that two programs do not
// change it at once. It does not wait.
func lockDir(dir string) (unlock func() error, err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	// The folder itself is the lock: no file that could be left behind.
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("locking state directory %q: another meshca is at work in it: %w", dir, err)
	}
	return f.Close, nil
}
