package wire

import (
	"fmt"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// What one client may subscribe to, by name. A node has at most some hundred pods.
const (
	MaxNames     = 1024
	maxNameBytes = 64 << 10 // in all
)

// Subscriptions is the server's side of one delta xDS stream on which many
// resources are to be seen, each by its name: a wildcard subscribes to nothing. Each
// response holds one resource, so that an answer is about one. It does no I/O, and
// one goroutine at a time may use it. Use [NewSubscriptions].
//
// What is to be sent is found name by name: [Subscriptions.Next] says which one to
// look at, and [Subscriptions.Respond] what to send of what was found.
type Subscriptions struct {
	follow func(name string) (stop func())

	begun bool
	names map[string]*subscription
	bytes int
	queue []*subscription // to be looked at, in order
	none  []string        // to be answered as not there, and not subscribed to
	answers
}

type subscription struct {
	name   string
	stop   func()
	queued bool   // it is in the queue
	gone   bool   // it has ended
	sent   string // version that the client has, or was sent; empty: none
	told   bool   // that there is none
	acked  string // version that the client acknowledged last
	number uint64 // of the last response that it answered
}

// NewSubscriptions begins a stream. Follow is called for each name that is
// subscribed to, and what it returns when that ends.
func NewSubscriptions(follow func(name string) (stop func())) *Subscriptions {
	return &Subscriptions{follow: follow, names: make(map[string]*subscription), answers: newAnswers(2 * MaxNames)}
}

// LimitError says that a client subscribed to more than it may.
type LimitError struct{ Names, Bytes int }

func (e *LimitError) Error() string {
	return fmt.Sprintf("it subscribes to %d names of %d bytes; %d names of %d bytes are the most of one stream", e.Names, e.Bytes, MaxNames, maxNameBytes)
}

// Request takes in one request. The verdict is nil if it answers nothing. After an
// error, a [*TypeError] or a [*LimitError], the stream should end.
func (s *Subscriptions) Request(req *discovery.DeltaDiscoveryRequest) (*Verdict, error) {
	if req.GetTypeUrl() != TypeURL {
		return nil, &TypeError{req.GetTypeUrl()}
	}
	first := !s.begun
	s.begun = true
	for _, name := range req.GetResourceNamesSubscribe() {
		if err := s.subscribe(name); err != nil {
			return nil, err
		}
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		s.unsubscribe(name)
	}
	if first {
		for name, version := range req.GetInitialResourceVersions() {
			if sub := s.names[name]; sub != nil {
				sub.sent = version
			} else {
				s.none = append(s.none, name)
			}
		}
	}
	return s.answered(req), nil
}

func (s *Subscriptions) subscribe(name string) error {
	if name == wildcard {
		return nil
	}
	sub := s.names[name]
	if sub == nil {
		if names, bytes := len(s.names)+1, s.bytes+len(name); names > MaxNames || bytes > maxNameBytes {
			return &LimitError{names, bytes}
		}
		sub = &subscription{name: name, stop: s.follow(name)}
		s.names[name] = sub
		s.bytes += len(name)
	}
	// Naming a resource again asks for it again.
	sub.sent, sub.told = "", false
	s.look(sub)
	return nil
}

func (s *Subscriptions) unsubscribe(name string) {
	sub := s.names[name]
	if sub == nil {
		return
	}
	delete(s.names, name)
	s.bytes -= len(name)
	sub.gone = true
	sub.stop()
}

// Close ends all subscriptions.
func (s *Subscriptions) Close() {
	for name := range s.names {
		s.unsubscribe(name)
	}
}

func (s *Subscriptions) answered(req *discovery.DeltaDiscoveryRequest) *Verdict {
	r, number, awaited, ok := s.settle(req)
	if !ok {
		return nil
	}
	sub := s.names[r.name]
	if sub == nil { // ended meanwhile, or about none
		sub = &subscription{}
	}
	v := &Verdict{Answer: Stale, Name: r.name, Version: r.version}
	// Answers about different names may come in any order.
	if awaited && number > sub.number {
		v.Answer, sub.number = Acked, number
		if detail := req.GetErrorDetail(); detail != nil {
			v.Answer, v.Detail = Nacked, detail.GetMessage()
		} else if r.version != "" {
			sub.acked = r.version
		}
	}
	v.Acknowledged = sub.acked
	return v
}

// Touch has a name looked at again, if it is subscribed to.
func (s *Subscriptions) Touch(name string) {
	if sub := s.names[name]; sub != nil {
		s.look(sub)
	}
}

// TouchAll has all names looked at again.
func (s *Subscriptions) TouchAll() {
	for _, sub := range s.names {
		s.look(sub)
	}
}

func (s *Subscriptions) look(sub *subscription) {
	if !sub.queued {
		sub.queued = true
		s.queue = append(s.queue, sub)
	}
}

// Next returns a name to look at, in turn, and the version of it that the client
// has, which is empty if it has none or asks for it again.
func (s *Subscriptions) Next() (name, has string, ok bool) {
	for len(s.queue) > 0 {
		sub := s.queue[0]
		s.queue[0] = nil
		s.queue = s.queue[1:]
		sub.queued = false
		if !sub.gone {
			return sub.name, sub.sent, true
		}
	}
	s.queue = nil
	return "", "", false
}

// Respond returns what is to be sent now that r is what the resource of a name has
// become, nil for one that there is not; nil if nothing is. What was sent counts as
// held even if it is NACKed: the same again would be NACKed again.
func (s *Subscriptions) Respond(name string, r *discovery.Resource) *discovery.DeltaDiscoveryResponse {
	sub := s.names[name]
	if sub == nil {
		return nil
	}
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: TypeURL}
	switch {
	case r == nil && sub.told:
		return nil
	case r == nil:
		sub.sent, sub.told = "", true
		resp.RemovedResources = []string{name}
		resp.Nonce = s.expect(name, "")
	case r.GetVersion() == sub.sent:
		return nil
	default:
		sub.sent, sub.told = r.GetVersion(), false
		resp.Resources = []*discovery.Resource{r}
		resp.Nonce = s.expect(name, r.GetVersion())
	}
	return resp
}

// Strangers returns the answer to names that the client had from elsewhere and did
// not subscribe to; nil if there are none.
func (s *Subscriptions) Strangers() *discovery.DeltaDiscoveryResponse {
	if len(s.none) == 0 {
		return nil
	}
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: TypeURL, RemovedResources: s.none, Nonce: s.expect("", "")}
	s.none = nil
	return resp
}
