package files

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/inputfile"
	"github.com/meshca/meshca/policy/policydir"
)

const (
	// defaultPoll is how often the files are read though nothing told of a change:
	// watching loses changes, and on some filesystems never tells of any.
	defaultPoll = 3 * time.Second
	// settle is for how long the files must have stayed the same before they are
	// judged: whoever copies four of them is not done after the first.
	settle = 500 * time.Millisecond
	// firstReads bounds how often the first set is read in search of two that are equal.
	firstReads = 20

	// An operator is warned when this much is left of an authority's life, or a tenth
	// of it if that is less.
	warnBefore = 30 * 24 * time.Hour
)

// Config is what [New] makes an Upstream from.
type Config struct {
	Dir         string               // required
	TrustDomain identity.TrustDomain // required
	Layout      Layout               // empty means LayoutAuto
	// Judge says whether the mesh can go over to a chain that ends in anchor, with
	// these roots to believe; see [ca.RootKeeper]. An error refuses the set for now: it
	// is asked again at each look. nil means that it always can.
	Judge   func(anchor *x509.Certificate, roots []*x509.Certificate) error
	Now     func() time.Time      // nil means time.Now
	Log     *slog.Logger          // nil means no log
	Metrics prometheus.Registerer // nil means none

	noWatch  bool          // for tests of polling
	poll     time.Duration // for tests of watching; zero means defaultPoll
	readFile fileReader    // for tests of what happens between two files; nil means the real one
}

// Upstream is the authority in an operator's files. Its methods are safe for
// concurrent use.
type Upstream struct {
	conf    Config
	metrics metrics

	mu      sync.Mutex // guards what follows
	inForce *set
	since   time.Time
	trouble error         // why what lies there now is not used; nil if it is
	changed chan struct{} // closed when inForce is replaced

	// Run's own, and New's before it.
	sum  [sha256.Size]byte // of inForce
	seen string            // what the last look saw
	told string            // the trouble or state that is in the log
}

// New reads the first set, and fails if it cannot be used: there is none before it that
// could go on. Error: [*Error], or what Judge says.
func New(c Config) (*Upstream, error) {
	if c.Dir == "" || c.TrustDomain.IsZero() {
		return nil, errors.New("CA files: Dir and TrustDomain must both be given")
	}
	if _, ok := layouts[c.Layout]; !ok && c.Layout != "" && c.Layout != LayoutAuto {
		return nil, fmt.Errorf("CA files: layout %q is unknown; there are %q, %q and %q", c.Layout, LayoutAuto, LayoutCACerts, LayoutTLS)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.readFile == nil {
		c.readFile = inputfile.ReadWithMode
	}
	c.poll = cmp.Or(c.poll, defaultPoll)
	u := &Upstream{conf: c, changed: make(chan struct{})}
	found, err := u.first()
	if err != nil {
		return nil, err
	}
	defer clear(found.keyPEM)
	next, err := u.judge(found)
	if err != nil {
		return nil, err
	}
	if err := u.metrics.register(c.Metrics); err != nil {
		return nil, fmt.Errorf("CA files: %w", err)
	}
	u.use(next, found.sum)
	u.report()
	return u, nil
}

// first reads until two readings are the same.
func (u *Upstream) first() (*contents, error) {
	for range firstReads {
		found, err := read(u.conf.Dir, u.conf.Layout, u.conf.readFile)
		is := sight(found, err)
		if is == u.seen {
			return found, err
		}
		u.seen = is
	}
	return nil, &Error{File: u.conf.Dir, Reason: "the files in it change while they are read", Do: "start again when they are in place"}
}

// sight describes what a reading has found, to tell whether another found the same.
func sight(found *contents, err error) string {
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%x", found.sum)
}

// Run follows the files until ctx ends, and returns nil then. It must be called once.
func (u *Upstream) Run(ctx context.Context) error {
	var w *policydir.Watcher
	if !u.conf.noWatch {
		var err error
		if w, err = policydir.NewWatcher(); err != nil {
			u.conf.Log.Warn("changes of the CA's files are found by polling only", "error", err, "every", u.conf.poll)
		} else {
			defer w.Close()
		}
	}
	w.Follow(ctx, settle, func() time.Duration {
		if w != nil {
			// Before reading, so that no change falls between the two. Whether there is a
			// directory at the path is for the reading to say.
			_ = w.Add(u.conf.Dir)
		}
		if !u.look() {
			return settle
		}
		return u.conf.poll
	})
	return nil
}

// look reads the files once, and reports whether they were as at the look before. Only
// then anything follows from them.
func (u *Upstream) look() (settled bool) {
	found, err := read(u.conf.Dir, u.conf.Layout, u.conf.readFile)
	if err == nil {
		defer clear(found.keyPEM)
	}
	if is := sight(found, err); is != u.seen {
		u.seen = is
		return false
	}
	result := StateOK
	switch {
	case errors.Is(err, fs.ErrNotExist):
		result = StateMissing
	case err != nil:
		result = StateRefused
	case found.sum != u.sum:
		var next *set
		if next, err = u.judge(found); err != nil {
			result = StateRefused
			break
		}
		u.use(next, found.sum)
	}
	u.mu.Lock()
	u.trouble = err
	u.mu.Unlock()
	u.metrics.looks.WithLabelValues(result).Inc()
	u.report()
	return true
}

// judge makes a set of what was read, or says why it is not used.
func (u *Upstream) judge(found *contents) (*set, error) {
	m, err := found.parse()
	if err != nil {
		return nil, err
	}
	next, err := newSet(m, u.conf.TrustDomain, u.conf.Now())
	if err != nil {
		return nil, err
	}
	if u.conf.Judge != nil {
		if err := u.conf.Judge(next.anchor(), slices.Clone(next.roots)); err != nil {
			return nil, &Error{File: found.roots, Reason: err.Error(), Err: err}
		}
	}
	return next, nil
}

// use puts a set into force.
func (u *Upstream) use(next *set, sum [sha256.Size]byte) {
	u.mu.Lock()
	u.inForce, u.since, u.sum = next, u.conf.Now(), sum
	close(u.changed)
	u.changed = make(chan struct{})
	u.mu.Unlock()
	u.conf.Log.Info("CA read from files", "ca", next.cert().Subject.String(), "authority", fmt.Sprintf("%x", next.cert().SubjectKeyId),
		"root", next.anchor().Subject.String(), "roots", len(next.roots), "signs_leaves", next.limit != nil, "ends", next.end.NotAfter)
	for _, n := range next.notes {
		u.conf.Log.Warn(n)
	}
}

// report shows the state in metrics, and logs what is new.
func (u *Upstream) report() {
	r := u.Report()
	u.mu.Lock()
	end := u.inForce.end.NotAfter
	u.mu.Unlock()
	u.metrics.show(r.State, end)
	is := r.Detail
	if is == u.told {
		return
	}
	u.told = is
	switch r.State {
	case StateOK:
		u.conf.Log.Info("the CA's files are in order again")
	case StateExpiring:
		u.conf.Log.Warn("the CA's files", "state", r.State, "detail", r.Detail)
	default:
		u.conf.Log.Error("the CA's files", "state", r.State, "detail", r.Detail)
	}
}

// Changed implements [ca.Changer].
func (u *Upstream) Changed() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.changed
}

// SignIntermediate implements [ca.Upstream], by the set in force. It counts no
// versions of its roots: [ca.Signed.Sequence] stays zero.
//
// Errors: [*ExpiredError], [*ca.KeyError], or that the request makes no sense.
func (u *Upstream) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if req.TrustDomain != u.conf.TrustDomain {
		return nil, fmt.Errorf("signing an intermediate for trust domain %q: the CA's files are for %q", req.TrustDomain, u.conf.TrustDomain)
	}
	u.mu.Lock()
	s := u.inForce
	u.mu.Unlock()
	return s.sign(ctx, req, u.conf.Now())
}

// Report implements [ca.Reporter].
func (u *Upstream) Report() ca.Report {
	u.mu.Lock()
	s, since, trouble := u.inForce, u.since, u.trouble
	u.mu.Unlock()
	now := u.conf.Now()
	left := s.end.NotAfter.Sub(now)
	r := ca.Report{Kind: "files", State: StateOK, Notes: slices.Clone(s.notes)}
	expired := &ExpiredError{File: s.fileOf(s.end), End: s.end.NotAfter}
	goesOn := fmt.Sprintf("; the CA read at %s goes on, good until %s, but a replica that is restarted would be without", stamp(since), stamp(s.end.NotAfter))
	switch {
	case left <= 0:
		r.State, r.Detail, r.Away = StateExpired, expired.Error(), true
		if trouble != nil {
			r.Detail += "; what lies there now is not used: " + trouble.Error()
		}
	case errors.Is(trouble, fs.ErrNotExist):
		r.State, r.Detail, r.Away = StateMissing, trouble.Error()+goesOn, true
	case trouble != nil:
		r.State, r.Detail, r.Away = StateRefused, trouble.Error()+goesOn, true
	case left <= min(warnBefore, s.end.NotAfter.Sub(s.end.NotBefore)/10):
		r.State = StateExpiring
		r.Detail = fmt.Sprintf("CA file %q: %s ends at %s, and nothing can be signed after that; put a new certificate there, which may be of the same key", s.fileOf(s.end), name(s.end), stamp(s.end.NotAfter))
	}
	return r
}
