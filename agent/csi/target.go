package csi

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	socketName = "agent.sock"
	// pluginFolder and targetName are the kubelet's: a CSI volume is at
	// <kubelet>/pods/<uid>/volumes/kubernetes.io~csi/<volume>/mount.
	pluginFolder = "kubernetes.io~csi"
	targetName   = "mount"

	// Pods run as any user; the mount is the boundary.
	folderMode = 0o755
	socketMode = 0o666
)

// errNotFolder marks what stands where a folder should: a symbolic link, say.
var errNotFolder = errors.New("no folder")

// target is the place of one volume below the kubelet's folder of pods.
type target struct {
	path   string // the folder that the pod gets
	pod    string // UID
	volume string // the volume's name in the pod
}

func (t target) socket() string { return filepath.Join(t.path, socketName) }

// pods is the kubelet's folder of pods.
type pods struct{ dir string }

// parse reads a target path, which must be that of a CSI volume of a pod to
// the letter: everything done there is done with the kubelet's rights.
func (p pods) parse(path string) (target, error) {
	rest, ok := strings.CutPrefix(path, p.dir+"/")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 5 || parts[1] != "volumes" || parts[2] != pluginFolder || parts[4] != targetName ||
		!isName(parts[0], 64) || !isName(parts[3], 63) {
		return target{}, fmt.Errorf("the target path %.512q is not %s/<pod's UID>/volumes/%s/<volume>/%s; is --kubelet-dir the kubelet's?",
			path, p.dir, pluginFolder, targetName)
	}
	return target{path: path, pod: parts[0], volume: parts[3]}, nil
}

// isName holds for UIDs and the names of volumes: nothing that means more than
// itself in a path.
func isName(s string, most int) bool {
	if s == "" || len(s) > most {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	})
}

// open opens the folder that holds the target. No symbolic link is followed
// below the kubelet's folder of pods.
func (p pods) open(t target) (*os.Root, error) {
	root, err := os.OpenRoot(p.dir)
	if err != nil {
		return nil, err
	}
	for _, part := range []string{t.pod, "volumes", pluginFolder, t.volume} {
		next, err := enter(root, part)
		_ = root.Close() // it was only read
		if err != nil {
			return nil, err
		}
		root = next
	}
	return root, nil
}

// enter opens a folder that is one, and not a link to one.
func enter(root *os.Root, name string) (*os.Root, error) {
	info, err := root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%q in %q is %w (%v)", name, root.Name(), errNotFolder, info.Mode().Type())
	}
	next, err := root.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	// An os.Root follows links that stay below it. What has become one since is
	// another folder than the one that was looked at.
	there, err := next.Stat(".")
	if err == nil && !os.SameFile(info, there) {
		err = fmt.Errorf("%q in %q was replaced while it was opened", name, root.Name())
	}
	if err != nil {
		return nil, errors.Join(err, next.Close())
	}
	return next, nil
}

// exists reports whether the folder is there.
func (p pods) exists(t target) (bool, error) {
	parent, err := p.open(t)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = parent.Close() }() // it was only read
	return exists(parent)
}

// exists reports whether the folder is there, in the folder that [pods.open] returned.
func exists(parent *os.Root) (bool, error) {
	folder, err := enter(parent, targetName)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, folder.Close()
}

// makeFolder makes the folder for the pod there, unless it exists.
func makeFolder(parent *os.Root) error {
	if err := parent.Mkdir(targetName, folderMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	folder, err := enter(parent, targetName)
	if err != nil {
		return err
	}
	defer func() { _ = folder.Close() }()
	return folder.Chmod(".", folderMode) // whatever the umask is
}

// maxRemoved bounds how much one call removes; the kubelet calls again.
const maxRemoved = 10_000

// remove takes away the folder and all that is in it; what is gone already is no
// error. Only root writes there: we, and the kubelet, which makes a folder for
// each subPath that a container names, whatever readOnly says.
func (p pods) remove(t target) error {
	parent, err := p.open(t)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = parent.Close() }()
	folder, err := enter(parent, targetName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	err = empty(folder)
	_ = folder.Close() // it was only read
	if err != nil {
		return err
	}
	return removeOne(parent, targetName)
}

// empty removes all that is in a folder. No symbolic link is followed, and
// nothing below a mount is touched.
//
// The folders in it become flat: what a folder of it holds is moved up before that
// folder is removed. However deep they are, two are open at a time.
func empty(folder *os.Root) error {
	for removed := 0; ; {
		entries, err := list(folder)
		if err != nil || len(entries) == 0 {
			return err
		}
		for _, e := range entries {
			for err = removeOne(folder, e.Name()); errors.Is(err, syscall.ENOTEMPTY); err = removeOne(folder, e.Name()) {
				n, err := hollow(folder, e.Name())
				if err != nil {
					return err
				}
				removed += n
			}
			if err != nil {
				return err
			}
			if removed++; removed > maxRemoved {
				return fmt.Errorf("more than %d files and folders are in %q; the rest goes at the next try", maxRemoved, folder.Name())
			}
		}
	}
}

// hollow takes out some of what is in a folder of folder, and reports how much.
func hollow(folder *os.Root, name string) (n int, err error) {
	inner, err := enter(folder, name)
	if err != nil {
		return 0, err
	}
	defer func() { _ = inner.Close() }()
	entries, err := list(inner)
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		err := removeOne(inner, e.Name())
		if errors.Is(err, syscall.ENOTEMPTY) {
			err = folder.Rename(filepath.Join(name, e.Name()), ".gone-"+rand.Text())
		}
		if err != nil {
			return 0, err
		}
	}
	return len(entries), nil
}

// removeOne removes a file or an empty folder. The kernel refuses to remove or
// move what something is mounted on before it looks whether it is empty.
func removeOne(folder *os.Root, name string) error {
	err := folder.Remove(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("something is mounted on %.128q in %q; unmount it, and nothing in it is touched: %w", name, folder.Name(), err)
	}
	return err
}

// list returns some of what is in a folder; nothing if it is empty.
func list(folder *os.Root) ([]fs.DirEntry, error) {
	dir, err := folder.Open(".")
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }() // it was only read
	entries, err := dir.ReadDir(100)
	if errors.Is(err, io.EOF) {
		return nil, nil
	}
	return entries, err
}
