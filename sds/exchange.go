package sds

import (
	"slices"
	"strconv"
	"sync"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

// What all streams of a socket may subscribe to, in all. A workload has about
// five names, and an Envoy a stream for each.
const (
	maxNames     = 1000
	maxNameBytes = 64 << 10
)

// wildcard stands for every resource in xDS. Here it stands for none: a key
// goes to nobody who did not ask for it by name.
const wildcard = "*"

// told marks a name of which a delta client knows that it does not exist. No
// version is that high.
const told = ^uint64(0)

// maxOutstanding is how many unanswered responses a stream remembers.
const maxOutstanding = 32

func version(n uint64) string { return strconv.FormatUint(n, 10) }

// outcome is what a request says of an earlier response.
type outcome struct {
	result   result            // "" when it says nothing
	detail   *rpcstatus.Status // of a NACK
	sequence uint64            // of the bundle that an ACK accepts; zero without one
}

// delivery is what a response carries, for the log and the consumer's record.
type delivery struct {
	names    []string
	removed  int
	svid     bool
	sequence uint64 // of the bundle in it; zero without one
}

func (d *delivery) note(name string, r *resource) {
	d.names = append(d.names, name)
	switch r.holds {
	case holdsSVID:
		d.svid = true
	case holdsBundle:
		d.sequence = r.sequence
	}
}

// checkType refuses requests for anything but secrets. An empty type is the
// stream's own (xDS, "ACK and resource type instance version").
func checkType(url string) error {
	if url != "" && url != secretType {
		return status.Errorf(codes.InvalidArgument, "only resources of type %s are served here", secretType)
	}
	return nil
}

func errTooManyNames() error {
	return status.Errorf(codes.ResourceExhausted, "more than %d names, or more than %d bytes of them, on one socket", maxNames, maxNameBytes)
}

// nameBudget is what the streams of a socket hold of names.
type nameBudget struct {
	mu           sync.Mutex
	count, bytes int
}

// nameShare is the part of one stream. The zero share is of no budget.
type nameShare struct {
	of           *nameBudget
	count, bytes int
}

// set makes the share so large, unless the budget does not allow it.
func (s *nameShare) set(count, bytes int) bool {
	if s.of == nil {
		return true
	}
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	c, b := s.of.count-s.count+count, s.of.bytes-s.bytes+bytes
	if c > maxNames || b > maxNameBytes {
		return false
	}
	s.of.count, s.of.bytes, s.count, s.bytes = c, b, count, bytes
	return true
}

// outstanding are responses that nobody has answered yet, oldest first. A
// client that never answers makes the oldest forgotten.
type outstanding []answer

// answer is one response that may still be acknowledged.
type answer struct {
	nonce    string
	sequence uint64 // of the bundle in it; zero without one
}

func (o *outstanding) add(nonce string, sequence uint64) {
	if len(*o) == maxOutstanding {
		*o = slices.Delete(*o, 0, 1)
	}
	*o = append(*o, answer{nonce, sequence})
}

// judge takes a client's verdict on the response with that nonce.
func (o *outstanding) judge(nonce string, detail *rpcstatus.Status) (_ outcome, known bool) {
	i := slices.IndexFunc(*o, func(a answer) bool { return a.nonce == nonce })
	if i < 0 {
		return outcome{}, false
	}
	accepted := (*o)[i].sequence
	*o = slices.Delete(*o, i, i+1)
	if detail != nil {
		return outcome{result: resultRejected, detail: detail}, true
	}
	return outcome{result: resultAcknowledged, sequence: accepted}, true
}

// sotw is the state of one state-of-the-world stream. It does no I/O.
//
// xDS lets a response of this variant hold only what has changed, for every
// type but listeners and clusters. That is used, so that a new bundle does not
// push the key again to a stream that asked for both.
type sotw struct {
	names   nameShare
	held    map[string]uint64 // by subscribed name, the version last sent; 0 for none
	nonce   uint64            // of the last response; 0 before the first
	waiting outstanding
}

// request takes in one request. The error ends the stream.
func (x *sotw) request(r *discovery.DiscoveryRequest) (outcome, error) {
	if err := checkType(r.GetTypeUrl()); err != nil {
		return outcome{}, err
	}
	nonce := r.GetResponseNonce()
	out, known := x.waiting.judge(nonce, r.GetErrorDetail())
	// Before the first response no nonce can be ours: a client that kept one
	// from an earlier stream is served all the same. An empty one later on comes
	// from a client that had not seen the response yet; its names count. The
	// names of an answer to an older response do not: the client will say what it
	// wants in its answer to the last one.
	if x.nonce != 0 && nonce != "" && nonce != version(x.nonce) {
		if !known {
			out.result = resultStale
		}
		return out, nil
	}
	held, bytes := make(map[string]uint64), 0
	for _, name := range r.GetResourceNames() {
		if _, twice := held[name]; twice || name == wildcard {
			continue
		}
		held[name] = x.held[name]
		bytes += len(name)
		if len(held) > maxNames || bytes > maxNameBytes {
			return outcome{}, errTooManyNames()
		}
	}
	if !x.names.set(len(held), bytes) {
		return outcome{}, errTooManyNames()
	}
	x.held = held
	return out, nil
}

// respond returns what the client has not been sent of v; nil when that is
// nothing. Names without a resource are left out and hold up nothing.
func (x *sotw) respond(v *view) (*discovery.DiscoveryResponse, delivery) {
	var (
		d      delivery
		secret []*anypb.Any
		newest uint64
	)
	for _, name := range v.names {
		r := v.resources[name]
		sent, subscribed := x.held[name]
		if !subscribed || sent == r.version {
			continue
		}
		x.held[name] = r.version
		newest = max(newest, r.version)
		secret = append(secret, r.wire.GetResource())
		d.note(name, r)
	}
	if len(secret) == 0 {
		return nil, d
	}
	x.nonce++
	x.waiting.add(version(x.nonce), d.sequence)
	return &discovery.DiscoveryResponse{
		VersionInfo: version(newest),
		TypeUrl:     secretType,
		Nonce:       version(x.nonce),
		Resources:   secret,
	}, d
}

// delta is the state of one delta stream. It does no I/O.
type delta struct {
	names   nameShare
	held    map[string]uint64 // by subscribed name, the version last sent; 0 for none, or told
	bytes   int               // of the names in held
	nonce   uint64            // of the last response
	waiting outstanding
}

// request takes in one request. The error ends the stream.
//
// Unlike in the other variant the subscriptions of a request count whatever
// its nonce, since each is a change and not the whole. initial_resource_versions
// are not looked at: versions count from 1 in each agent process, and a
// restarted agent has new keys under old numbers.
func (x *delta) request(r *discovery.DeltaDiscoveryRequest) (outcome, error) {
	if err := checkType(r.GetTypeUrl()); err != nil {
		return outcome{}, err
	}
	if x.held == nil {
		x.held = make(map[string]uint64)
	}
	for _, name := range r.GetResourceNamesUnsubscribe() {
		if _, ok := x.held[name]; ok {
			delete(x.held, name)
			x.bytes -= len(name)
		}
	}
	for _, name := range r.GetResourceNamesSubscribe() {
		if name == wildcard {
			continue
		}
		if _, again := x.held[name]; !again {
			x.bytes += len(name)
		}
		// Who subscribes again is sent the resource again: it may have lost it.
		x.held[name] = 0
		if len(x.held) > maxNames || x.bytes > maxNameBytes {
			return outcome{}, errTooManyNames()
		}
	}
	if !x.names.set(len(x.held), x.bytes) {
		return outcome{}, errTooManyNames()
	}
	if r.GetResponseNonce() == "" {
		return outcome{}, nil
	}
	out, known := x.waiting.judge(r.GetResponseNonce(), r.GetErrorDetail())
	if !known {
		out.result = resultStale
	}
	return out, nil
}

// respond returns what the client has not been told of v; nil when that is
// nothing. A name that is certain to mean nothing is answered as removed, once
// (V26: exactly as one that belongs to somebody else), and so is one that was
// there and is no more.
func (x *delta) respond(v *view) (*discovery.DeltaDiscoveryResponse, delivery) {
	var d delivery
	resp := &discovery.DeltaDiscoveryResponse{SystemVersionInfo: version(v.number), TypeUrl: secretType}
	for _, name := range v.names {
		r := v.resources[name]
		if sent, subscribed := x.held[name]; subscribed && sent != r.version {
			x.held[name] = r.version
			resp.Resources = append(resp.Resources, r.wire)
			d.note(name, r)
		}
	}
	for name, sent := range x.held {
		if v.resources[name] != nil || sent == told || sent == 0 && !v.unknown(name) {
			continue
		}
		x.held[name] = told
		resp.RemovedResources = append(resp.RemovedResources, name)
	}
	if len(resp.Resources)+len(resp.RemovedResources) == 0 {
		return nil, d
	}
	slices.Sort(resp.RemovedResources)
	d.removed = len(resp.RemovedResources)
	x.nonce++
	resp.Nonce = version(x.nonce)
	x.waiting.add(resp.Nonce, d.sequence)
	return resp, d
}
