package server

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/census"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/wire"
)

type deltaServer = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer

// serveNode is serve for a node's agent, which sees the workloads that live on its
// node: those that it names, pod by pod, one in each response.
func (a *adsService) serveNode(stream deltaServer, who *caller.Caller, end time.Time) error {
	n := newNodeStream(a, stream, who)
	defer n.close()
	return n.serve(end)
}

// nodeStream is the stream of one node's agent.
type nodeStream struct {
	a      *adsService
	stream deltaServer
	who    *caller.Caller
	policy *policyWatch
	alerts *alerts

	// Owned by serve.
	subs    *wire.Subscriptions
	said    map[string]said         // by pod UID, of those that are visible
	seats   map[string]*census.Seat // likewise
	allowed *budget
	owed    int  // answers to what was sent
	living  bool // the agent's own pod has been seen to live
}

// said is what a resource was made from. While that is the same the resource is not
// sent again, nor made to be compared.
type said struct {
	id      identity.ID
	bundle  *identity.Bundle
	policy  *policy.Resolved
	version string
}

// of leaves out versions: they rise by themselves as the watches behind them tell how
// far they have come. Where a change made them rise the channel of the policy was closed,
// and what was said counts no more, whatever the policy is now: who was not told of a
// change that was taken back could take what was between for news.
func (s said) of(w wire.Workload) bool {
	return s.id == w.ID && s.bundle == w.Bundle && (s.policy == nil) == (w.Policy == nil) &&
		(s.policy == nil || (s.policy.Version == 0) == (w.Policy.Version == 0) && s.policy.Equal(w.Policy.Result))
}

func newNodeStream(a *adsService, stream deltaServer, who *caller.Caller) *nodeStream {
	n := &nodeStream{
		a: a, stream: stream, who: who, said: make(map[string]said), seats: make(map[string]*census.Seat), allowed: newBudget(a.s.now()),
		alerts: &alerts{names: make(map[string]struct{}), wake: make(chan struct{}, 1)},
	}
	n.policy = newPolicyWatch(stream.Context(), n.alerts.add)
	n.subs = wire.NewSubscriptions(func(uid string) (stop func()) {
		unfollow := a.s.pods.Follow(uid, func() { n.alerts.add(uid) })
		return func() {
			unfollow()
			n.forget(uid)
		}
	})
	return n
}

func (n *nodeStream) close() {
	n.subs.Close()
	n.policy.close()
}

// serve answers requests and pushes changes until the end; status OK is the
// invitation to come back at once.
func (n *nodeStream) serve(end time.Time) error {
	requests, ended := receive(n.stream)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := n.a.s.now()
		if !now.Before(end) || !n.entitled() {
			return nil
		}
		// Never one long timer: it would stand still while the machine sleeps.
		timer.Reset(min(tick, end.Sub(now)))
		bundleChanged, err := n.push(requests)
		if err != nil {
			return err
		}
		select {
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return err
			}
			return readError(err)
		case req := <-requests:
			if err := n.take(req); err != nil {
				return err
			}
		case <-n.alerts.wake:
			for _, uid := range n.alerts.take() {
				delete(n.said, uid)
				n.subs.Touch(uid)
			}
		case <-bundleChanged:
			n.subs.TouchAll()
		case <-timer.C:
			n.subs.TouchAll() // a pod can end by time alone
		case <-n.a.s.draining:
			return nil
		}
	}
}

// entitled reports whether the agent's own pod still lives, which its token proved at
// the beginning. It comes back at once, and is told why not.
func (n *nodeStream) entitled() bool {
	_, uid := n.who.Pod()
	_, _, ok := n.a.s.pods.Live(uid, n.who.Node())
	gone := n.living && !ok
	n.living = ok
	return !gone
}

// take takes in one request.
func (n *nodeStream) take(req *discovery.DeltaDiscoveryRequest) error {
	verdict, err := n.subs.Request(req)
	var tooMany *wire.LimitError
	switch {
	case errors.As(err, &tooMany):
		return &callError{code: codes.ResourceExhausted, err: err}
	case err != nil:
		return &callError{code: codes.InvalidArgument, err: err}
	}
	if err := n.a.s.spend(n.allowed, verdict, &n.owed); err != nil {
		return err
	}
	if verdict != nil {
		id := ""
		if s, ok := n.said[verdict.Name]; ok {
			id = s.id.String()
		}
		n.a.note(n.stream, id, n.seats[verdict.Name], verdict)
		if verdict.Answer == wire.Nacked {
			// What was refused for a number that was too low may be taken under a
			// higher one.
			delete(n.said, verdict.Name)
		}
	}
	return nil
}

// push sends all there is to send. Requests that come meanwhile are taken in
// between: an agent that answers each response before it reads the next would
// otherwise wait for us while we wait for it.
func (n *nodeStream) push(requests <-chan *discovery.DeltaDiscoveryRequest) (bundleChanged <-chan struct{}, err error) {
	// Taken before anything is looked at, so that no change falls in between.
	_, bundleChanged = n.a.s.authority.Bundle()
	if err := n.send(n.subs.Strangers()); err != nil {
		return nil, err
	}
	for {
		select {
		case req := <-requests:
			if err := n.take(req); err != nil {
				return nil, err
			}
			if err := n.send(n.subs.Strangers()); err != nil {
				return nil, err
			}
		default:
		}
		uid, has, ok := n.subs.Next()
		if !ok {
			return bundleChanged, nil
		}
		if err := n.pushOne(uid, has); err != nil {
			return nil, err
		}
	}
}

// pushOne sends what has become of one pod's resource.
func (n *nodeStream) pushOne(uid, has string) error {
	id, visible := n.visible(uid)
	if !visible {
		n.forget(uid)
		return n.send(n.subs.Respond(uid, nil))
	}
	w, changes := n.a.workload(Subject{ID: id, PodUID: uid})
	if n.policy.watch(uid, changes.policy) {
		delete(n.said, uid)
	}
	if before, ok := n.said[uid]; ok && has != "" && before.version == has && before.of(w) {
		return nil
	}
	r, err := encode(uid, w)
	if err != nil {
		return err
	}
	n.said[uid] = said{w.ID, w.Bundle, w.Policy, r.GetVersion()}
	if n.seats[uid] == nil {
		n.seats[uid] = n.a.s.census.Shown(uid, id, n.who.Node(), n.a.s.now())
	}
	resp := n.subs.Respond(uid, r)
	n.seats[uid].Sent(versionOf(r, w), resp == nil, n.a.s.now())
	return n.send(resp)
}

// forget drops what was kept of a pod that is not shown any more.
func (n *nodeStream) forget(uid string) {
	n.policy.forget(uid)
	delete(n.said, uid)
	n.seats[uid].Leave(n.a.s.now())
	delete(n.seats, uid)
}

// visible reports whether the agent may see a pod's workload: it lives, on the node
// that the agent's own token names. What a pod is follows from its spec as the API
// server has it, never from what the agent says.
func (n *nodeStream) visible(uid string) (identity.ID, bool) {
	namespace, account, ok := n.a.s.pods.Live(uid, n.who.Node())
	if !ok {
		return identity.ID{}, false
	}
	id, err := identity.WorkloadID(n.who.ID().TrustDomain(), namespace, account)
	return id, err == nil
}

func (n *nodeStream) send(resp *discovery.DeltaDiscoveryResponse) error {
	if resp == nil {
		return nil
	}
	if err := n.stream.Send(resp); err != nil {
		return gone(err)
	}
	n.owed++
	return nil
}

// alerts gathers the names of what has changed. It holds no more than are followed.
type alerts struct {
	wake chan struct{} // holds one item: take

	mu    sync.Mutex
	names map[string]struct{}
}

func (a *alerts) add(names ...string) {
	a.mu.Lock()
	for _, name := range names {
		a.names[name] = struct{}{}
	}
	a.mu.Unlock()
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *alerts) take() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := make([]string, 0, len(a.names))
	for name := range a.names {
		all = append(all, name)
	}
	clear(a.names)
	return all
}

// policyWatch waits for the channels of many workloads' policies, with one goroutine
// for each that is another. Its methods are called by one goroutine.
type policyWatch struct {
	ctx    context.Context
	cancel context.CancelFunc
	tell   func(...string)
	ended  sync.WaitGroup

	mu     sync.Mutex
	by     map[<-chan struct{}]map[string]struct{}
	waits  map[<-chan struct{}]context.CancelFunc
	waited map[string]<-chan struct{} // by name
}

func newPolicyWatch(ctx context.Context, tell func(...string)) *policyWatch {
	p := &policyWatch{
		tell: tell, by: make(map[<-chan struct{}]map[string]struct{}),
		waits: make(map[<-chan struct{}]context.CancelFunc), waited: make(map[string]<-chan struct{}),
	}
	p.ctx, p.cancel = context.WithCancel(ctx)
	return p
}

// watch has a name told when the channel is closed. It takes the place of the name's
// last channel; another reports whether there was a different one, which was closed
// then, and of which the name may never be told.
func (p *policyWatch) watch(name string, changed <-chan struct{}) (another bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, had := p.waited[name]
	if had && old == changed {
		return false
	}
	p.forgetLocked(name)
	if changed == nil {
		return had
	}
	p.waited[name] = changed
	if p.by[changed] == nil {
		p.by[changed] = make(map[string]struct{})
		ctx, cancel := context.WithCancel(p.ctx)
		p.waits[changed] = cancel
		p.ended.Go(func() { p.wait(ctx, changed) })
	}
	p.by[changed][name] = struct{}{}
	return had
}

func (p *policyWatch) wait(ctx context.Context, changed <-chan struct{}) {
	select {
	case <-ctx.Done():
		return
	case <-changed:
	}
	p.mu.Lock()
	names := make([]string, 0, len(p.by[changed]))
	for name := range p.by[changed] {
		names = append(names, name)
		delete(p.waited, name)
	}
	p.dropLocked(changed)
	p.mu.Unlock()
	p.tell(names...)
}

// forget ends the waiting for a name.
func (p *policyWatch) forget(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forgetLocked(name)
}

func (p *policyWatch) forgetLocked(name string) {
	changed, ok := p.waited[name]
	if !ok {
		return
	}
	delete(p.waited, name)
	if delete(p.by[changed], name); len(p.by[changed]) == 0 {
		p.dropLocked(changed)
	}
}

func (p *policyWatch) dropLocked(changed <-chan struct{}) {
	if cancel := p.waits[changed]; cancel != nil {
		cancel()
	}
	delete(p.waits, changed)
	delete(p.by, changed)
}

func (p *policyWatch) close() {
	p.cancel()
	p.ended.Wait()
}
