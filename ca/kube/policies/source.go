package policies

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/dynamic"

	"github.com/meshca/meshca/policy"
)

const (
	// together is how long changes are gathered after one came into force: whoever
	// applies a hundred policies makes a few versions of it.
	together = 100 * time.Millisecond
	// lookAgain is how soon what could not be told is asked again.
	lookAgain = time.Second
	// fewNamespaces are compiled one by one; more are compiled with all others.
	fewNamespaces = 16
)

// Config is what [New] takes. Everything is required.
type Config struct {
	// Client is asked little, but a policy that is deleted waits for its answer: it
	// should not share a limit of requests with whoever writes.
	Client dynamic.Interface
	Pods   Pods
	// RootNamespace is the one whose policies are for the whole mesh.
	RootNamespace string
	// Namespace is the CA's own, where the record is.
	Namespace string
	Now       func() time.Time
	Log       *slog.Logger
	Metrics   prometheus.Registerer
}

// Pods knows the labels that pods have now. Its methods are safe for concurrent use.
type Pods interface {
	// Labels returns what is known of the pod with that UID. The version is its
	// resourceVersion, which rises with every change; known is false where the pod has
	// not been heard of. The map is not changed by either side.
	Labels(uid string) (namespace string, labels map[string]string, version uint64, known bool)
	// Notify has f called whenever Labels may say something else of a pod than before,
	// if only for a moment, and when it is gone. f does not block. Notify is called once.
	Notify(f func(uid string))
}

// Source resolves policies for pods. Its methods are safe for concurrent use. Use
// [New], then [Source.Run].
type Source struct {
	conf    Config
	all     collection
	woken   chan struct{} // holds one: look again
	metrics metrics

	mu       sync.Mutex // never held while logging
	now      state
	held     string        // why what the API server says is not in force; "" if it is
	trouble  error         // why the API server could not be listed or watched; nil if it could
	record   record        // under which definition policies were known last
	recorded chan struct{} // closed when record is replaced
	waiting  map[waiter]waited
	told     chan struct{} // closed when objects may be others

	// Owned by Run.
	waits   news                       // has been told, and is not in force
	since   time.Time                  // when now came into force
	judged  time.Time                  // when it was held back last
	inForce map[string][]policy.Policy // by namespace
	said    string                     // the last reason that is in the log
	learned bool                       // record has been read
}

// state is what decides at one time. It is immutable.
type state struct {
	version uint64 // 0: the policies are not known
	set     *policy.Set
	tried   bool // the API server has been asked
}

// maxWaiting bounds the pods that somebody may be waiting for. Beyond it everybody
// looks again, which costs time and nothing else.
const maxWaiting = 100_000

// New makes a source that knows nothing before Run.
func New(c Config) (*Source, error) {
	if c.Client == nil || c.Pods == nil || c.RootNamespace == "" || c.Namespace == "" || c.Now == nil || c.Log == nil || c.Metrics == nil {
		return nil, errors.New("policies of the cluster: Client, Pods, RootNamespace, Namespace, Now, Log and Metrics must all be given")
	}
	s := &Source{
		conf: c, woken: make(chan struct{}, 1), recorded: make(chan struct{}), told: make(chan struct{}),
		waiting: make(map[waiter]waited),
	}
	s.all.wake, s.all.now = s.wake, c.Now
	if err := s.metrics.register(s, c.Metrics); err != nil {
		return nil, fmt.Errorf("policies of the cluster: registering metrics: %w", err)
	}
	c.Pods.Notify(s.podChanged)
	return s, nil
}

func (s *Source) wake() {
	select {
	case s.woken <- struct{}{}:
	default: // it has been told already
	}
}

// Run follows the API server until ctx ends.
func (s *Source) Run(ctx context.Context) error {
	var watching sync.WaitGroup
	watching.Go(func() { s.watch(ctx) })
	defer watching.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.woken:
		case <-timer.C:
		}
		if again := s.look(ctx); again > 0 {
			timer.Reset(again)
		}
	}
}

// look puts in force what the API server says, if that is something new and may
// count already. It returns when to look again at what may not; zero for no need.
func (s *Source) look(ctx context.Context) (again time.Duration) {
	if !s.all.pending() && !s.waits.any() {
		s.advance()
		return s.unknown()
	}
	now := time.Now() // of the monotonic clock
	if wait := max(together-now.Sub(s.since), lookAgain-now.Sub(s.judged)); wait > 0 {
		return wait
	}
	if s.all.take(&s.waits) {
		s.tellObjects()
	}
	why := s.judge(ctx)
	if why == "" && s.waits.reached < s.version() {
		why = fmt.Sprintf("the API server says resourceVersion %d and has said %d before: its etcd was restored from a backup; policies count again when it has come further, so restore with --bump-revision", s.waits.reached, s.version())
	}
	if why != "" {
		s.hold(why)
		s.judged = now
		return lookAgain
	}
	s.publish()
	s.since = now
	return 0
}

// unknown lets those who never had a policy have STRICT where the API server was
// asked in vain.
func (s *Source) unknown() time.Duration {
	s.mu.Lock()
	why := s.trouble
	s.mu.Unlock()
	if why != nil && s.version() == 0 {
		s.hold(why.Error())
	}
	return 0
}

// advance notes that nothing has changed up to where the watch has come. Nobody is
// told for that alone.
func (s *Source) advance() {
	reached, ok := s.all.progress()
	s.mu.Lock()
	defer s.mu.Unlock()
	if ok && s.now.version != 0 && reached > s.now.version {
		s.now.version = reached
	}
}

// Status returns the version of the policies, 0 while they are not known, and why what
// the API server says of them is not in force; "" if it is.
func (s *Source) Status() (version uint64, held string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now.version, s.held
}

func (s *Source) version() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now.version
}

// hold keeps what is in force, and lets those who never had a policy have STRICT.
func (s *Source) hold(why string) {
	s.mu.Lock()
	s.held = why
	kept := s.now.version != 0
	first := !s.now.tried
	s.mu.Unlock()
	if first {
		s.put(state{tried: true}, nil)
	}
	s.metrics.held.Set(1)
	if why == s.said {
		return
	}
	s.said = why
	if kept {
		s.conf.Log.Error("what the API server says of policies is not taken over; what is in force stays", "reason", why)
		return
	}
	s.conf.Log.Error("the policies are not known: workloads keep what they have, and those that never had a policy are STRICT", "reason", why)
}

// publish puts in force what waits.
func (s *Source) publish() {
	s.mu.Lock()
	set := s.now.set
	s.mu.Unlock()
	n := s.waits
	if n.listed {
		s.inForce = n.policies
	} else {
		maps.Copy(s.inForce, n.policies)
	}
	if n.listed || len(n.policies) > fewNamespaces {
		set = policy.New(slices.Concat(slices.Collect(maps.Values(s.inForce))...), s.conf.RootNamespace)
	} else {
		for namespace, policies := range n.policies {
			set = set.WithNamespace(namespace, policies)
		}
	}
	s.waits, s.said = news{}, ""
	s.mu.Lock()
	s.held = ""
	s.mu.Unlock()
	_, mesh := n.namespaces[s.conf.RootNamespace]
	next := state{version: n.reached, set: set, tried: true}
	if n.listed || mesh {
		s.put(next, nil)
	} else {
		s.put(next, n.namespaces)
	}
	s.metrics.policies.Set(float64(n.count))
	s.metrics.held.Set(0)
	s.conf.Log.Info("policies are handed out", "version", n.reached, "policies", n.count)
}

// put brings a state into force and wakes those whom it concerns: the pods of these
// namespaces, nil for all. Only Run's goroutine calls it.
func (s *Source) put(next state, namespaces map[string]struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = next
	if namespaces == nil {
		s.wakeAllLocked()
		return
	}
	for who, w := range s.waiting {
		if _, concerned := namespaces[w.namespace]; concerned || w.more {
			close(w.changed)
			delete(s.waiting, who)
		}
	}
}

func (s *Source) wakeAllLocked() {
	for _, w := range s.waiting {
		close(w.changed)
	}
	clear(s.waiting)
}
