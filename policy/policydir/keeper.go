package policydir

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/meshca/meshca/identity/inputfile"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

const (
	maxFile    = 1 << 20
	maxObjects = 20_000
	maxFiles   = 20_000
	maxBytes   = 64 << 20

	// settle is how long a file must be the same before it counts: what is read in
	// the middle of a write may be good YAML with half of the policies.
	settle = 15 * time.Millisecond
	// restless is how long a file that never settles is waited for.
	restless = 200 * time.Millisecond
	// removal is how long a file must be away before its policies go. Many programs
	// replace a file by removing it first, and nothing must be open in between.
	removal = 200 * time.Millisecond
	// refill is how long a directory that took the place of another must have stood
	// still before what is missing from it counts: until then it may be filling.
	refill = 2 * time.Second
)

// keeper knows what each file of the directory last said, and what is in force. It
// is used by one goroutine.
type keeper struct {
	dir      string
	files    map[string]*file
	place    os.FileInfo // of the directory that the files were in
	replaced bool        // by another directory, which may not be filled yet
	stirred  time.Time   // when a file last came or changed
	problem  error       // with the directory as a whole
	complete bool        // every file of the directory has been good, at one time
	inForce  []policy.Policy
}

// file is one file of the directory.
type file struct {
	name    string
	seen    [sha256.Size]byte // what it held when it was last read
	since   time.Time         // since when it has held that
	waiting time.Time         // since when seen has not been judged; zero if it has
	absent  time.Time         // since when it has been away; zero if it is there

	good    []policy.Policy // in force
	objects int             // in the good content, policies or not
	ever    bool            // there has been a good content
	next    *content        // to come into force, when others allow it
	err     error           // why it has not
	warned  []string        // what there is to say about the good content
}

// content is what a file says.
type content struct {
	policies []policy.Policy
	objects  int
	warnings []string
}

// scan reads the directory. It returns whether what is in force, or what is wrong,
// has changed, and when to look again at what has not settled (zero: no need).
func (k *keeper) scan(now time.Time) (changed bool, again time.Duration) {
	names, err := k.list()
	if err != nil {
		changed = k.problem == nil || k.problem.Error() != err.Error()
		k.problem = err
		return changed, 0
	}
	changed, k.problem = k.problem != nil, nil
	if k.files == nil {
		k.files = make(map[string]*file)
		changed = true // the first
	}
	wait := func(d time.Duration) {
		if again == 0 || d < again {
			again = max(d, time.Millisecond)
		}
	}
	judge := changed
	total := 0
	for _, name := range names {
		f := k.files[name]
		if f == nil {
			f = &file{name: name, since: now, waiting: now}
			k.files[name] = f
			k.stirred = now
		}
		due, size := k.look(f, now, total)
		total += size
		judge = judge || due
		if !f.waiting.IsZero() {
			wait(settle)
		}
	}
	for name, f := range k.files {
		if _, there := slices.BinarySearch(names, name); there {
			continue
		}
		if f.absent.IsZero() {
			f.absent = now
		}
		if left := k.untilGone(f, now); left > 0 {
			wait(left)
			continue
		}
		delete(k.files, name)
		judge = true
	}
	if k.replaced && now.Sub(k.stirred) >= refill {
		k.replaced = false
	}
	if judge {
		k.judge()
	}
	return changed || judge, again
}

// list returns the files' names, if the directory may be believed.
func (k *keeper) list() ([]string, error) {
	place, err := os.Stat(k.dir)
	if err != nil {
		return nil, fmt.Errorf("reading the policies: %w", err)
	}
	names, err := List(k.dir)
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the policies: %w", err)
	case len(names) > maxFiles:
		return nil, fmt.Errorf("reading the policies: %q has %d files, at most %d", k.dir, len(names), maxFiles)
	case len(names) == 0 && len(k.files) > 0 && !os.SameFile(place, k.place):
		// A volume that is not mounted any more looks like this. Whoever means to
		// remove all policies removes the files.
		return nil, fmt.Errorf("reading the policies: %q has been replaced by an empty directory", k.dir)
	}
	if k.place != nil && !os.SameFile(place, k.place) {
		k.replaced = true
	}
	k.place = place
	return names, nil
}

// untilGone is how long a file that is away still has to be until its policies
// go.
func (k *keeper) untilGone(f *file, now time.Time) time.Duration {
	if k.replaced {
		return refill - now.Sub(latest(f.absent, k.stirred))
	}
	return removal - now.Sub(f.absent)
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// look reads a file. It returns whether there is something new to judge, and the
// size.
func (k *keeper) look(f *file, now time.Time, total int) (due bool, size int) {
	data, err := inputfile.Read(filepath.Join(k.dir, f.name), maxFile)
	if err == nil && total+len(data) > maxBytes {
		err = fmt.Errorf("all files together have more than %d bytes", maxBytes)
	}
	seen := sha256.Sum256(data)
	if err != nil {
		seen = sha256.Sum256([]byte("\x00" + err.Error())) // no content begins so
	}
	if seen != f.seen || !f.absent.IsZero() && f.waiting.IsZero() {
		f.seen, f.since = seen, now
		k.stirred = now
		if f.waiting.IsZero() {
			f.waiting = now
		}
	}
	if f.waiting.IsZero() || now.Sub(f.since) < settle && now.Sub(f.waiting) < restless {
		return false, len(data)
	}
	f.waiting, f.absent = time.Time{}, time.Time{}
	var next *content
	if err == nil {
		next, err = read(data)
	}
	f.next, f.err = next, err
	return true, len(data)
}

// read parses and judges a file as a whole: one bad policy in it, and all that the
// file said before stays.
func read(data []byte) (*content, error) {
	c, err := manifest.Parse(data, maxObjects)
	if err != nil {
		return nil, err
	}
	if c.Objects == 0 && c.Lists == 0 {
		// A file that is being written is empty for a moment.
		return nil, errors.New("it holds no object; remove the file to remove its policies")
	}
	next := &content{objects: c.Objects}
	for _, p := range c.Policies {
		for _, problem := range p.Problems {
			text := fmt.Sprintf("line %d: %s: %s: %s", problem.Line, p.Ref, problem.Code, problem.Text)
			if problem.Verdict > manifest.Newer {
				return nil, errors.New(text)
			}
			next.warnings = append(next.warnings, text)
		}
		next.policies = append(next.policies, p.Policy)
	}
	for _, kind := range slices.Sorted(maps.Keys(c.Others)) {
		next.warnings = append(next.warnings, fmt.Sprintf("%d objects of kind %q are not read", c.Others[kind], kind))
	}
	return next, nil
}

// judge brings into force what can be. Two files that say different things about
// one policy are refused, the one that changed: it keeps what it said before.
func (k *keeper) judge() {
	byName := slices.SortedFunc(maps.Values(k.files), func(a, b *file) int { return cmp.Compare(a.name, b.name) })
	c := claims{owner: make(map[policy.Ref]claim)}
	for _, f := range byName {
		if f.next == nil && f.absent.IsZero() {
			c.take(f)
		}
	}
	for _, f := range byName {
		if f.next == nil || !f.absent.IsZero() {
			continue
		}
		if f.err = c.refuse(f.next); f.err == nil {
			f.good, f.objects, f.warned, f.ever, f.next = f.next.policies, f.next.objects, f.next.warnings, true, nil
		}
		c.take(f)
	}
	for _, f := range byName {
		if !f.absent.IsZero() {
			c.take(f) // what others have not taken over
		}
	}
	if !k.complete {
		k.complete = !slices.ContainsFunc(byName, func(f *file) bool { return !f.ever })
	}
	k.inForce = make([]policy.Policy, 0, len(c.owner))
	for _, claim := range c.owner {
		k.inForce = append(k.inForce, claim.policy)
	}
	slices.SortFunc(k.inForce, policy.Compare)
}

// claims are the policies that files have brought in.
type claims struct {
	owner   map[policy.Ref]claim
	objects int
}

type claim struct {
	policy policy.Policy
	file   string
}

// take claims for a file what is good in it, as far as it is free.
func (c *claims) take(f *file) {
	c.objects += f.objects
	for _, p := range f.good {
		if _, taken := c.owner[p.Ref]; !taken {
			c.owner[p.Ref] = claim{p, f.name}
		}
	}
}

func (c *claims) refuse(next *content) error {
	if c.objects+next.objects > maxObjects {
		return fmt.Errorf("with it there are %d objects, at most %d", c.objects+next.objects, maxObjects)
	}
	own := make(map[policy.Ref]policy.Policy, len(next.policies))
	for _, p := range next.policies {
		if other, twice := own[p.Ref]; twice && !same(p, other) {
			return fmt.Errorf("it has two policies %s that differ", p.Ref)
		}
		own[p.Ref] = p
		if other, taken := c.owner[p.Ref]; taken && !same(p, other.policy) {
			return fmt.Errorf("policy %s is in %q too, and they differ", p.Ref, other.file)
		}
	}
	return nil
}

func same(a, b policy.Policy) bool {
	return a.Ref == b.Ref && a.Created.Equal(b.Created) && a.Mode == b.Mode && maps.Equal(a.Selector, b.Selector) && maps.Equal(a.Ports, b.Ports)
}

// broken are the files that something is wrong with, by name, and the directory.
func (k *keeper) broken() []*FileError {
	var all []*FileError
	if k.problem != nil {
		all = append(all, &FileError{k.dir, k.files != nil, k.problem})
	}
	for _, name := range slices.Sorted(maps.Keys(k.files)) {
		if f := k.files[name]; f.err != nil {
			all = append(all, &FileError{filepath.Join(k.dir, name), f.ever, f.err})
		}
	}
	return all
}
