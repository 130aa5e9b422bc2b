package filepolicy

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/policydir"
)

// labelsInterval is how often the file of labels is read. It counts once it was
// the same twice, so that half of a list never does.
const labelsInterval = 200 * time.Millisecond

// maxTold bounds the workloads without labels that are remembered as told. Beyond
// it all are forgotten, and told once more.
const maxTold = 1024

// Config is what [New] takes.
type Config struct {
	Policies   *policydir.Source // required; whoever made it runs it
	LabelsFile string            // empty: no workload's labels are known
	Log        *slog.Logger      // required
}

// Source resolves policies for workloads. Its methods are safe for concurrent use.
// Use [New], then [Source.Run].
type Source struct {
	conf Config

	mu      sync.Mutex // never held while logging
	now     state
	changed chan struct{} // closed when now becomes another
	told    map[identity.ID]struct{}

	// Owned by Run.
	labels labelsFile
}

// state is what decides at one time. It is immutable.
type state struct {
	version uint64
	set     *policy.Set // nil: not known
	labels  labelled
}

// New makes a source that knows nothing before Run.
func New(c Config) (*Source, error) {
	if c.Policies == nil || c.Log == nil {
		return nil, errors.New("policies from files: Policies and Log must both be given")
	}
	return &Source{
		conf: c, changed: make(chan struct{}), told: make(map[identity.ID]struct{}),
		labels: labelsFile{path: c.LabelsFile, log: c.Log},
	}, nil
}

// Policy returns what holds for a caller's workload, nil while the policies or the
// labels are not known, and a channel that is closed when that may have become
// another.
func (s *Source) Policy(who *caller.Caller) (*policy.Resolved, <-chan struct{}) {
	r, changed, unlabelled := s.resolve(who.ID())
	if unlabelled {
		s.tell(who.ID())
	}
	return r, changed
}

func (s *Source) resolve(id identity.ID) (r *policy.Resolved, changed <-chan struct{}, unlabelled bool) {
	s.mu.Lock()
	now, changed := s.now, s.changed
	s.mu.Unlock()
	namespace, account, ok := id.Workload()
	if now.set.Closed() != "" || !ok {
		return nil, changed, false
	}
	labels, known := now.labels[workload{namespace, account}]
	if known {
		return &policy.Resolved{Version: now.version, Result: now.set.Resolve(namespace, labels)}, changed, false
	}
	return &policy.Resolved{Version: now.version, Result: now.set.ResolveUnlabelled(namespace)}, changed, now.set.Selects(namespace)
}

// tell says, once for each workload, that its labels are missing.
func (s *Source) tell(id identity.ID) {
	s.mu.Lock()
	_, said := s.told[id]
	if !said {
		if len(s.told) == maxTold {
			clear(s.told)
		}
		s.told[id] = struct{}{}
	}
	s.mu.Unlock()
	if said {
		return
	}
	s.conf.Log.Warn("a workload's labels are not known, and a policy of its namespace selects by labels: its ports are STRICT; name the workload in the file of --workload-labels",
		"spiffe_id", id.String(), "file", s.conf.LabelsFile)
}

// Run follows the files until ctx ends.
func (s *Source) Run(ctx context.Context) error {
	ticker := time.NewTicker(labelsInterval)
	defer ticker.Stop()
	for {
		snapshot, changed := s.conf.Policies.Snapshot()
		s.labels.look()
		s.publish(snapshot)
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-ticker.C:
		}
	}
}

// publish puts in force what the files say now, if that is anything new. Nothing
// is known before both are.
func (s *Source) publish(snapshot *policydir.Snapshot) {
	if snapshot.Set.Closed() != "" || s.conf.LabelsFile != "" && s.labels.good == nil {
		return // what was in force stays; before that, nothing is known
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	same := s.now.set == snapshot.Set && s.labels.generation == s.labels.published
	if same {
		return
	}
	s.labels.published = s.labels.generation
	// One number for both files, which a restarted CA finds again, and which rises
	// even if a file system's clock does not.
	version := max(s.now.version+1, nanoseconds(snapshot.Changed), nanoseconds(s.labels.changed))
	s.now = state{version: version, set: snapshot.Set, labels: s.labels.good}
	close(s.changed)
	s.changed = make(chan struct{})
}

func nanoseconds(t time.Time) uint64 {
	if t.IsZero() || t.UnixNano() < 0 {
		return 0
	}
	return uint64(t.UnixNano())
}

// labelsFile follows the file of labels. One goroutine uses it.
type labelsFile struct {
	path string
	log  *slog.Logger

	seen    [sha256.Size]byte // what it held when it was last read, or why it could not be
	settled bool              // seen has been judged
	said    string            // the last problem that is in the log

	good       labelled  // nil before there was a good one
	changed    time.Time // when the good content was written
	generation int       // rises with good
	published  int       // the generation in force
}

// look reads the file. A mistake in it, or its absence, keeps what it said before.
func (f *labelsFile) look() {
	if f.path == "" {
		return
	}
	data, changed, err := policydir.ReadFile(f.path, maxLabelsFile)
	seen := sha256.Sum256(data)
	if err != nil {
		seen = sha256.Sum256([]byte("\x00" + err.Error())) // no content begins so
	}
	if seen != f.seen {
		f.seen, f.settled = seen, false
		if f.good != nil {
			return // until it is the same again
		}
	}
	if f.settled {
		return
	}
	f.settled = true
	var next labelled
	if err == nil {
		next, err = parseLabels(data)
	}
	if err != nil {
		f.report(err)
		return
	}
	f.good, f.changed, f.said = next, changed, ""
	f.generation++
	f.log.Info("labels of workloads", "file", f.path, "workloads", len(next))
}

func (f *labelsFile) report(err error) {
	if err.Error() == f.said {
		return
	}
	f.said = err.Error()
	if f.good == nil {
		f.log.Error("the labels of workloads cannot be read; no policy is handed out until they can", "file", f.path, "error", err)
		return
	}
	f.log.Error("the labels of workloads cannot be read; those that were read before stay in force", "file", f.path, "error", err)
}
