package mesh

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshca/meshca/test/testenv"
)

// TestInitKilledAtAnyInstant: `meshca init` is killed and run again. What is
// there then is one whole root, with which a CA can sign. The order of the
// writes is proved in ca/self; this is about the program.
func TestInitKilledAtAnyInstant(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	whole := timeInit(t)
	found := make(map[string]int) // what the killed ones left, to see that the instants differ
	for i := range 20 {
		m := &Mesh{dir: shortDir(t)}
		m.configure(t, m.issueTokens(t))
		// Half of them anywhere, half of them once something is on the disk.
		when := instant{after: time.Duration(random.Int64N(int64(whole)))}
		if i%2 == 1 {
			when = instant{onDisk: true, after: time.Duration(random.Int64N(int64(whole / 4)))}
		}
		killInit(t, m, when)
		step := left(m)
		found[step]++
		mustHoldOneRoot(t, m, step)
	}
	t.Logf("seed %d; init takes %s; the killed ones left: %v", seed, whole.Round(time.Millisecond), found)
}

// timeInit is how long an undisturbed init takes: the shortest of some, since
// the first has to be read from the disk.
func timeInit(t *testing.T) time.Duration {
	t.Helper()
	shortest := patience
	for range 3 {
		cmd := initCommand(t, filepath.Join(shortDir(t), "state")) // the program is built by now
		began := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("meshca init: %v\n%s", err, out)
		}
		shortest = min(shortest, time.Since(began))
	}
	return shortest
}

// instant is when to kill: a while after the start, or after the state
// directory has appeared.
type instant struct {
	onDisk bool
	after  time.Duration
}

func killInit(t *testing.T, m *Mesh, when instant) {
	t.Helper()
	p, err := testenv.Start(filepath.Join(m.dir, "init.log"), programs.path(t, "meshca"),
		"init", "--state-dir", m.state(), "--trust-domain", trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	for when.onDisk && !exists(m.state()) && p.Exited() == nil {
		// It looks as often as it can: the instants are short.
	}
	timer := time.NewTimer(when.after)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-p.Done():
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// How far an init came.
const (
	leftNothing   = "nothing"
	leftDirectory = "a directory"
	leftRoot      = "a root"
	leftAll       = "everything"
)

func left(m *Mesh) string {
	switch {
	case exists(m.anchor()):
		return leftAll
	case exists(filepath.Join(m.state(), "authority")):
		return leftRoot
	case exists(m.state()):
		return leftDirectory
	}
	return leftNothing
}

// mustHoldOneRoot runs init again and wants a CA to work with what there is
// then. Init makes a root exactly where the killed one had not.
func mustHoldOneRoot(t *testing.T, m *Mesh, step string) {
	t.Helper()
	rootFile := filepath.Join(m.state(), "authority", "root.pem")
	before, _ := os.ReadFile(rootFile)
	out, err := initCommand(t, m.state()).CombinedOutput()
	if made := step == leftNothing || step == leftDirectory; made != (err == nil) {
		t.Fatalf("the killed init left %s; the next one: %v\n%s", step, err, out)
	}
	ca := m.startCA(t)
	ca.Kill9(t)
	after, err := os.ReadFile(rootFile)
	if err != nil {
		t.Fatal(err)
	}
	if len(before) > 0 && string(before) != string(after) {
		t.Errorf("the killed init left %s, and its root was replaced", step)
	}
	anchor, err := os.ReadFile(m.anchor())
	if err != nil || string(anchor) != string(after) {
		t.Errorf("the killed init left %s; what agents trust is not the root (%v)", step, err)
	}
}
