package canary

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/test/testenv"
)

// patience bounds everything that has to happen.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	code := m.Run()
	err := programs.remove()
	if err == nil && code == 0 {
		err = goleak.Find()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// built are our programs, built when the first test asks.
type built struct {
	once sync.Once
	dir  string
	err  error
}

var programs built

// path returns where the program is.
func (b *built) path(t testing.TB, name string) string {
	t.Helper()
	b.once.Do(func() { b.err = b.build() })
	must(t, b.err)
	return filepath.Join(b.dir, name)
}

func (b *built) build() error {
	root, err := testenv.RepositoryRoot()
	if err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "canary"); err != nil {
		return err
	}
	cmd := exec.Command("go", "build", "-o", b.dir+string(filepath.Separator), "./cmd/meshca", "./cmd/agent")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building meshca and agent: %w\n%s", err, bytes.TrimSpace(out))
	}
	// A limit of zero that our programs found would hide that they do not set it.
	var cores syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_CORE, &cores); err != nil {
		return err
	}
	cores.Cur = cores.Max
	return syscall.Setrlimit(syscall.RLIMIT_CORE, &cores)
}

func (b *built) remove() error {
	if b.dir == "" {
		return nil
	}
	return os.RemoveAll(b.dir)
}

// process is one of our programs at its most talkative. All it could write to
// is in folders of its own.
type process struct {
	*testenv.Process
	name string
	dir  string // its working directory, home and temporary directory are below
}

// launch starts a program with an environment that leads nowhere else.
func (w *world) launch(t testing.TB, name, program string, args ...string) *process {
	t.Helper()
	p := &process{name: name, dir: filepath.Join(w.dir, name)}
	env := []string{"-i", "-C", p.sub(t, "work"), "HOME=" + p.sub(t, "home"), "TMPDIR=" + p.sub(t, "tmp")}
	args = append(append(env, programs.path(t, program)), args...)
	var err error
	p.Process, err = testenv.Start(filepath.Join(w.dir, name+".log"), "/usr/bin/env", args...)
	must(t, err)
	w.processes = append(w.processes, p)
	t.Cleanup(func() { _ = p.Kill() })
	return p
}

func (p *process) sub(t testing.TB, name string) string {
	t.Helper()
	dir := filepath.Join(p.dir, name)
	must(t, os.MkdirAll(dir, 0o700))
	return dir
}

// line waits for a log line that matches.
func (p *process) line(t testing.TB, what string, match func(map[string]any) bool) map[string]any {
	t.Helper()
	var found map[string]any
	eventually(t, p.name+": "+what, func() error {
		for text := range bytes.Lines(p.Log()) {
			var line map[string]any
			if json.Unmarshal(text, &line) == nil && match(line) {
				found = line
				return nil
			}
		}
		if err := p.Exited(); err != nil {
			return fatal{err}
		}
		return fmt.Errorf("the last lines:\n%s", p.LogTail(10))
	})
	return found
}

// serving waits until the program serves and returns that line.
func (p *process) serving(t testing.TB) map[string]any {
	t.Helper()
	return p.line(t, "serving", func(l map[string]any) bool { return l["msg"] == "serving" })
}

// ended waits for a program that cannot start.
func (p *process) ended(t testing.TB) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatalf("%s still runs; its log:\n%s", p.name, p.LogTail(20))
	}
}

// fatal is an error that waiting will not heal.
type fatal struct{ error }

// eventually tries until there is no error.
func eventually(t testing.TB, what string, try func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		if errors.As(err, new(fatal)) {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v", what, err)
		case <-tick.C:
		}
	}
}

// get fetches a page of an operations port, whatever its status.
func get(address, path string) (status int, body string, err error) {
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + address + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(all), err
}

func ready(t testing.TB, what, address string) {
	t.Helper()
	eventually(t, what+" to be ready", func() error {
		status, body, err := get(address, "/readyz")
		if err == nil && status != http.StatusOK {
			err = errors.New(strings.TrimSpace(body))
		}
		return err
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
