package server

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/census"
	"github.com/meshca/meshca/wire"
)

// adsService is envoy.service.discovery.v3.AggregatedDiscoveryService, delta
// only.
type adsService struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	s *Server
}

// StreamAggregatedResources is the state-of-the-world variant.
func (a *adsService) StreamAggregatedResources(discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return refusef(codes.Unimplemented, "state-of-the-world xDS is not served; use DeltaAggregatedResources")
}

// DeltaAggregatedResources serves one caller its resource, or a node's agent those
// of its node, until the caller's proof ends.
func (a *adsService) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	who, err := a.s.authenticate(stream.Context())
	if err != nil {
		return err
	}
	now := a.s.now()
	if !now.Before(who.Expires()) {
		// Verification allows for clocks that differ; a stream that is to end
		// with the token cannot begin after it.
		return refusef(codes.Unauthenticated, "the proof ended at %s; a stream needs one that still holds", who.Expires().UTC().Format(time.RFC3339))
	}
	if bundle, _ := a.s.authority.Bundle(); bundle == nil {
		return refusef(codes.Unavailable, "there is no bundle to serve yet")
	}
	leave, err := a.s.streams.enter(keyOf(stream.Context(), who))
	if err != nil {
		return &callError{code: codes.ResourceExhausted, err: err}
	}
	defer leave()
	a.s.metrics.streams.Inc()
	defer a.s.metrics.streams.Dec()
	serve := a.serve
	if who.Agent() && a.s.pods != nil {
		serve = a.serveNode
	}
	err = serve(stream, who, streamEnd(now, who.Expires()))
	if errors.Is(err, io.EOF) {
		return nil // the agent has closed its side
	}
	return err
}

// streamEnd draws when a stream ends: with the proof, and at the latest after
// 30 min ± 10 %, so that agents that came together do not return together.
func streamEnd(now, proofEnds time.Time) time.Time {
	end := now.Add(streamAge - streamAge/10 + rand.N(streamAge/5))
	if proofEnds.Before(end) {
		return proofEnds
	}
	return end
}

// serve answers requests and pushes changes until the end; status OK is the
// invitation to come back at once.
func (a *adsService) serve(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, who *caller.Caller, end time.Time) error {
	d := wire.NewDelta(who.Resource())
	seat := a.s.census.Shown(who.Resource(), who.ID(), who.Node(), a.s.now())
	defer func() { seat.Leave(a.s.now()) }()
	allowed := newBudget(a.s.now())
	requests, ended := receive(stream)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var changed changes
	look := true     // at what there is to send
	refused := false // what was sent last
	owed := 0        // answers to what was sent
	for {
		now := a.s.now()
		if !now.Before(end) {
			return nil
		}
		// Never one long timer: it would stand still while the machine sleeps.
		timer.Reset(min(tick, end.Sub(now)))
		if look {
			w, c := a.workload(subjectOf(who))
			changed = c
			resource, err := encode(who.Resource(), w)
			if err != nil {
				return err
			}
			resp := d.Next(resource)
			if d.Has() != "" {
				seat.Sent(versionOf(resource, w), resp == nil || len(resp.GetResources()) == 0, a.s.now())
			}
			if resp != nil {
				if err := stream.Send(resp); err != nil {
					return gone(err)
				}
				owed++
			}
			look = false
		}
		select {
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return err
			}
			return readError(err)
		case req := <-requests:
			verdict, err := d.Request(req)
			if err != nil {
				return &callError{code: codes.InvalidArgument, err: err}
			}
			if err := a.s.spend(allowed, verdict, &owed); err != nil {
				return err
			}
			a.note(stream, who.ID().String(), seat, verdict)
			if verdict != nil {
				refused = verdict.Answer == wire.Nacked
			}
			look = d.Pending()
		case <-changed.bundle:
			look = true
		case <-changed.policy:
			look = true
		case <-timer.C:
			// What was refused for a number that was too low may be taken under a
			// higher one.
			look = refused
		case <-a.s.draining:
			return nil
		}
	}
}

// changes are closed when what they are about has become another.
type changes struct{ bundle, policy <-chan struct{} }

// spend takes a request off what a stream may ask for. An answer for each response
// costs the agent nothing: how many there are is for us to say.
func (s *Server) spend(allowed *budget, v *wire.Verdict, owed *int) error {
	if v != nil && *owed > 0 {
		*owed--
		return nil
	}
	if !allowed.spend(s.now()) {
		return refusef(codes.ResourceExhausted, "the stream makes more than %d requests a second", requestsPerSecond)
	}
	return nil
}

// subjectOf is what a caller may see: itself.
func subjectOf(who *caller.Caller) Subject {
	_, uid := who.Pod()
	return Subject{ID: who.ID(), PodUID: uid}
}

// versionOf is what the census keeps of a resource.
func versionOf(r *discovery.Resource, w wire.Workload) census.Version {
	v := census.Version{Resource: r.GetVersion(), Bundle: w.Bundle.Sequence()}
	if w.Policy != nil {
		v.Policy = w.Policy.Version
	}
	return v
}

// workload is what holds for a subject now.
func (a *adsService) workload(s Subject) (wire.Workload, changes) {
	var c changes
	w := wire.Workload{ID: s.ID}
	w.Bundle, c.bundle = a.s.authority.Bundle()
	if a.s.policies != nil {
		w.Policy, c.policy = a.s.policies.Policy(s)
	}
	return w, c
}

// encode makes a resource with a version that says when it is the same.
func encode(name string, w wire.Workload) (*discovery.Resource, error) {
	content, hash, err := w.Marshal()
	if err != nil {
		return nil, err
	}
	return &discovery.Resource{
		Name:     name,
		Version:  fmt.Sprintf("%d-%x", w.Bundle.Sequence(), hash[:8]),
		Resource: content,
	}, nil
}

// note counts an answer, has the census know it, and logs a NACK of somebody's resource
// with the agent's reason. The seat is nil if it is about nobody who is shown.
func (a *adsService) note(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, id string, seat *census.Seat, v *wire.Verdict) {
	if v == nil {
		return
	}
	a.s.metrics.acks.WithLabelValues(string(v.Answer)).Inc()
	switch {
	case seat == nil || v.Name == "": // an answer to a removal
	case v.Answer == wire.Acked:
		seat.Acked(v.Version)
	case v.Answer == wire.Nacked:
		seat.Nacked(v.Detail, a.s.now())
	}
	if v.Answer == wire.Nacked {
		a.s.log.Warn("an agent refuses its resource", "spiffe_id", id, "peer", callOf(stream.Context()).peer,
			"version", v.Version, "acknowledged", v.Acknowledged, "error", cut(v.Detail))
	}
}

// readError sorts what reading a message can end with. By then gRPC has told
// the caller, in its own words.
func readError(err error) error {
	switch st := status.Convert(err); st.Code() {
	case codes.ResourceExhausted:
		return refusef(codes.ResourceExhausted, "%s", cut(st.Message()))
	case codes.Internal, codes.Unimplemented: // undecodable, or compressed
		return refusef(codes.InvalidArgument, "%s", cut(st.Message()))
	case codes.DeadlineExceeded:
		return refusef(codes.DeadlineExceeded, "the message had not arrived when the time for the call was over")
	}
	return gone(err)
}

// gone marks an error that means that the agent, or the connection, went away.
func gone(err error) error { return &callError{code: codes.Canceled, err: err} }

// receive reads requests until the stream ends, and says then what it ended
// with. Its goroutine ends with the stream's context, which gRPC cancels when
// the handler has returned; so the handler itself cannot wait for it.
//
// Errors have a channel of their own with room for one: gRPC cancels the
// context before it reports a message over the limit, and which of the two is
// seen must not be left to chance.
func receive(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) (<-chan *discovery.DeltaDiscoveryRequest, <-chan error) {
	requests, ended := make(chan *discovery.DeltaDiscoveryRequest), make(chan error, 1)
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-stream.Context().Done(): // and Recv fails next
			}
		}
	}()
	return requests, ended
}
