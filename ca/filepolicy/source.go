package filepolicy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/inputfile"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/policydir"
)

const (
	// labelsInterval is how often the file of labels is read. It counts once it was
	// the same twice, so that half of a list never does.
	labelsInterval = 200 * time.Millisecond
	labelsSettle   = 20 * time.Millisecond
	// together is how long changes are gathered after one came into force: whoever
	// writes a hundred files makes a few versions of it.
	together = 100 * time.Millisecond
	// quiet is how long files that are not those of the last process must stay the
	// same before they count: they may be on their way.
	quiet = time.Second
)

// maxTold bounds the workloads without labels that are remembered as told.
// Beyond it nobody is told of any more.
const maxTold = 20_000

// Config is what [New] takes. Everything is required but LabelsFile.
type Config struct {
	Policies   *policydir.Source // whoever made it runs it
	LabelsFile string            // empty: no workload's labels are known
	// Record is the file that keeps the version. Processes whose policies are the
	// same may share it.
	Record  string
	Now     func() time.Time
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Source resolves policies for workloads. Its methods are safe for concurrent use.
// Use [New], then [Source.Run].
type Source struct {
	conf   Config
	record record

	mu      sync.Mutex // never held while logging
	now     state
	changed chan struct{} // closed when now becomes another
	told    map[identity.ID]struct{}

	// Owned by Run.
	labels    labelsFile
	since     time.Time // when now came into force
	candidate string    // content that waits until it was quiet
	stood     time.Time // since when
	said      string    // the last reason that is in the log
}

// state is what decides at one time. It is immutable.
type state struct {
	version uint64 // 0: the policies are not known
	set     *policy.Set
	labels  labelled
	from    generation
	tried   bool // the files have been looked at
}

// generation says which reading of the files a state is made from.
type generation struct {
	snapshot uint64
	labels   int
}

// New makes a source that knows nothing before Run.
func New(c Config) (*Source, error) {
	if c.Policies == nil || c.Record == "" || c.Now == nil || c.Log == nil || c.Metrics == nil {
		return nil, errors.New("policies from files: Policies, Record, Now, Log and Metrics must all be given")
	}
	s := &Source{
		conf: c, record: record{c.Record}, changed: make(chan struct{}), told: make(map[identity.ID]struct{}),
		labels: labelsFile{path: c.LabelsFile, log: c.Log},
	}
	gauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "meshca_policy_version",
		Help: "Version of the policies that agents are sent; 0 while they are not known.",
	}, func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(s.now.version)
	})
	if err := c.Metrics.Register(gauge); err != nil {
		return nil, fmt.Errorf("policies from files: registering metrics: %w", err)
	}
	return s, nil
}

// Policy returns what holds for a workload, and a channel that is closed
// when that may have become another. The policy is nil before the files have been
// looked at; if they could not be read it is [policy.Unresolved].
func (s *Source) Policy(of caller.Subject) (*policy.Resolved, <-chan struct{}) {
	r, changed, unlabelled := s.resolve(of.ID)
	if unlabelled {
		s.tell(of.ID)
	}
	return r, changed
}

func (s *Source) resolve(id identity.ID) (r *policy.Resolved, changed <-chan struct{}, unlabelled bool) {
	s.mu.Lock()
	now, changed := s.now, s.changed
	s.mu.Unlock()
	namespace, account, ok := id.Workload()
	switch {
	case !now.tried || !ok:
		return nil, changed, false
	case now.version == 0:
		unresolved := policy.Unresolved()
		return &unresolved, changed, false
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
	if full := len(s.told) == maxTold; !said && !full {
		s.told[id] = struct{}{}
	} else {
		said = true
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
	timer := time.NewTimer(0)
	defer timer.Stop()
	var changed <-chan struct{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-timer.C:
		}
		var snapshot *policydir.Snapshot
		snapshot, changed = s.conf.Policies.Snapshot()
		unsettled := s.labels.look()
		wait := cmp.Or(unsettled, labelsInterval)
		if unsettled == 0 || s.labels.good != nil { // labels on their way hold up no policy
			wait = min(wait, cmp.Or(s.look(snapshot, time.Now()), labelsInterval))
		}
		timer.Reset(wait)
	}
}

// look puts in force what the files say, if that is something new and may count
// already. It returns when to look again at what may not; zero for no need. The
// instants are of the monotonic clock.
func (s *Source) look(snapshot *policydir.Snapshot, now time.Time) (again time.Duration) {
	from := generation{snapshot.Version, s.labels.generation}
	switch why := s.unknown(snapshot); {
	case snapshot.Version == 0 && why != "":
		return 0 // nobody has looked yet
	case why != "":
		s.notKnown(why)
		return 0
	case s.now.version != 0 && from == s.now.from:
		return 0
	case !s.since.IsZero() && now.Sub(s.since) < together:
		return together - now.Sub(s.since)
	}
	content, err := s.content(snapshot)
	if err != nil {
		s.notKnown(err.Error())
		return 0
	}
	if s.now.version == 0 {
		if wait := s.mistrust(snapshot, content, now); wait != 0 {
			return wait
		}
	}
	version, err := s.record.next(content, len(snapshot.Policies), s.now.version, s.conf.Now())
	if err != nil {
		s.conf.Log.Error("the policies' version cannot be remembered, and may not be found again after a restart; make the state directory writable for meshca", "file", s.record.path, "error", err)
	}
	s.publish(state{version: version, set: snapshot.Set, labels: s.labels.good, from: from, tried: true})
	s.since = now
	s.conf.Log.Info("policies are handed out", "version", version, "policies", len(snapshot.Policies), "labelled_workloads", len(s.labels.good))
	return 0
}

// unknown returns why the files do not say what holds; "" if they do.
func (s *Source) unknown(snapshot *policydir.Snapshot) string {
	switch {
	case snapshot.Set.Closed() != "":
		return snapshot.Set.Closed()
	case s.conf.LabelsFile != "" && s.labels.good == nil:
		return fmt.Sprintf("the labels of workloads cannot be read from %q", s.conf.LabelsFile)
	}
	return ""
}

// mistrust judges the first content of this process by that of the last one. It
// returns how long to wait for a content that may not count yet; zero if it may.
func (s *Source) mistrust(snapshot *policydir.Snapshot, content string, now time.Time) time.Duration {
	last, err := s.record.load()
	if err != nil {
		s.conf.Log.Error("which policies held last is not known", "error", err)
	}
	switch {
	case last.Version == 0 || last.Content == content:
		return 0
	case snapshot.Files == 0 && last.Policies > 0:
		// A volume that is not mounted, or not filled yet, looks like this.
		s.notKnown(fmt.Sprintf("the directory of policies is empty, and when the last process ended it held %d; to mean that there are none, put a file with \"{apiVersion: v1, kind: List, items: []}\" into it", last.Policies))
		return labelsInterval
	case content != s.candidate:
		s.candidate, s.stood = content, now
	}
	return max(0, quiet-now.Sub(s.stood))
}

// notKnown lets those who never had a policy have STRICT. What was in force stays.
func (s *Source) notKnown(why string) {
	if s.now.version != 0 {
		return
	}
	if !s.now.tried {
		s.publish(state{tried: true})
	}
	if why != s.said {
		s.said = why
		s.conf.Log.Error("the policies are not known: workloads keep what they have, and those that never had a policy are STRICT", "reason", why)
	}
}

// publish puts a state in force. Only Run's goroutine writes it.
func (s *Source) publish(next state) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = next
	close(s.changed)
	s.changed = make(chan struct{})
}

// content is a fingerprint of all that decides.
func (s *Source) content(snapshot *policydir.Snapshot) (string, error) {
	labels := make(map[string]map[string]string, len(s.labels.good))
	for w, l := range s.labels.good {
		labels[w.namespace+"/"+w.account] = l
	}
	all, err := json.Marshal(struct {
		Revision int
		Root     string
		Policies []policy.Policy
		Labelled bool
		Labels   map[string]map[string]string
	}{policy.Revision, s.conf.Policies.RootNamespace(), snapshot.Policies, s.conf.LabelsFile != "", labels})
	if err != nil {
		return "", fmt.Errorf("taking the policies' fingerprint: %w", err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(all)), nil
}

// labelsFile follows the file of labels. One goroutine uses it.
type labelsFile struct {
	path string
	log  *slog.Logger

	seen    [sha256.Size]byte // what it held when it was last read, or why it could not be
	settled bool              // seen has been judged
	said    string            // the last problem that is in the log

	good       labelled // nil before there was a good one
	generation int      // rises with good
}

// look reads the file. A mistake in it, or its absence, keeps what it said before.
// Until it was the same twice, look returns when to read it again.
func (f *labelsFile) look() (again time.Duration) {
	if f.path == "" {
		return 0
	}
	data, err := inputfile.Read(f.path, maxLabelsFile)
	seen := sha256.Sum256(data)
	if err != nil {
		seen = sha256.Sum256([]byte("\x00" + err.Error())) // no content begins so
	}
	if seen != f.seen {
		f.seen, f.settled = seen, false
		return labelsSettle
	}
	if f.settled {
		return 0
	}
	f.settled = true
	var next labelled
	if err == nil {
		next, err = parseLabels(data)
	}
	if err != nil {
		f.report(err)
		return 0
	}
	f.good, f.said = next, ""
	f.generation++
	f.log.Info("labels of workloads", "file", f.path, "workloads", len(next))
	return 0
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
