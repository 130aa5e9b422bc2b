package sds

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	defaultSocketMode = 0o600
	// maxSocketName is what fits in a socket address beside the folder's
	// descriptor: 107 bytes less "/proc/self/fd/", ten digits, the private
	// folder's name and slashes.
	maxSocketName = 64
	// probeTimeout is how long a server that is still alive has to take a
	// connection; the kernel does that for it.
	probeTimeout = time.Second
	// lockTimeout is how long another process may take to make its socket in
	// the same folder, and lockInterval how often to look.
	lockTimeout  = 2 * time.Second
	lockInterval = 20 * time.Millisecond
)

// Listen makes the agent's socket at path, with the given permissions (zero
// means 0600), and listens on it. Who may connect gets the identity.
//
// The socket is bound in a private folder beside path, given its permissions
// there, and only then renamed into its place: nobody can connect before the
// permissions are right, and a client finds either the old socket or the new
// one. A socket that nobody answers on is replaced. Anything else is refused:
// a socket with a live server, a file, a symbolic link, and a folder that
// everybody may write to without the sticky bit. Abstract sockets have no
// permissions and are refused too.
//
// The folder is opened once and everything is done through that descriptor,
// so that nothing can be put in its place meanwhile, and so that the path may
// be longer than the 107 bytes of a socket address.
//
// Closing the listener removes the socket if it is still this one. While a
// [Server] serves it, a socket that somebody else removed is made again.
func Listen(path string, mode fs.FileMode) (net.Listener, error) {
	l, err := listen(path, mode)
	if err != nil {
		return nil, fmt.Errorf("making the agent's socket %q: %w", path, err)
	}
	return l, nil
}

func listen(path string, mode fs.FileMode) (_ *socket, err error) {
	if mode == 0 {
		mode = defaultSocketMode
	}
	dir, name := filepath.Split(filepath.Clean(path))
	switch {
	case path == "" || strings.ContainsRune(path, 0) || path[0] == '@':
		return nil, errors.New("abstract and unnamed sockets have no permissions; give a path")
	case name == "" || name == "." || name == "..":
		return nil, errors.New("the path ends in no file name")
	case len(name) > maxSocketName:
		return nil, fmt.Errorf("the file name has %d bytes; at most %d are allowed", len(name), maxSocketName)
	case mode&^fs.ModePerm != 0 || mode&0o111 != 0:
		return nil, fmt.Errorf("mode %#o: only read and write permissions make sense, such as 0600 or 0666", mode)
	}
	if dir == "" {
		dir = "."
	}
	f, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	unlock, err := f.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := f.checkFree(name); err != nil {
		return nil, err
	}
	return f.bind(path, name, mode)
}

// folder is an open directory; names in it are looked up by its descriptor.
type folder struct {
	*os.Root
	file *os.File
}

func openFolder(dir string) (_ *folder, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	file, err := root.Open(".")
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	f := &folder{root, file}
	info, err := file.Stat()
	if err == nil && info.Mode()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0 {
		err = fmt.Errorf("everybody may write to the folder %q (mode %v), and so put another socket in this one's place; "+
			"take that permission away or set the sticky bit", dir, info.Mode())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (f *folder) Close() error { return errors.Join(f.file.Close(), f.Root.Close()) }

// path returns a short path to name in the folder that leads nowhere else,
// whatever has become of the folder's own path.
func (f *folder) path(name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", f.file.Fd(), name)
}

// lock keeps two agents from both finding a stale socket and each taking the
// place of the other's.
func (f *folder) lock() (unlock func(), err error) {
	deadline := time.Now().Add(lockTimeout)
	for {
		err := syscall.Flock(int(f.file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			// Closing the descriptor would release it too, but that stays open.
			return func() { _ = syscall.Flock(int(f.file.Fd()), syscall.LOCK_UN) }, nil
		case errors.Is(err, syscall.EINTR):
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return nil, fmt.Errorf("locking the folder: %w", err)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("another process has held the lock of the folder %q for %v; is a second agent starting there?", f.Name(), lockTimeout)
		default:
			time.Sleep(lockInterval)
		}
	}
}

// checkFree makes sure that name can be taken: nothing is there, or a socket
// that nobody answers on.
func (f *folder) checkFree(name string) error {
	info, err := f.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("there is something else than a socket (%v) at that path; remove it if it is not needed", info.Mode())
	}
	c, err := net.DialTimeout("unix", f.path(name), probeTimeout)
	switch {
	case err == nil:
		_ = c.Close() // nothing was said on it
		return errors.New("a server that is running answers there already; stop it first")
	case errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist):
		return nil
	default:
		return fmt.Errorf("cannot tell whether a server answers there already: %w", err)
	}
}

// bind makes the socket in a private folder and moves it to name.
func (f *folder) bind(path, name string, mode fs.FileMode) (*socket, error) {
	private := ".new-" + rand.Text()[:12]
	if err := f.Mkdir(private, 0o700); err != nil {
		return nil, err
	}
	// By then it is empty, or holds a socket that never had a name: what is left
	// behind harms nobody.
	defer func() { _ = f.RemoveAll(private) }()
	inside := private + "/s"
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: f.path(inside)})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // it would go by a path that is no more
	info, err := f.publish(inside, name, mode)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &socket{path: path, mode: mode, place: place{l, f, name, info}}, nil
}

// publish gives the socket its permissions and then its name.
func (f *folder) publish(inside, name string, mode fs.FileMode) (fs.FileInfo, error) {
	if err := f.Chmod(inside, mode); err != nil {
		return nil, err
	}
	info, err := f.Lstat(inside)
	if err != nil {
		return nil, err
	}
	return info, f.Rename(inside, name)
}
