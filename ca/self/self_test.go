package self

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// childDir makes the test binary a child that does nothing but Init.
const childDir = "MESHCA_TEST_INIT_UNDER"

func TestMain(m *testing.M) {
	dir := os.Getenv(childDir)
	if dir == "" {
		os.Exit(m.Run())
	}
	td, err := identity.ParseTrustDomain("cluster.local")
	for i := 0; err == nil; i++ {
		if _, err = Init(filepath.Join(dir, fmt.Sprint(i)), InitConfig{TrustDomain: td}); err == nil {
			_, err = fmt.Println(i)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func td(t testing.TB) identity.TrustDomain { return identitytest.TrustDomain(t, "cluster.local") }

// newState makes a root and returns its directory.
func newState(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	_, err := initialize(fast{}, dir, InitConfig{TrustDomain: td(t)})
	check(t, err)
	return dir
}

func reopen(t testing.TB, dir string) *Upstream {
	t.Helper()
	u, err := Open(dir, Config{TrustDomain: td(t)})
	check(t, err)
	return u
}

// Real kills of a real process, at random instants. What it had announced must
// be whole, and what it was at must be whole or not there.
func TestF4_F5_KillDuringInit(t *testing.T) {
	seed := mathrand.Uint64()
	t.Logf("seed %d", seed)
	r := mathrand.New(mathrand.NewPCG(seed, 0))
	for range 8 {
		dir := t.TempDir()
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childDir+"="+dir)
		out, err := child.StdoutPipe()
		check(t, err)
		check(t, child.Start())
		lines := bufio.NewScanner(out)
		done := 0
		for range 1 + r.IntN(3) {
			if lines.Scan() {
				done++
			}
		}
		// The instant is what is drawn here; nothing waits for anything.
		<-time.After(time.Duration(r.IntN(8000)) * time.Microsecond)
		check(t, child.Process.Kill())
		for lines.Scan() {
			done++
		}
		_ = child.Wait() // it was killed
		entries, err := os.ReadDir(dir)
		check(t, err)
		if len(entries) < done {
			t.Fatalf("%d directories, %d were announced", len(entries), done)
		}
		for i := range len(entries) {
			state := filepath.Join(dir, fmt.Sprint(i))
			if whole := survives(t, state, state); !whole && i < done {
				t.Fatalf("root %d was announced and is gone", i)
			}
		}
	}
}

func TestInitNeverReplacesARoot(t *testing.T) {
	dir := newState(t)
	root := reopen(t, dir).Root()
	var exists *ExistsError
	if _, err := Init(dir, InitConfig{TrustDomain: td(t)}); !errors.As(err, &exists) || exists.Dir != dir {
		t.Errorf("second Init: %v", err)
	}
	check(t, os.RemoveAll(filepath.Join(dir, authorityName)))
	for _, lost := range []string{markerName, anchorName} {
		// Either of the two that outlive the root is enough to remember it.
		other := t.TempDir()
		check(t, os.Chmod(other, 0o700))
		data, err := os.ReadFile(filepath.Join(dir, lost))
		check(t, err)
		check(t, os.WriteFile(filepath.Join(other, lost), data, 0o600))
		var e *LostError
		if _, err := Init(other, InitConfig{TrustDomain: td(t)}); !errors.As(err, &e) || !strings.Contains(err.Error(), "restore the directory from a backup") {
			t.Errorf("Init with only %s left: %v", lost, err)
		}
		if _, err := Open(other, Config{TrustDomain: td(t)}); !errors.As(err, &e) {
			t.Errorf("Open with only %s left: %v", lost, err)
		}
	}
	if u, err := Open(dir, Config{TrustDomain: td(t)}); err == nil {
		t.Errorf("root %x is back; it was %x", u.Root().SubjectKeyId, root.SubjectKeyId)
	}
	var never *NotInitializedError
	if _, err := Open(filepath.Join(t.TempDir(), "none"), Config{TrustDomain: td(t)}); !errors.As(err, &never) {
		t.Errorf("a directory that is not there: %v", err)
	}
}

// However many race to make the root, one does, and what is there then is its.
func TestV8_OneOfManyInitsMakesTheRoot(t *testing.T) {
	for range 4 {
		dir := filepath.Join(t.TempDir(), "state")
		check(t, os.Mkdir(dir, 0o700))
		const racers = 64
		made := make(chan string, racers)
		begin := make(chan struct{})
		var all sync.WaitGroup
		for range racers {
			all.Go(func() {
				<-begin
				if root, err := Init(dir, InitConfig{TrustDomain: td(t)}); err == nil {
					made <- string(root.Raw)
				}
			})
		}
		close(begin)
		all.Wait()
		if len(made) != 1 {
			t.Fatalf("%d roots were made", len(made))
		}
		if root := reopen(t, dir).Root(); string(root.Raw) != <-made {
			t.Error("another root is there than the one that was announced")
		}
	}
}

func TestOneInitAtATime(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	check(t, os.Mkdir(dir, 0o700))
	unlock, err := lockDir(dir)
	check(t, err)
	if _, err := Init(dir, InitConfig{TrustDomain: td(t)}); err == nil || !strings.Contains(err.Error(), "another meshca is at work") {
		t.Errorf("Init in a locked directory: %v", err)
	}
	check(t, unlock())
	_, err = Init(dir, InitConfig{TrustDomain: td(t)})
	check(t, err)
}

func TestInitConfig(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	for name, c := range map[string]InitConfig{
		"no trust domain": {},
		"too short":       {TrustDomain: td(t), Lifetime: time.Hour},
	} {
		if _, err := Init(dir, c); err == nil {
			t.Errorf("%s: a root is made", name)
		}
	}
	if _, err := Open(dir, Config{}); err == nil {
		t.Error("opened without a trust domain")
	}
	// X.509 has no year 10,000: an error, no panic, and no root.
	_, err := Init(dir, InitConfig{TrustDomain: td(t), Now: func() time.Time { return time.Date(9995, 1, 1, 0, 0, 0, 0, time.UTC) }})
	if err == nil {
		t.Error("a root is made that ends after the year 9999")
	}
	if survives(t, dir, "after a refused Init") {
		t.Error("a root is there")
	}
}

func TestF65_TrustDomainCannotChange(t *testing.T) {
	dir := newState(t)
	_, err := Open(dir, Config{TrustDomain: identitytest.TrustDomain(t, "other.test")})
	var e *TrustDomainError
	if !errors.As(err, &e) || e.Held != "cluster.local" || e.Want.String() != "other.test" {
		t.Errorf("error %v", err)
	}
}

// Every byte of the state, damaged in several ways: refused with the file's
// name, and no new root is made.
func TestF13_DamagedStateIsRefused(t *testing.T) {
	dir := newState(t)
	for _, name := range []string{
		markerName, authorityName + "/" + stateName, authorityName + "/" + keyName, authorityName + "/" + certName,
	} {
		path := filepath.Join(dir, name)
		good, err := os.ReadFile(path)
		check(t, err)
		info, err := os.Stat(path)
		check(t, err)
		refused := func(what string, data []byte) {
			t.Helper()
			if data == nil {
				check(t, os.Remove(path))
			} else {
				check(t, os.WriteFile(path, data, info.Mode()))
			}
			_, err := Open(dir, Config{TrustDomain: td(t)})
			ok := errors.As(err, new(*CorruptError)) || errors.As(err, new(*LostError)) ||
				errors.As(err, new(*VersionError)) || errors.As(err, new(*TrustDomainError))
			if !ok || !strings.Contains(err.Error(), dir) {
				t.Fatalf("%s %s: %v", name, what, err)
			}
			if _, err := initialize(fast{}, dir, InitConfig{TrustDomain: td(t)}); err == nil {
				t.Fatalf("%s %s: Init made a new root", name, what)
			}
		}
		// Every fifth byte, beginning anywhere: all of them in a few runs.
		for i := mathrand.IntN(5); i < len(good); i += 5 {
			flipped := append([]byte(nil), good...)
			flipped[i] ^= 1 << mathrand.IntN(8)
			refused(fmt.Sprintf("with a bit flipped in byte %d", i), flipped)
		}
		for i := 0; i < len(good); i += 1 + len(good)/12 {
			refused(fmt.Sprintf("cut to %d bytes", i), good[:i:i])
		}
		refused("zeroed", make([]byte, len(good)))
		refused("with a byte more", append(append([]byte(nil), good...), '\n'))
		refused("far too long", make([]byte, maxFile+2))
		if name != markerName {
			refused("gone", nil)
		}
		check(t, os.WriteFile(path, good, info.Mode()))
		check(t, os.Chmod(path, info.Mode()))
		reopen(t, dir)
	}
}

func TestF13_NewerStateIsRefused(t *testing.T) {
	dir := newState(t)
	path := filepath.Join(dir, authorityName, stateName)
	check(t, os.WriteFile(path, []byte(`{"version": 2, "roots": []}`), 0o600))
	var e *VersionError
	if _, err := Open(dir, Config{TrustDomain: td(t)}); !errors.As(err, &e) || e.File != path || e.Have != 2 || e.Can != 1 {
		t.Errorf("error %v", err)
	}
}

// A whole root of somebody else, put in place of ours.
func TestF13_ExchangedRootIsRefused(t *testing.T) {
	dir, other := newState(t), newState(t)
	ours, theirs := filepath.Join(dir, authorityName), filepath.Join(other, authorityName)
	for _, name := range []string{keyName, certName} {
		good, err := os.ReadFile(filepath.Join(ours, name))
		check(t, err)
		bad, err := os.ReadFile(filepath.Join(theirs, name))
		check(t, err)
		check(t, os.WriteFile(filepath.Join(ours, name), bad, 0o600))
		if _, err := Open(dir, Config{TrustDomain: td(t)}); !errors.As(err, new(*CorruptError)) {
			t.Errorf("another %s: %v", name, err)
		}
		check(t, os.WriteFile(filepath.Join(ours, name), good, 0o600))
	}
	check(t, os.RemoveAll(ours))
	check(t, os.Rename(theirs, ours))
	if _, err := Open(dir, Config{TrustDomain: td(t)}); !errors.As(err, new(*CorruptError)) {
		t.Errorf("another root: %v", err)
	}
}

func TestMarkerAndAnchorAreRepaired(t *testing.T) {
	dir := newState(t)
	root := identity.EncodePEM(reopen(t, dir).Root())
	check(t, os.Remove(filepath.Join(dir, markerName)))
	check(t, os.WriteFile(AnchorPath(dir), []byte("nonsense"), 0o644))
	reopen(t, dir)
	if got, err := os.ReadFile(AnchorPath(dir)); err != nil || string(got) != string(root) {
		t.Errorf("anchor %q, %v", got, err)
	}
	info, err := os.Stat(AnchorPath(dir))
	check(t, err)
	if info.Mode().Perm() != 0o644 {
		t.Errorf("the anchor has mode %v", info.Mode())
	}
	if _, err := os.Stat(filepath.Join(dir, markerName)); err != nil {
		t.Error(err)
	}
}

func TestStateIsForItsOwnerAlone(t *testing.T) {
	type row struct {
		name string
		mode fs.FileMode
	}
	rows := []row{
		{authorityName + "/" + keyName, 0o640}, {authorityName + "/" + keyName, 0o604}, {authorityName + "/" + keyName, 0o620},
		{authorityName + "/" + stateName, 0o660}, {authorityName + "/" + certName, 0o666},
		{authorityName, 0o750}, {"", 0o755}, {"", 0o701},
	}
	for _, r := range rows {
		dir := newState(t)
		path := filepath.Join(dir, r.name)
		check(t, os.Chmod(path, r.mode))
		var e *PermissionError
		_, err := Open(dir, Config{TrustDomain: td(t)})
		if !errors.As(err, &e) || e.File != path || !strings.Contains(err.Error(), "chmod ") {
			t.Errorf("%q with mode %o: %v", r.name, r.mode, err)
		}
	}
	dir := filepath.Join(t.TempDir(), "state")
	check(t, os.Mkdir(dir, 0o755))
	check(t, os.Chmod(dir, 0o755))
	if _, err := Init(dir, InitConfig{TrustDomain: td(t)}); !errors.As(err, new(*PermissionError)) {
		t.Errorf("Init in a directory that is open to others: %v", err)
	}
	if os.Geteuid() == 0 { // only root can give files away
		dir := newState(t)
		check(t, os.Chown(filepath.Join(dir, authorityName, keyName), 1, -1))
		if _, err := Open(dir, Config{TrustDomain: td(t)}); !errors.As(err, new(*PermissionError)) {
			t.Errorf("a key of another user: %v", err)
		}
	}
	for name, swap := range map[string]func(path string) error{
		"link":   func(p string) error { return errors.Join(os.Rename(p, p+"2"), os.Symlink(p+"2", p)) },
		"folder": func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o600)) },
	} {
		dir := newState(t)
		check(t, swap(filepath.Join(dir, authorityName, keyName)))
		if _, err := Open(dir, Config{TrustDomain: td(t)}); !errors.As(err, new(*CorruptError)) {
			t.Errorf("a %s in place of the key: %v", name, err)
		}
	}
}

func TestModesOfTheState(t *testing.T) {
	dir := newState(t)
	for name, want := range map[string]fs.FileMode{
		"": fs.ModeDir | 0o700, authorityName: fs.ModeDir | 0o700, authorityName + "/" + keyName: 0o600,
		authorityName + "/" + certName: 0o644, authorityName + "/" + stateName: 0o600, markerName: 0o600, anchorName: 0o644,
	} {
		info, err := os.Stat(filepath.Join(dir, name))
		check(t, err)
		if info.Mode() != want {
			t.Errorf("%q has mode %v, want %v", name, info.Mode(), want)
		}
	}
}
