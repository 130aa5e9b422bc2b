package canary

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Keys live in memory: no file that the programs could write holds one but the
// root's own, no memory file or deleted file is open, and no core is dumped.
func TestT4_KeysStayInMemory(t *testing.T) {
	w := newWorld(t)
	w.keysFromSocket(t, 1)
	w.keyFromSDS(t, t.Context())
	w.keysFromSocket(t, 1) // after a renewal

	for _, p := range w.processes {
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", p.PID()))
		must(t, err)
		for line := range strings.Lines(string(limits)) {
			if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Join(strings.Fields(rest), " ") != "1 1 bytes" { // too few for a dump, and what stops a piped one
				t.Errorf("%s may dump core: %s", p.name, strings.TrimSpace(line))
			}
		}
		w.checkOpenFiles(t, p)
	}
	w.checkFiles(t)
	for _, p := range w.processes {
		must(t, p.Stop(patience))
	}
	w.checkFiles(t) // what a program leaves behind at its end counts, too
}

// checkFiles looks into every file below the world's folder but those that the
// test itself has put tokens into.
func (w *world) checkFiles(t *testing.T) {
	t.Helper()
	rootKey := filepath.Join(w.state, "authority", "root.key")
	seen := false
	must(t, filepath.WalkDir(w.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == w.tokens {
			return fs.SkipDir
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, found := range w.findings(content) {
			t.Errorf("%s holds %s", path, found)
		}
		keys := privateKeys(content)
		if path == rootKey {
			seen = len(keys) > 0
		} else if len(keys) > 0 {
			t.Errorf("%s holds a private key (%s)", path, strings.Join(keys, ", "))
		}
		return nil
	}))
	if !seen {
		t.Errorf("%s was not recognised as a private key; nothing else would be", rootKey)
	}
}

// checkOpenFiles wants every file that a program writes to be one that
// checkFiles finds.
func (w *world) checkOpenFiles(t *testing.T, p *process) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d", p.PID())
	open, err := os.ReadDir(proc + "/fd")
	must(t, err)
	for _, fd := range open {
		target, err := os.Readlink(filepath.Join(proc, "fd", fd.Name()))
		if err != nil || !strings.HasPrefix(target, "/") || strings.HasPrefix(target, "/dev/") {
			continue // closed meanwhile, or a socket, pipe, terminal
		}
		if writes(t, filepath.Join(proc, "fdinfo", fd.Name())) && (!strings.HasPrefix(target, w.dir) || strings.HasSuffix(target, " (deleted)")) {
			t.Errorf("%s writes to %q", p.name, target)
		}
	}
}

func writes(t *testing.T, fdinfo string) bool {
	t.Helper()
	content, err := os.ReadFile(fdinfo)
	if err != nil {
		return false // closed meanwhile
	}
	for line := range strings.Lines(string(content)) {
		if rest, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseInt(strings.TrimSpace(rest), 8, 64)
			must(t, err)
			return int(flags)&(os.O_WRONLY|os.O_RDWR) != 0
		}
	}
	return false
}
