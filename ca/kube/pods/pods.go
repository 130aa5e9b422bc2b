package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// staleAfter is how long nothing may be heard from a watch, which tells of itself
// about once a minute, before what it has not reported is not looked up any more.
const staleAfter = 5 * time.Minute

// Config is what a [Pods] is made from.
type Config struct {
	// API says how to reach the API server, and as whom; required. Its limits on
	// requests are not used.
	API     *rest.Config
	Now     func() time.Time      // nil means time.Now
	Log     *slog.Logger          // nil means no log
	Metrics prometheus.Registerer // nil means none
}

// Pods knows the cluster's pods. It is safe for concurrent use. Use [New], then
// [Pods.Run].
type Pods struct {
	pods                        *table[Pod]
	nodes, accounts, namespaces *table[object]

	followed clients // for lists and watches
	live     clients // for lookups
	lookups  *lookups
	trouble  *troubles
	clock    func() time.Time
	log      *slog.Logger
	metrics  *metrics

	mu        sync.Mutex
	followers map[string]map[*follower]struct{} // by UID
	everyone  []func(uid string)
}

type follower struct{ tell func() }

// New makes a Pods that knows nothing before [Pods.Run].
func New(c Config) (*Pods, error) {
	if c.API == nil {
		return nil, errors.New("following pods: API must be given")
	}
	p := &Pods{clock: c.Now, log: c.Log, followers: make(map[string]map[*follower]struct{})}
	if p.clock == nil {
		p.clock = time.Now
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	p.trouble = newTroubles(p.tell)
	p.pods = newTable("pods", p.now, func(o any) (Pod, bool) {
		switch o := o.(type) {
		case *core.Pod:
			return podOf(o), true
		}
		return Pod{}, false
	})
	p.pods.changed = p.notify
	p.nodes = newTable("nodes", p.now, metadataOf)
	p.accounts = newTable("serviceaccounts", p.now, metadataOf)
	p.namespaces = newTable("namespaces", p.now, metadataOf)
	var err error
	if p.metrics, err = newMetrics(c.Metrics, p); err != nil {
		return nil, fmt.Errorf("following pods: registering metrics: %w", err)
	}
	p.lookups = newLookups(p.now, p.trouble, func(resource, result string) {
		p.metrics.lookups.WithLabelValues(resource, result).Inc()
	})
	if p.followed, err = newClients(c.API, followQPS, followBurst, p.trouble.wrap); err != nil {
		return nil, err
	}
	if p.live, err = newClients(c.API, -1, 0, p.lookups.budget.Wrap); err != nil { // lookups have a budget
		return nil, err
	}
	return p, nil
}

func metadataOf(o any) (object, bool) {
	m, ok := o.(*meta.PartialObjectMetadata)
	if !ok {
		return object{}, false
	}
	return objectOf(m), true
}

// now is the wall clock: a monotonic one stands still while a machine sleeps.
func (p *Pods) now() time.Time { return p.clock().Round(0) }

func (p *Pods) tell(what string, err error) {
	if err == nil {
		p.log.Info("the API server can be asked again", "what", what)
		return
	}
	p.log.Warn("the API server cannot be asked; what is known of the cluster stays, and gets older", "what", what, "error", err)
}

// Run follows the cluster until ctx ends, and returns nil then.
func (p *Pods) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	for _, f := range p.feeds() {
		running.Go(func() { f.run(ctx) })
	}
	<-ctx.Done()
	running.Wait()
	p.followed.close()
	p.live.close()
	return nil
}

// Ready returns nil once all has been read whole. That is so for good: who is known
// stays known without the API server.
func (p *Pods) Ready() error {
	for _, t := range p.states() {
		if !t.synced {
			return fmt.Errorf("the cluster's %s have not been read yet%s", t.resource, because(p.trouble.of(t.resource)))
		}
	}
	return nil
}

// Degraded returns what does not work at the moment, with the verb and the resource
// where a permission is missing; nil if all is well.
func (p *Pods) Degraded() error {
	var faults []string
	for _, t := range p.states() {
		trouble := p.trouble.of(t.resource)
		switch {
		case t.synced && t.age > staleAfter:
			faults = append(faults, fmt.Sprintf("nothing has been heard of the cluster's %s for %v%s", t.resource, t.age.Round(time.Second), because(trouble)))
		case trouble != "" && !slices.Contains(faults, trouble):
			faults = append(faults, trouble)
		}
	}
	if faults == nil {
		return nil
	}
	return errors.New(strings.Join(faults, "; "))
}

// Age returns how long ago the most silent of the watches was heard from, which
// while all is well is little more than a minute. It is zero before all has been
// read.
func (p *Pods) Age() time.Duration {
	var age time.Duration
	for _, t := range p.states() {
		if !t.synced {
			return 0
		}
		age = max(age, t.age)
	}
	return age
}

type state struct {
	resource string
	synced   bool
	age      time.Duration
	objects  int
}

func (p *Pods) states() []state {
	return []state{stateOf(p.pods, p.now()), stateOf(p.nodes, p.now()), stateOf(p.accounts, p.now()), stateOf(p.namespaces, p.now())}
}

func stateOf[T fact[T]](t *table[T], now time.Time) state {
	synced, heard := t.state()
	return state{t.resource, synced, max(0, now.Sub(heard)), t.size()}
}

// Pod returns what is known of the pod with a UID. It asks nobody.
func (p *Pods) Pod(uid string) (Pod, bool) { return p.pods.get(uid) }

// Live returns the namespace and the ServiceAccount of the pod with a UID if it
// lives on the node, which may change with time alone.
func (p *Pods) Live(uid, node string) (namespace, serviceAccount string, ok bool) {
	f, ok := p.pods.get(uid)
	if !ok || node == "" || f.Node != node || !f.Alive(p.now()) {
		return "", "", false
	}
	return f.Namespace, f.ServiceAccount, true
}

// All returns what is known of all pods, in no order.
func (p *Pods) All() []Pod { return p.pods.all() }

// Follow has tell called whenever the facts of the pod with a UID appear, change or
// go, until stop. Tell must not block; it may be called once more after stop.
func (p *Pods) Follow(uid string, tell func()) (stop func()) {
	f := &follower{tell}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.followers[uid] == nil {
		p.followers[uid] = make(map[*follower]struct{})
	}
	p.followers[uid][f] = struct{}{}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if delete(p.followers[uid], f); len(p.followers[uid]) == 0 {
			delete(p.followers, uid)
		}
	}
}

// Watch returns a channel that is closed when the facts of the pod with a UID
// appear, change or go. Whoever waits no more calls stop.
func (p *Pods) Watch(uid string) (changed <-chan struct{}, stop func()) {
	c := make(chan struct{})
	return c, p.Follow(uid, sync.OnceFunc(func() { close(c) }))
}

// Notify has tell called with the UID whenever the facts of any pod appear, change or
// go, for as long as p runs. Tell must not block.
func (p *Pods) Notify(tell func(uid string)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.everyone = append(p.everyone, tell)
}

func (p *Pods) notify(uid string) {
	p.mu.Lock()
	everyone := p.everyone // only ever appended to
	all := make([]*follower, 0, len(p.followers[uid]))
	for f := range p.followers[uid] {
		all = append(all, f)
	}
	p.mu.Unlock()
	for _, f := range all {
		f.tell()
	}
	for _, tell := range everyone {
		tell(uid)
	}
}
