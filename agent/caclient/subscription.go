package caclient

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/meshca/meshca/wire"
)

const (
	// maxNames is how many names go into one request: with their versions they
	// stay below the 64 KiB that the CA reads.
	maxNames = 400
	// subscribeInterval is how long changes of the names are gathered after a
	// request: the CA takes ten a second, and a node that starts 200 pods at once
	// changes 200 names.
	subscribeInterval = 200 * time.Millisecond
)

// errNoNames stops the opening of a stream: a first request without a name
// would mean the wildcard.
var errNoNames = errors.New("there is no resource to subscribe to")

// subscription is what one stream has been told and has brought. It belongs to
// the goroutine that follows the stream.
type subscription struct {
	watch   *Watch
	parse   func(*discovery.Resource) (wire.Workload, error)
	changed <-chan struct{} // of the names; nil for the wildcard
	later   <-chan time.Time

	taken   bool                // a resource, on this stream
	refused map[string]struct{} // names whose last resource was refused
	absent  map[string]struct{} // names that the CA says it does not have
}

// begin returns the first request of a stream.
func (s *subscription) begin() (*discovery.DeltaDiscoveryRequest, error) {
	w := s.watch
	s.refused, s.absent = make(map[string]struct{}), make(map[string]struct{})
	req := &discovery.DeltaDiscoveryRequest{
		Node:    &core.Node{Id: "meshca-agent", UserAgentName: "meshca-agent"},
		TypeUrl: wire.TypeURL,
	}
	if w.Names == nil {
		req.ResourceNamesSubscribe = []string{"*"}
		req.InitialResourceVersions = w.versions
		return req, nil
	}
	held, changed := w.Names.snapshot()
	if len(held) == 0 {
		return nil, errNoNames
	}
	s.forget(held)
	// A new stream knows nothing: whatever does not fit is a change of its own.
	w.told = make(map[string]uint64)
	s.tell(req, held, changed)
	req.InitialResourceVersions = make(map[string]string)
	for _, name := range req.GetResourceNamesSubscribe() {
		if v, ok := w.versions[name]; ok {
			req.InitialResourceVersions[name] = v
		}
	}
	return req, nil
}

// forget drops the versions of names that are not subscribed to any more, or
// were added anew: whoever added them has nothing yet.
func (s *subscription) forget(held map[string]uint64) {
	w := s.watch
	for name := range w.versions {
		if added, ok := held[name]; !ok || added != w.told[name] {
			delete(w.versions, name)
		}
	}
}

// change returns a request for what has changed since the last one; nil if
// nothing has.
func (s *subscription) change() *discovery.DeltaDiscoveryRequest {
	held, changed := s.watch.Names.snapshot()
	s.forget(held)
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL}
	for _, name := range slices.Sorted(maps.Keys(s.watch.told)) {
		if _, ok := held[name]; !ok && len(req.GetResourceNamesUnsubscribe()) < maxNames {
			req.ResourceNamesUnsubscribe = append(req.GetResourceNamesUnsubscribe(), name)
			delete(s.watch.told, name)
			delete(s.refused, name)
			delete(s.absent, name)
		}
	}
	s.tell(req, held, changed)
	if len(req.GetResourceNamesSubscribe())+len(req.GetResourceNamesUnsubscribe()) == 0 {
		return nil
	}
	return req
}

// tell adds the names that the CA has not been told to a request, and decides
// when to look again.
func (s *subscription) tell(req *discovery.DeltaDiscoveryRequest, held map[string]uint64, changed <-chan struct{}) {
	told := s.watch.told
	for _, name := range slices.Sorted(maps.Keys(held)) {
		if told[name] == held[name] {
			continue
		}
		if len(req.GetResourceNamesSubscribe()) == maxNames {
			closed := make(chan struct{})
			close(closed)
			changed = closed // the rest is due as soon as it may be said
			break
		}
		req.ResourceNamesSubscribe = append(req.GetResourceNamesSubscribe(), name)
		told[name] = held[name]
	}
	s.changed, s.later = changed, time.After(subscribeInterval)
}

// due returns what to wait for before the next change is told: first the end of
// the interval, then a change. It is nil for the wildcard.
func (s *subscription) due() (changed <-chan struct{}, later <-chan time.Time) {
	if s.later != nil {
		return nil, s.later
	}
	return s.changed, nil
}

// accept applies one response. Each resource stands for itself: the error says
// which were refused, and the others are in force.
func (s *subscription) accept(resp *discovery.DeltaDiscoveryResponse) error {
	if resp.GetTypeUrl() != wire.TypeURL {
		return fmt.Errorf("the response is of type %.256q, not %q", resp.GetTypeUrl(), wire.TypeURL)
	}
	var refused refusals
	for _, r := range resp.GetResources() {
		if s.watch.Names != nil && !s.watch.Names.has(r.GetName()) {
			if s.watch.Ignored != nil {
				s.watch.Ignored(r.GetName())
			}
			continue
		}
		refused.add(s.acceptOne(r))
	}
	for _, name := range resp.GetRemovedResources() {
		delete(s.watch.versions, name)
		delete(s.refused, name)
		s.absent[name] = struct{}{}
		if s.watch.Removed != nil {
			s.watch.Removed(name)
		}
	}
	return refused.err()
}

func (s *subscription) acceptOne(r *discovery.Resource) error {
	name := r.GetName()
	delete(s.absent, name)
	w, err := s.parse(r)
	if err == nil {
		err = s.watch.Apply(name, w)
	}
	if err != nil {
		s.refused[name] = struct{}{}
		return fmt.Errorf("resource %.256q: %w", name, err)
	}
	delete(s.refused, name)
	s.taken = true
	s.watch.versions[name] = r.GetVersion()
	return nil
}

// hopeless reports whether the stream should be left for another CA's after a
// refusal. A CA that is behind is so about everything. Where others' resources
// are good, or were never judged, leaving would only keep those from their news.
func (s *subscription) hopeless() bool {
	if s.watch.Names == nil {
		return true
	}
	return !s.taken && len(s.refused)+len(s.absent) >= len(s.watch.told)
}

// refusals gather why resources of one response were refused, a few of them in
// words: the text goes over the wire and into logs.
type refusals struct {
	errs []error
	more int
}

func (r *refusals) add(err error) {
	const most = 4
	switch {
	case err == nil:
	case len(r.errs) == most:
		r.more++
	default:
		r.errs = append(r.errs, err)
	}
}

func (r *refusals) err() error {
	switch {
	case len(r.errs) == 0:
		return nil
	case len(r.errs) == 1:
		return r.errs[0]
	case r.more > 0:
		return fmt.Errorf("%w; and %d more", errors.Join(r.errs...), r.more)
	}
	return errors.Join(r.errs...)
}
