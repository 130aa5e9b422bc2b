package sds

import (
	"context"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func mustListen(t *testing.T, path string, mode fs.FileMode) net.Listener {
	t.Helper()
	l, err := Listen(path, mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// accepts reports whether a connection to path reaches l.
func accepts(t *testing.T, l net.Listener, path string) bool {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		return false
	}
	defer c.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	return true
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func TestT9_V36_SocketModes(t *testing.T) {
	for _, mode := range []fs.FileMode{0, 0o600, 0o660, 0o666} {
		dir := t.TempDir()
		old := syscall.Umask(0) // the widest, so that the permissions are ours
		path := filepath.Join(dir, "agent.sock")
		l := mustListen(t, path, mode)
		syscall.Umask(old)
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		want := mode
		if want == 0 {
			want = 0o600
		}
		if info.Mode().Type() != fs.ModeSocket || info.Mode().Perm() != want {
			t.Errorf("mode %v, want a socket with %#o", info.Mode(), want)
		}
		if l.Addr().String() != path || l.Addr().Network() != "unix" {
			t.Errorf("address %s %q", l.Addr().Network(), l.Addr())
		}
		if !accepts(t, l, path) {
			t.Error("nobody answers")
		}
		expect(t, "files beside it", entries(t, dir), "agent.sock")
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		_ = l.Close() // a second time does no harm
		expect(t, "files after Close", entries(t, dir))
	}
}

func TestT9_V36_SPIFFE40_SocketRefusals(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open")
	for path, mode := range map[string]fs.FileMode{open: 0o777, filepath.Join(dir, "sticky"): 0o777 | fs.ModeSticky} {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "target")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		path string
		mode fs.FileMode
		want string
	}{
		"a folder that everybody may write to": {filepath.Join(open, "s"), 0, "everybody may write"},
		"no such folder":                       {filepath.Join(dir, "none", "s"), 0, "no such file"},
		"a file for a folder":                  {filepath.Join(file, "s"), 0, "not a directory"},
		"a file":                               {file, 0, "something else than a socket"},
		"a symbolic link":                      {link, 0, "something else than a socket"},
		"a folder":                             {open, 0, "something else than a socket"},
		"abstract":                             {"@meshca", 0, "abstract"},
		"abstract, by its byte":                {"\x00meshca", 0, "abstract"},
		"empty":                                {"", 0, "abstract"},
		"the root":                             {"/", 0, "no file name"},
		"a long name":                          {filepath.Join(dir, strings.Repeat("n", 65)), 0, "65 bytes"},
		"mode with execute":                    {filepath.Join(dir, "s"), 0o755, "0755"},
		"mode with setuid":                     {filepath.Join(dir, "s"), fs.ModeSetuid | 0o600, "mode"},
	}
	for name, test := range tests {
		l, err := Listen(test.path, test.mode)
		if err == nil {
			_ = l.Close()
			t.Errorf("%s: accepted", name)
			continue
		}
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v; want %q in it", name, err, test.want)
		}
	}
	if _, err := os.Lstat(target); err == nil {
		t.Error("the link was followed")
	}
	expect(t, "what is left", entries(t, dir), "file", "link", "open", "sticky")
	mustListen(t, filepath.Join(dir, "sticky", "s"), 0)
}

func TestF36_StaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	if err := stale.Close(); err != nil { // as after kill -9
		t.Fatal(err)
	}
	l := mustListen(t, path, 0)
	if !accepts(t, l, path) {
		t.Error("nobody answers in the stale socket's place")
	}
}

// A socket that is to stay does so when its listener is closed, and is replaced
// by the next.
func TestF36_SocketStaysForTheSuccessor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first, err := Listen(path, 0, LeaveInPlace())
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	l := mustListen(t, path, 0)
	after, err := os.Lstat(path)
	if err != nil || os.SameFile(before, after) || !accepts(t, l, path) {
		t.Errorf("the successor has no socket there: %v", err)
	}
}

func TestLiveServerIsNotReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	first := mustListen(t, path, 0)
	if l, err := Listen(path, 0); err == nil {
		_ = l.Close()
		t.Fatal("a live server's socket was taken")
	} else if !strings.Contains(err.Error(), "answers there already") {
		t.Errorf("error %v", err)
	}
	c, err := first.Accept() // the probe
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if !accepts(t, first, path) {
		t.Error("the first server lost its socket")
	}
}

func TestCloseLeavesAnothersSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	first := mustListen(t, path, 0)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second := mustListen(t, path, 0)
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if !accepts(t, second, path) {
		t.Error("closing the first socket removed the second")
	}
}

func TestOneOfManyAgentsGetsTheSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	var (
		wg  sync.WaitGroup
		mu  sync.Mutex
		got []net.Listener
	)
	for range 8 {
		wg.Go(func() {
			if l, err := Listen(path, 0); err == nil {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, l)
			}
		})
	}
	wg.Wait()
	for _, l := range got {
		defer l.Close()
	}
	if len(got) != 1 {
		t.Errorf("%d agents believe that the socket is theirs", len(got))
	}
}

func TestPathsLongerThanASocketAddress(t *testing.T) {
	dir := t.TempDir()
	for range 4 {
		dir = filepath.Join(dir, strings.Repeat("d", 60))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "agent.sock")
	l := mustListen(t, path, 0)
	t.Chdir(dir) // clients have the same limit
	if !accepts(t, l, "agent.sock") {
		t.Error("nobody answers")
	}
	relative := mustListen(t, "other.sock", 0)
	if !accepts(t, relative, "other.sock") {
		t.Error("nobody answers on a relative path")
	}
}

// An agent that ends while its successor takes the place must not remove the
// successor's socket: looking whose it is, and removing it, are one step.
func TestF36_HandoverLeavesTheNewSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "agent.sock")
	synctest.Test(t, func(t *testing.T) {
		old := mustListen(t, path, 0)
		f, err := openFolder(dir) // the successor
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		unlock, err := f.lock()
		if err != nil {
			t.Fatal(err)
		}
		closed := make(chan error, 1)
		go func() { closed <- old.Close() }()
		synctest.Wait()
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("the socket was removed without the folder's lock: %v", err)
		}
		fresh, err := f.bind("agent.sock", 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer fresh.Close()
		unlock()
		if err := <-closed; err != nil {
			t.Error(err)
		}
		if !accepts(t, fresh, path) {
			t.Error("the successor's socket has no name")
		}
	})
}

func TestF36_LostSocketIsMadeAgain(t *testing.T) {
	for name, lose := range map[string]func(t *testing.T, path string){
		"removed":             func(t *testing.T, path string) { mustDo(t, os.Remove(path)) },
		"moved":               func(t *testing.T, path string) { mustDo(t, os.Rename(path, path+".old")) },
		"its folder replaced": func(t *testing.T, path string) { replaceFolder(t, filepath.Dir(path)) },
	} {
		dir := filepath.Join(t.TempDir(), "run")
		mustDo(t, os.Mkdir(dir, 0o700))
		path := filepath.Join(dir, "agent.sock")
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := mustListen(t, path, 0o660)
				log := &safeBuffer{}
				s := newServer(t, Config{Feed: NewFeed(), Log: slog.New(slog.NewTextHandler(log, nil)), Metrics: prometheus.NewRegistry(), Now: time.Now})
				ctx, cancel := context.WithCancel(t.Context())
				go s.keepSocket(ctx, l.(*socket))
				before := l.(*socket).current().info
				time.Sleep(time.Hour + time.Second) // between two looks
				if !os.SameFile(before, l.(*socket).current().info) {
					t.Error("a socket that was there was made again")
				}
				lose(t, path)
				time.Sleep(judgeInterval)
				synctest.Wait()
				cancel()
				if !accepts(t, l, path) {
					t.Error("nobody answers")
				}
				if info, err := os.Lstat(path); err != nil || info.Mode().Perm() != 0o660 {
					t.Errorf("%v, %v", info, err)
				}
				if n := strings.Count(log.String(), "has been made again"); n != 1 {
					t.Errorf("said %d times: %s", n, log.String())
				}
				mustDo(t, l.Close())
				expect(t, "files after Close", entries(t, filepath.Dir(path)), leftBehind(name)...)
			})
		})
	}
}

func leftBehind(name string) []string {
	if name == "moved" {
		return []string{"agent.sock.old"}
	}
	return nil
}

func replaceFolder(t *testing.T, dir string) {
	mustDo(t, os.RemoveAll(dir))
	mustDo(t, os.Mkdir(dir, 0o700))
}

func mustDo(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Another server's socket in the place is left alone, and told of once.
func TestF36_AnothersSocketIsNotTakenBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	synctest.Test(t, func(t *testing.T) {
		l := mustListen(t, path, 0)
		mustDo(t, os.Remove(path))
		other, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
		mustDo(t, err)
		defer other.Close()
		log := &safeBuffer{}
		s := newServer(t, Config{Feed: NewFeed(), Log: slog.New(slog.NewTextHandler(log, nil)), Metrics: prometheus.NewRegistry(), Now: time.Now})
		ctx, cancel := context.WithCancel(t.Context())
		go s.keepSocket(ctx, l.(*socket))
		time.Sleep(10 * judgeInterval)
		cancel()
		if n := strings.Count(log.String(), "answers there already"); n != 1 {
			t.Errorf("said %d times: %s", n, log.String())
		}
		if info, err := os.Lstat(path); err != nil || os.SameFile(info, l.(*socket).current().info) {
			t.Errorf("%v, %v", info, err)
		}
	})
}
