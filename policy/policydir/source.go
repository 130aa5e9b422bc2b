package policydir

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/policy"
)

// maxPoll bounds how long a change can go unseen where watching does not work.
const (
	defaultPoll = 600 * time.Millisecond
	maxPoll     = time.Second
)

// Config is what a [Source] needs.
type Config struct {
	// Dir holds the files, see [List]. It need not exist yet.
	Dir string
	// RootNamespace is the one whose policies are for the whole mesh.
	RootNamespace string
	// Poll is how often all files are read even if no change was announced, 600 ms if
	// zero, at most 1 s.
	Poll time.Duration
	// Now is time.Now if nil.
	Now func() time.Time
	// Log, if not nil, is told what came into force and what is wrong with a file,
	// once each.
	Log *slog.Logger
	// Metrics, if not nil, gets the metrics of this source.
	Metrics prometheus.Registerer

	noWatch bool // for tests of polling
}

// Snapshot is what was in force at one time. It is immutable.
type Snapshot struct {
	// Version is 0 before the directory has been read, and rises with each snapshot
	// of this process. It means nothing to another process.
	Version uint64
	// Set decides. It is never nil to a caller's harm: a nil Set decides STRICT.
	Set *policy.Set
	// Policies are those in the Set, sorted by [policy.Compare].
	Policies []policy.Policy
	// Files counts the files that there are, whatever is in them.
	Files int
	// Broken are the files whose content is not in force, and the directory itself
	// if it could not be read.
	Broken []*FileError
}

// FileError says why a file's content is not in force.
type FileError struct {
	File string
	// Kept is true if what the file said before stays in force.
	Kept bool
	Err  error
}

func (e *FileError) Error() string {
	if e.Kept {
		return fmt.Sprintf("policy file %q: %v; what it said before stays in force", e.File, e.Err)
	}
	return fmt.Sprintf("policy file %q: %v; nothing of it is in force", e.File, e.Err)
}

func (e *FileError) Unwrap() error { return e.Err }

// Source follows a directory. Its methods may be called by any goroutine.
type Source struct {
	c       Config
	metrics metrics

	mu       sync.Mutex
	snapshot *Snapshot
	changed  chan struct{} // closed when snapshot is replaced

	// Owned by Run.
	keeper keeper
	told   map[string]string // by file, the error or warnings that are in the log
}

// New makes a Source. It reads nothing before Run.
func New(c Config) (*Source, error) {
	switch {
	case c.Dir == "":
		return nil, errors.New("policy directory: no path is given")
	case c.RootNamespace == "":
		return nil, errors.New("policy directory: no root namespace is given")
	case c.Poll < 0 || c.Poll > maxPoll:
		return nil, fmt.Errorf("policy directory: polling every %v; at most %v", c.Poll, maxPoll)
	}
	c.Poll = cmp.Or(c.Poll, defaultPoll)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Source{c: c, snapshot: new(Snapshot), changed: make(chan struct{}), keeper: keeper{dir: c.Dir}, told: make(map[string]string)}
	if err := s.metrics.register(c.Metrics); err != nil {
		return nil, fmt.Errorf("policy directory: %w", err)
	}
	return s, nil
}

// RootNamespace returns the one that the Source was made with.
func (s *Source) RootNamespace() string { return s.c.RootNamespace }

// Snapshot returns what is in force, never nil, and a channel that is closed when
// there is a newer snapshot.
func (s *Source) Snapshot() (*Snapshot, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snapshot, s.changed
}

// Run follows the directory until ctx ends.
func (s *Source) Run(ctx context.Context) error {
	var w *Watcher
	watch := func() {}
	if !s.c.noWatch {
		var err error
		if w, err = NewWatcher(); err != nil {
			s.c.Log.Warn("policy changes are found by polling only", "error", err, "every", s.c.Poll)
		} else {
			defer w.Close()
			watch = s.follow(w)
		}
	}
	w.Follow(ctx, settle, func() time.Duration {
		watch() // before reading, so that no change falls between the two
		changed, again := s.keeper.scan(s.c.Now())
		if changed {
			s.publish()
		}
		return min(s.c.Poll, cmp.Or(again, s.c.Poll))
	})
	return nil
}

// follow returns a function that has the watcher watch the directory that has the
// path now. It asks again each time: only the kernel knows whether a new directory
// has come in the place, and the number, of the old.
func (s *Source) follow(w *Watcher) func() {
	said := ""
	return func() {
		err := w.Add(s.c.Dir)
		if err == nil {
			said = ""
		} else if err.Error() != said {
			said = err.Error()
			s.c.Log.Warn("policy changes are found by polling only", "error", err, "every", s.c.Poll)
		}
	}
}

// publish makes a snapshot of what the keeper holds.
func (s *Source) publish() {
	broken := s.keeper.broken()
	if !s.keeper.complete && len(broken) == 0 {
		return // still settling for the first time
	}
	next := &Snapshot{Version: s.snapshot.Version + 1, Policies: s.keeper.inForce, Files: len(s.keeper.files), Broken: broken}
	if s.keeper.complete {
		next.Set = policy.New(next.Policies, s.c.RootNamespace)
	} else {
		next.Policies = nil
		next.Set = policy.Closed(broken[0].Error())
	}
	s.mu.Lock()
	s.snapshot = next
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	s.metrics.published(next)
	s.report(next)
}

// report logs what has come into force, and each new thing that is wrong.
func (s *Source) report(snapshot *Snapshot) {
	now := make(map[string]string)
	for _, e := range snapshot.Broken {
		now[e.File] = e.Error()
		if s.told[e.File] == now[e.File] {
			continue
		}
		what := "a policy file is not in force"
		if e.File == s.c.Dir {
			what = "the directory of policies cannot be used"
		}
		if e.Kept {
			what += "; what it said before stays"
		}
		s.c.Log.Error(what, "file", e.File, "error", e.Err)
	}
	for name, f := range s.keeper.files {
		if f.err != nil {
			continue
		}
		for _, w := range f.warned {
			now[name] += w + "\n"
		}
		if now[name] != "" && s.told[name] != now[name] {
			s.c.Log.Warn("a policy file is not taken as it is written", "file", filepath.Join(s.c.Dir, name), "warnings", f.warned)
		}
	}
	s.told = now
	if snapshot.Set.Closed() == "" { // otherwise whoever hands policies out says what that means
		s.c.Log.Info("policies read", "policies", len(snapshot.Policies), "files", snapshot.Files, "broken_files", len(snapshot.Broken))
	}
}

type metrics struct{ version, policies, broken, closed prometheus.Gauge }

func (m *metrics) register(r prometheus.Registerer) error {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m.version = gauge("meshca_policy_snapshot_version", "How often the policies have been read anew in this process; agents are sent meshca_policy_version.")
	m.policies = gauge("meshca_policy_policies", "PeerAuthentications in force.")
	m.broken = gauge("meshca_policy_broken_files", "Policy files whose content is not in force.")
	m.closed = gauge("meshca_policy_closed", "1 while the directory of policies has not been read whole: running proxies keep what they have, new ones are STRICT.")
	m.closed.Set(1)
	if r == nil {
		return nil
	}
	for _, c := range []prometheus.Collector{m.version, m.policies, m.broken, m.closed} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}

func (m *metrics) published(s *Snapshot) {
	m.version.Set(float64(s.Version))
	m.policies.Set(float64(len(s.Policies)))
	m.broken.Set(float64(len(s.Broken)))
	m.closed.Set(0)
	if s.Set.Closed() != "" {
		m.closed.Set(1)
	}
}
