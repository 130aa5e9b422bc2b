package policydir

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshca/meshca/policy"
)

// pa writes a PeerAuthentication for a whole namespace.
func pa(namespace, name, mode string) string {
	return fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {namespace: %s, name: %s}\nspec: {mtls: {mode: %s}}\n---\n", namespace, name, mode)
}

// bench is a directory, its keeper and a clock of its own.
type bench struct {
	*testing.T
	dir string
	k   *keeper
	now time.Time
}

func newBench(t *testing.T) *bench {
	dir := filepath.Join(t.TempDir(), "policies")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return &bench{t, dir, &keeper{dir: dir}, time.Unix(1_800_000_000, 0)}
}

func (b *bench) write(name, content string) {
	b.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, name), []byte(content), 0o600); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) remove(name string) {
	b.Helper()
	if err := os.RemoveAll(filepath.Join(b.dir, name)); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) pass(d time.Duration) bool {
	b.now = b.now.Add(d)
	changed, _ := b.k.scan(b.now)
	return changed
}

// rest lets everything settle and removals count.
func (b *bench) rest() {
	b.pass(0)
	b.pass(settle)
	b.pass(removal)
}

// force are the policies in force, such as "shop/default STRICT".
func (b *bench) want(force ...string) {
	b.Helper()
	var got []string
	for _, p := range b.k.inForce {
		got = append(got, p.String()+" "+p.Mode.String())
	}
	slices.Sort(got)
	if !slices.Equal(got, force) {
		b.Errorf("in force: %q, want %q; %v", got, force, b.k.broken())
	}
}

// broken checks that one file is named, and what is said of it.
func (b *bench) broken(name string, kept bool, words string) {
	b.Helper()
	all := b.k.broken()
	if len(all) != 1 || !strings.HasSuffix(all[0].File, name) || all[0].Kept != kept || !strings.Contains(all[0].Error(), words) {
		b.Errorf("broken: %v, want %q, kept %v, with %q", all, name, kept, words)
	}
}

// spoil has the ways in which a file can turn bad.
func spoil() map[string]func(b *bench, path string) (words string) {
	as := func(content, words string) func(*bench, string) string {
		return func(b *bench, path string) string {
			b.write(filepath.Base(path), content)
			return words
		}
	}
	return map[string]func(*bench, string) string{
		"no YAML":        as("spec: [", "line 1"),
		"empty":          as("", "no object"),
		"comments only":  as("# nothing\n---\n", "no object"),
		"cut off":        as(pa("shop", "default", "DISABLE")[:60], "line 3"),
		"refused":        as(pa("shop", "a", "DISABLE")+pa("shop", "b", "3"), "line 9: shop/b: PV4"),
		"ports, no pods": as(strings.Replace(pa("shop", "a", "DISABLE"), "spec: {", "spec: {portLevelMtls: {80: {}}, ", 1), "PV5"),
		"too large":      as(strings.Repeat("# \n", maxFile/3+1), "more than 1048576 bytes"),
		"differs":        as(pa("shop", "a", "DISABLE")+pa("shop", "a", "STRICT"), "two policies shop/a that differ"),
		"taken":          as(pa("bank", "default", "DISABLE"), `policy bank/default is in "bank.yaml" too, and they differ`),
		"dangling link": func(b *bench, path string) string {
			if err := os.Symlink("nowhere", path+".new"); err != nil {
				b.Fatal(err)
			}
			if err := os.Rename(path+".new", path); err != nil {
				b.Fatal(err)
			}
			return "no such file"
		},
		"directory": func(b *bench, path string) string {
			b.remove(filepath.Base(path))
			if err := os.Mkdir(path, 0o700); err != nil {
				b.Fatal(err)
			}
			return "not a regular file"
		},
		"FIFO": func(b *bench, path string) string {
			b.remove(filepath.Base(path))
			if err := syscall.Mkfifo(path, 0o600); err != nil {
				b.Fatal(err)
			}
			return "not a regular file"
		},
	}
}

func TestT10_V21_BrokenFileKeepsItsLastGood(t *testing.T) {
	for name, spoil := range spoil() {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.write("shop.yaml", pa("shop", "default", "STRICT"))
			b.write("bank.yaml", pa("bank", "default", "STRICT"))
			b.rest()
			b.want("bank/default STRICT", "shop/default STRICT")
			words := spoil(b, filepath.Join(b.dir, "shop.yaml"))
			b.rest()
			b.want("bank/default STRICT", "shop/default STRICT")
			b.broken("shop.yaml", true, words)
			// The others go on, and so does the file once it is good again.
			b.write("aaa.yaml", pa("aaa", "default", "DISABLE"))
			b.rest()
			b.want("aaa/default DISABLE", "bank/default STRICT", "shop/default STRICT")
			b.remove("shop.yaml")
			b.write("shop.yaml", pa("shop", "default", "PERMISSIVE"))
			b.rest()
			b.want("aaa/default DISABLE", "bank/default STRICT", "shop/default PERMISSIVE")
			if all := b.k.broken(); len(all) != 0 {
				t.Errorf("broken: %v", all)
			}
		})
	}
}

func TestT10_V21_NeverGoodAtTheStartIsIncomplete(t *testing.T) {
	for name, spoil := range spoil() {
		if name == "taken" {
			continue // at the start nothing is
		}
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.write("bank.yaml", pa("bank", "default", "PERMISSIVE"))
			words := spoil(b, filepath.Join(b.dir, "shop.yaml"))
			b.rest()
			b.broken("shop.yaml", false, words)
			if b.k.complete {
				t.Error("the policies count as known")
			}
			b.remove("shop.yaml")
			b.rest()
			if !b.k.complete {
				t.Error("the policies count as unknown after the broken file was removed")
			}
			// From now on a new broken file cannot close what was open.
			spoil(b, filepath.Join(b.dir, "shop.yaml"))
			b.rest()
			b.want("bank/default PERMISSIVE")
			b.broken("shop.yaml", false, words)
			if !b.k.complete {
				t.Error("a new broken file has made known policies unknown")
			}
		})
	}
}

func TestT10_DirectoryGone(t *testing.T) {
	b := newBench(t)
	b.write("shop.yaml", pa("shop", "default", "STRICT"))
	b.rest()
	if err := os.Rename(b.dir, b.dir+".away"); err != nil {
		t.Fatal(err)
	}
	b.rest()
	b.want("shop/default STRICT")
	b.broken("policies", true, "no such file")
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b.rest()
	b.want("shop/default STRICT")
	b.broken("policies", true, "replaced by an empty directory")
	// It fills slowly; what has not come yet is not taken for removed.
	b.write("bank.yaml", pa("bank", "default", "DISABLE"))
	b.rest()
	b.want("bank/default DISABLE", "shop/default STRICT")
	b.pass(refill / 2)
	b.write("pay.yaml", pa("pay", "default", "DISABLE"))
	b.rest()
	b.pass(refill / 2)
	b.want("bank/default DISABLE", "pay/default DISABLE", "shop/default STRICT")
	b.pass(refill)
	b.want("bank/default DISABLE", "pay/default DISABLE")
	// From then on it is a directory like any other.
	b.remove("pay.yaml")
	b.rest()
	b.want("bank/default DISABLE")
}

func TestT10_MissingAtTheStart(t *testing.T) {
	k := &keeper{dir: filepath.Join(t.TempDir(), "missing")}
	if changed, _ := k.scan(time.Unix(1, 0)); !changed || k.complete || len(k.broken()) != 1 {
		t.Errorf("changed %v, complete %v, broken %v", changed, k.complete, k.broken())
	}
	if changed, _ := k.scan(time.Unix(2, 0)); changed {
		t.Error("the same error is new again")
	}
}

func TestEmptyDirectoryAndExplicitEmptyListAreKnown(t *testing.T) {
	b := newBench(t)
	b.pass(0)
	if b.want(); !b.k.complete {
		t.Error("an empty directory is not known")
	}
	b.write("all.yaml", "{apiVersion: v1, kind: List, items: []}")
	b.rest()
	if all := b.k.broken(); len(all) > 0 {
		t.Error(all)
	}
}

func TestT10_UnknownModeIsTakenAsStrict(t *testing.T) {
	b := newBench(t)
	b.write("shop.yaml", pa("shop", "default", "PARANOID"))
	b.rest()
	b.want("shop/default UNKNOWN")
	if m := policy.New(b.k.inForce, "root").Resolve("shop", nil).Mode; m != policy.Strict {
		t.Errorf("resolves to %v", m)
	}
	if w := b.k.files["shop.yaml"].warned; len(w) != 1 || !strings.Contains(w[0], "counts as STRICT") {
		t.Errorf("warnings %q", w)
	}
}

func TestHalfWrittenFileDoesNotCount(t *testing.T) {
	b := newBench(t)
	whole := pa("shop", "a", "STRICT") + pa("bank", "b", "STRICT")
	b.write("all.yaml", whole)
	b.rest()
	half := whole[:strings.Index(whole, "---\n")+4]
	b.write("all.yaml", half)
	b.pass(time.Second)
	b.want("bank/b STRICT", "shop/a STRICT")
	b.write("all.yaml", whole)
	b.pass(settle)
	b.pass(settle)
	b.want("bank/b STRICT", "shop/a STRICT")
	b.write("all.yaml", half)
	b.pass(time.Second)
	b.pass(settle)
	b.want("shop/a STRICT")
}

func TestRestlessFileIsTakenUpAnyway(t *testing.T) {
	b := newBench(t)
	b.rest()
	var seen []string
	for i := range 100 {
		b.write("shop.yaml", pa("shop", "default", []string{"STRICT", "DISABLE"}[i%2]))
		if b.pass(settle/2) && len(b.k.inForce) == 1 {
			seen = append(seen, b.k.inForce[0].Mode.String())
		}
	}
	if got, want := len(seen), int(100*(settle/2)/restless); got < want {
		t.Errorf("%d of 100 flips were taken up, want at least %d", got, want)
	}
}

func TestRemovedFileCountsOnlyOnceItStaysAway(t *testing.T) {
	b := newBench(t)
	b.write("shop.yaml", pa("shop", "default", "STRICT"))
	b.rest()
	b.remove("shop.yaml")
	b.pass(settle)
	b.pass(removal - settle)
	b.want("shop/default STRICT")
	b.write("shop.yaml", pa("shop", "default", "STRICT"))
	b.pass(removal)
	b.pass(removal)
	b.want("shop/default STRICT")
	b.remove("shop.yaml")
	b.rest()
	b.want()
}

func TestRenamedFileLeavesNoGap(t *testing.T) {
	b := newBench(t)
	b.write("a.yaml", pa("shop", "default", "STRICT"))
	b.rest()
	b.remove("a.yaml")
	b.write("b.yaml", pa("shop", "default", "DISABLE"))
	for range 10 {
		b.pass(settle)
		if len(b.k.inForce) != 1 {
			t.Fatalf("in force: %v", b.k.inForce)
		}
	}
	b.rest()
	b.want("shop/default DISABLE")
	// The first name comes back, and with it another opinion.
	b.write("a.yaml", pa("shop", "default", "STRICT"))
	b.rest()
	b.want("shop/default DISABLE")
	b.broken("a.yaml", false, `in "b.yaml" too`)
}

func TestConflictEndsWithTheOtherFile(t *testing.T) {
	b := newBench(t)
	b.write("a.yaml", pa("shop", "default", "STRICT"))
	b.write("copy.yaml", pa("shop", "default", "STRICT")) // the same is no conflict
	b.rest()
	b.want("shop/default STRICT")
	b.write("copy.yaml", pa("shop", "default", "DISABLE"))
	b.rest()
	b.want("shop/default STRICT")
	b.broken("copy.yaml", true, `in "a.yaml" too`)
	b.remove("a.yaml")
	b.rest()
	b.want("shop/default DISABLE")
}

func TestTooManyObjects(t *testing.T) {
	b := newBench(t)
	many := func(namespace string, n int) string {
		var text strings.Builder
		for i := range n {
			fmt.Fprintf(&text, "{apiVersion: v1, kind: X, metadata: {name: %s-%d}}\n---\n", namespace, i)
		}
		return text.String()
	}
	b.write("a.yaml", many("a", maxObjects/2)+pa("a", "a", "STRICT"))
	b.rest()
	b.write("b.yaml", many("b", maxObjects/2)+pa("b", "b", "STRICT"))
	b.rest()
	b.want("a/a STRICT")
	b.broken("b.yaml", false, "20002 objects, at most 20000")
}

func TestWhichFilesAreRead(t *testing.T) {
	b := newBench(t)
	for i, name := range []string{"a.yaml", "b.yml", "c.json", ".d.yaml", "e.yaml~", "f.txt", "g.yaml.bak"} {
		b.write(name, pa("shop", fmt.Sprint("p", i), "STRICT"))
	}
	b.rest()
	b.want("shop/p0 STRICT", "shop/p1 STRICT", "shop/p2 STRICT")
}

// TestConfigMapIsReplacedAtOnce is how the kubelet changes a projected volume:
// links lead through one that is swapped.
func TestConfigMapIsReplacedAtOnce(t *testing.T) {
	b := newBench(t)
	version := func(n int, mode string) {
		data := fmt.Sprintf("..data-%d", n)
		if err := os.Mkdir(filepath.Join(b.dir, data), 0o700); err != nil {
			t.Fatal(err)
		}
		b.write(data+"/a.yaml", pa("a", "a", mode))
		b.write(data+"/b.yaml", pa("b", "b", mode))
		if err := os.Symlink(data, filepath.Join(b.dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(b.dir, "..tmp"), filepath.Join(b.dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version(1, "STRICT")
	for _, name := range []string{"a.yaml", "b.yaml"} {
		if err := os.Symlink("..data/"+name, filepath.Join(b.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	b.rest()
	b.want("a/a STRICT", "b/b STRICT")
	version(2, "DISABLE")
	b.rest()
	b.want("a/a DISABLE", "b/b DISABLE")
}
