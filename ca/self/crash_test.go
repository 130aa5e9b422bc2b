package self

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/meshca/meshca/identity/identitytest"
)

// A crash is played as follows. recorder lets Init work on a real directory and
// writes down each change. model replays a prefix of the changes and knows which
// of them the disk is bound to hold: a file's bytes once the file was synced, a
// folder's entries once the folder was. Of the others any subset may have
// reached it; unsynced bytes may be whole, half, zeros or none. Each outcome is
// laid out as a directory of its own, and Open and Init have to cope with it.

type change struct {
	op       string // mkdir, write, syncFile, syncDir, rename, removeAll
	path, to string
	data     []byte
	mode     fs.FileMode
}

type recorder struct {
	base string
	log  []change
	fail int // fail at this change, counted from 1; 0 never
}

func (r *recorder) add(c change) error {
	rel := func(p string) string {
		s, err := filepath.Rel(r.base, p)
		if err != nil || strings.HasPrefix(s, "..") {
			return "outside:" + p
		}
		return s
	}
	c.path = rel(c.path)
	if c.to != "" {
		c.to = rel(c.to)
	}
	r.log = append(r.log, c)
	if len(r.log) == r.fail {
		return syscall.ENOSPC
	}
	return nil
}

func (r *recorder) mkdir(path string, mode fs.FileMode) error {
	return errors.Join(r.add(change{op: "mkdir", path: path, mode: mode}), os.Mkdir(path, mode))
}

func (r *recorder) write(path string, data []byte, mode fs.FileMode) error {
	err := r.add(change{op: "write", path: path, data: data, mode: mode})
	if err != nil {
		data = data[:len(data)/2] // what a full disk leaves
	}
	return errors.Join(err, osDisk{}.write(path, data, mode))
}

func (r *recorder) syncFile(path string) error { return r.add(change{op: "syncFile", path: path}) }
func (r *recorder) syncDir(path string) error  { return r.add(change{op: "syncDir", path: path}) }

func (r *recorder) rename(from, to string) error {
	if err := r.add(change{op: "rename", path: from, to: to}); err != nil {
		return err
	}
	return os.Rename(from, to)
}

func (r *recorder) removeAll(path string) error {
	if err := r.add(change{op: "removeAll", path: path}); err != nil {
		return err
	}
	return os.RemoveAll(path)
}

// fast is the real disk without syncs, for what only has to work.
type fast struct{ osDisk }

func (fast) syncFile(string) error { return nil }
func (fast) syncDir(string) error  { return nil }

type inode struct {
	dir    bool
	mode   fs.FileMode
	data   []byte
	synced bool
}

// model is a filesystem: inode 0 is the folder in which the state directory lies.
type model struct {
	nodes   []inode
	now     map[int]map[string]int // entries as programs see them
	durable map[int]map[string]int // entries that are on the disk for certain
	pending []entryChange
}

// entryChange is a change of one folder's entries; inode -1 removes.
type entryChange struct {
	dir int
	set map[string]int
}

func newModel() *model {
	return &model{nodes: []inode{{dir: true}}, now: map[int]map[string]int{0: {}}, durable: map[int]map[string]int{0: {}}}
}

func (m *model) find(path string) (dir int, name string, node int) {
	parts := strings.Split(path, string(filepath.Separator))
	if path == "." {
		return 0, "", 0
	}
	for i, p := range parts {
		node, ok := m.now[dir][p]
		if !ok {
			node = -1
		}
		if i == len(parts)-1 {
			return dir, p, node
		}
		dir = node
	}
	return dir, name, -1
}

func (m *model) enter(dir int, set map[string]int) {
	apply(m.now[dir], set)
	m.pending = append(m.pending, entryChange{dir, set})
}

func apply(entries, set map[string]int) {
	for name, node := range set {
		if node < 0 {
			delete(entries, name)
		} else {
			entries[name] = node
		}
	}
}

func (m *model) play(c change) {
	dir, name, node := m.find(c.path)
	switch c.op {
	case "mkdir", "write":
		m.nodes = append(m.nodes, inode{dir: c.op == "mkdir", mode: c.mode, data: c.data})
		node = len(m.nodes) - 1
		m.now[node], m.durable[node] = map[string]int{}, map[string]int{}
		m.enter(dir, map[string]int{name: node})
	case "syncFile":
		m.nodes[node].synced = true
	case "syncDir":
		kept := m.pending[:0:0]
		for _, p := range m.pending {
			if p.dir == node {
				apply(m.durable[node], p.set)
			} else {
				kept = append(kept, p)
			}
		}
		m.pending = kept
	case "rename":
		_, to, _ := m.find(c.to)
		m.enter(dir, map[string]int{name: -1, to: node})
	case "removeAll":
		if node >= 0 {
			m.enter(dir, map[string]int{name: -1})
		}
	}
}

// crashes calls f for each tree of files that a power cut could leave now.
func (m *model) crashes(f func(entries map[int]map[string]int, torn int)) {
	for subset := range 1 << len(m.pending) {
		entries := map[int]map[string]int{}
		for dir, e := range m.durable {
			entries[dir] = maps.Clone(e)
		}
		for i, p := range m.pending {
			if subset&(1<<i) != 0 {
				apply(entries[p.dir], p.set)
			}
		}
		for torn := range 4 {
			f(entries, torn)
		}
	}
}

// content is what of a file has reached the disk: bytes that were not synced are
// whole, half, zeros or none.
func (n *inode) content(torn int) []byte {
	if n.synced {
		return n.data
	}
	return [][]byte{n.data, n.data[:len(n.data)/2], make([]byte, len(n.data)), nil}[torn]
}

// describe tells trees apart.
func (m *model) describe(dir int, entries map[int]map[string]int, torn int) string {
	var s strings.Builder
	for _, name := range slices.Sorted(maps.Keys(entries[dir])) {
		n := &m.nodes[entries[dir][name]]
		fmt.Fprintf(&s, "%s %v %x {%s}", name, n.mode, n.content(torn), m.describe(entries[dir][name], entries, torn))
	}
	return s.String()
}

// layOut writes a tree.
func (m *model) layOut(t *testing.T, path string, dir int, entries map[int]map[string]int, torn int) {
	t.Helper()
	for name, node := range entries[dir] {
		n, path := m.nodes[node], filepath.Join(path, name)
		if n.dir {
			check(t, os.Mkdir(path, n.mode))
			m.layOut(t, path, node, entries, torn)
			continue
		}
		check(t, os.WriteFile(path, n.content(torn), n.mode))
		check(t, os.Chmod(path, n.mode))
	}
}

// record runs Init in base/state and returns what it did.
func record(t *testing.T, base string) []change {
	t.Helper()
	r := &recorder{base: base}
	_, err := initialize(r, filepath.Join(base, "state"), InitConfig{TrustDomain: identitytest.TrustDomain(t, "cluster.local")})
	check(t, err)
	for _, c := range r.log {
		if strings.HasPrefix(c.path, "outside:") {
			t.Fatalf("Init changes %s", c.path)
		}
	}
	return r.log
}

// Every instant of Init at which the power may fail, with every way in which the
// disk may have kept or lost what was not synced.
func TestF4_F5_F12_PowerCutAtEveryInstantOfInit(t *testing.T) {
	first := record(t, t.TempDir())
	// A second history begins with what the first one left when it was cut off
	// just before the rename.
	cut := slices.IndexFunc(first, func(c change) bool { return c.op == "rename" })
	base := t.TempDir()
	m := newModel()
	for _, c := range first[:cut] {
		m.play(c)
	}
	m.layOut(t, base, 0, m.now, 0)
	second := record(t, base)

	for name, h := range map[string]struct{ before, log []change }{
		"new directory":            {nil, first},
		"after an interrupted one": {append(slices.Clone(first[:cut]), change{op: "syncDir", path: "state"}), second},
	} {
		t.Run(name, func(t *testing.T) {
			m := newModel()
			for _, c := range h.before {
				m.play(c)
			}
			var none, whole, same int
			seen := map[string]bool{}
			for i := range len(h.log) + 1 {
				if i > 0 {
					m.play(h.log[i-1])
				}
				m.crashes(func(entries map[int]map[string]int, torn int) {
					if s := m.describe(0, entries, torn); seen[s] && i < len(h.log) {
						same++
						return
					} else {
						seen[s] = true
					}
					dir := t.TempDir()
					m.layOut(t, dir, 0, entries, torn)
					at := fmt.Sprintf("cut after %d of %d changes (%+v)", i, len(h.log), lastOf(h.log[:i]))
					if survives(t, filepath.Join(dir, "state"), at) {
						whole++
					} else if none++; i == len(h.log) {
						t.Fatalf("%s: Init had returned, and its root is gone", at)
					}
				})
			}
			t.Logf("%d changes: %d crashes left no root, %d a whole one (%d more gave the same files)", len(h.log), none, whole, same)
			if none == 0 || whole == 0 {
				t.Error("not both sides of the rename were seen")
			}
		})
	}
}

func lastOf(log []change) string {
	if len(log) == 0 {
		return "start"
	}
	c := log[len(log)-1]
	return strings.TrimSpace(c.op + " " + c.path + " " + c.to)
}

// survives demands that a directory holds either no root, so that Init can be
// repeated, or a whole one, which Init does not touch; it reports which.
func survives(t *testing.T, dir, at string) (whole bool) {
	t.Helper()
	td := identitytest.TrustDomain(t, "cluster.local")
	u, err := open(fast{}, dir, Config{TrustDomain: td})
	var never *NotInitializedError
	switch {
	case err == nil:
		whole = true
	case errors.As(err, &never):
		if _, err := initialize(fast{}, dir, InitConfig{TrustDomain: td}); err != nil {
			t.Fatalf("%s: Init cannot be repeated: %v", at, err)
		}
		if u, err = open(fast{}, dir, Config{TrustDomain: td}); err != nil {
			t.Fatalf("%s: after a second Init: %v", at, err)
		}
	default:
		t.Fatalf("%s: %v", at, err)
	}
	if _, err := initialize(fast{}, dir, InitConfig{TrustDomain: td}); !errors.As(err, new(*ExistsError)) {
		t.Fatalf("%s: Init over a root: %v", at, err)
	}
	marked, err := os.ReadFile(filepath.Join(dir, markerName))
	if err != nil || !bytes.Equal(marked, marker(u.Root())) {
		t.Fatalf("%s: marker %q, %v", at, marked, err)
	}
	if _, err := os.Stat(AnchorPath(dir)); err != nil {
		t.Fatalf("%s: %v", at, err)
	}
	return whole
}

// A full disk at each change: Init says so, and what is left is as after a crash.
func TestF37_FullDiskDuringInit(t *testing.T) {
	changes := len(record(t, t.TempDir()))
	for n := 1; n <= changes; n++ {
		base := t.TempDir()
		r := &recorder{base: base, fail: n}
		dir := filepath.Join(base, "state")
		_, err := initialize(r, dir, InitConfig{TrustDomain: identitytest.TrustDomain(t, "cluster.local")})
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("change %d (%s) failed, and Init says %v", n, lastOf(r.log), err)
		}
		survives(t, dir, fmt.Sprintf("failure at change %d (%s)", n, lastOf(r.log)))
	}
}
