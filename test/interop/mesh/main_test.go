package mesh

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/test/kubetest"
	"github.com/meshca/meshca/test/testenv"
)

// cluster is shared by all tests here; they keep apart by namespaces of their own.
var cluster kubetest.Shared

func TestMain(m *testing.M) {
	flag.Parse()
	// The tests here wait for certificates to age, which costs no processor, so
	// they all wait at once, however few processors there are.
	if err := flag.Set("test.parallel", "16"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// Under the race detector a process rests for a second before it ends, which
	// would leave nothing else to kill of one as short as `meshca init`.
	if os.Getenv("GORACE") == "" {
		os.Setenv("GORACE", "atexit_sleep_ms=0")
	}
	code := m.Run()
	for _, err := range []error{cluster.Stop(), programs.remove()} {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// built are our programs, built once for all tests when the first one asks.
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
	if b.err != nil {
		t.Fatal(b.err)
	}
	return filepath.Join(b.dir, name)
}

// build makes them as "make build" does.
func (b *built) build() error {
	root, err := testenv.RepositoryRoot()
	if err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "mesh"); err != nil {
		return err
	}
	args := []string{"build", "-tags", "grpcnotrace", "-o", b.dir + string(filepath.Separator)}
	env := os.Environ()
	if underRaceDetector() { // which needs C, and has much in Go's cache already
		args = append(args, "-race")
	} else {
		args = append(args, "-trimpath")
		env = append(env, "CGO_ENABLED=0")
	}
	cmd := exec.Command("go", append(args, "./cmd/meshca", "./cmd/agent", "./cmd/proxy")...)
	cmd.Dir, cmd.Env = root, env
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building our programs: %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

func (b *built) remove() error {
	if b.dir == "" {
		return nil
	}
	return os.RemoveAll(b.dir)
}

// underRaceDetector reports how these tests were built; the programs are built
// the same way.
func underRaceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return false
	}
	for _, s := range info.Settings {
		if s.Key == "-race" {
			return s.Value == "true"
		}
	}
	return false
}
