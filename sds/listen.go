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
func Listen(path string, mode fs.FileMode, opts ...ListenOption) (net.Listener, error) {
	if mode == 0 {
		mode = defaultSocketMode
	}
	s := &socket{path: path, mode: mode}
	for _, o := range opts {
		o(s)
	}
	place, err := s.make()
	if err != nil {
		return nil, fmt.Errorf("making the agent's socket %q: %w", path, err)
	}
	s.place = place
	return s, nil
}

// ListenOption changes what [Listen] makes.
type ListenOption func(*socket)

// LeaveInPlace keeps the socket's name when the listener is closed, as if the
// process had been killed: for whoever expects a successor, which replaces a
// socket that nobody answers on, and clients that come back meanwhile.
func LeaveInPlace() ListenOption { return func(s *socket) { s.stays = true } }

// Alone says that nobody else makes sockets in the folder, because a lock of the
// caller's own sees to that. Then the folder is not locked: whoever can read a
// folder can lock it too, and so make us wait.
func Alone() ListenOption { return func(s *socket) { s.alone = true } }

// make makes the socket and listens on it.
func (s *socket) make() (_ place, err error) {
	path := s.path
	dir, name := filepath.Split(filepath.Clean(path))
	switch {
	case path == "" || strings.ContainsRune(path, 0) || path[0] == '@':
		return place{}, errors.New("abstract and unnamed sockets have no permissions; give a path")
	case name == "" || name == "." || name == "..":
		return place{}, errors.New("the path ends in no file name")
	case len(name) > maxSocketName:
		return place{}, fmt.Errorf("the file name has %d bytes; at most %d are allowed", len(name), maxSocketName)
	case s.mode&^fs.ModePerm != 0 || s.mode&0o111 != 0:
		return place{}, fmt.Errorf("mode %#o: only read and write permissions make sense, such as 0600 or 0666", s.mode)
	}
	if dir == "" {
		dir = "."
	}
	f, err := openFolder(dir)
	if err != nil {
		return place{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if !s.alone {
		unlock, err := f.lock()
		if err != nil {
			return place{}, err
		}
		defer unlock()
	}
	taken, err := f.checkFree(name)
	if err != nil {
		return place{}, err
	}
	// Nobody waits for a socket that was never there, and no permissions are wider
	// than these: the private folder would only cost a busy disk's time.
	if s.alone && !taken && s.mode == 0o666 {
		return f.bindInPlace(name, s.mode)
	}
	return f.bind(name, s.mode)
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
// that nobody answers on, which is reported.
func (f *folder) checkFree(name string) (stale bool, err error) {
	info, err := f.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case info.Mode().Type() != fs.ModeSocket:
		return false, fmt.Errorf("there is something else than a socket (%v) at that path; remove it if it is not needed", info.Mode())
	}
	c, err := net.DialTimeout("unix", f.path(name), probeTimeout)
	switch {
	case err == nil:
		_ = c.Close() // nothing was said on it
		return false, errors.New("a server that is running answers there already; stop it first")
	case errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist):
		return true, nil
	default:
		return false, fmt.Errorf("cannot tell whether a server answers there already: %w", err)
	}
}

// bind makes the socket in a private folder and moves it to name.
func (f *folder) bind(name string, mode fs.FileMode) (place, error) {
	private := ".new-" + rand.Text()[:12]
	if err := f.Mkdir(private, 0o700); err != nil {
		return place{}, err
	}
	// By then it is empty, or holds a socket that never had a name: what is left
	// behind harms nobody.
	defer func() { _ = f.RemoveAll(private) }()
	inside := private + "/s"
	p, err := f.bindInPlace(inside, mode)
	if err != nil {
		return place{}, err
	}
	if err := f.Rename(inside, name); err != nil {
		return place{}, errors.Join(err, p.Close())
	}
	p.name = name
	return p, nil
}

// bindInPlace makes the socket with its name at once and gives it its
// permissions then. For a moment it has those that the umask leaves.
func (f *folder) bindInPlace(name string, mode fs.FileMode) (place, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: f.path(name)})
	if err != nil {
		return place{}, err
	}
	l.SetUnlinkOnClose(false) // it would go by a path that is no more
	err = f.Chmod(name, mode)
	var info fs.FileInfo
	if err == nil {
		info, err = f.Lstat(name)
	}
	if err != nil {
		return place{}, errors.Join(err, l.Close())
	}
	return place{l, f, name, info}, nil
}
