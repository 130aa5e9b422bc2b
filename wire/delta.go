package wire

import (
	"fmt"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

const wildcard = "*"

// maxOpen bounds how many responses are remembered for a client that never
// answers.
const maxOpen = 16

// Delta is the server's side of one delta xDS stream on which there is one
// resource to see, so that its state does not grow with what the client asks
// for. It does no I/O, and one goroutine at a time may use it. Use [NewDelta].
type Delta struct {
	name string // of the one resource

	begun    bool
	wildcard bool
	named    bool
	asked    bool     // since the last Next
	sent     string   // version that the client has, or was sent; empty: none
	removed  []string // to be answered as not there

	answers
	acked string // version that the client acknowledged last
}

// NewDelta begins a stream on which the client can see the resource of that name.
func NewDelta(name string) *Delta { return &Delta{name: name, answers: newAnswers(maxOpen)} }

// Answer says what a client makes of a response.
type Answer string

// The answers; label values.
const (
	Acked  Answer = "ack"
	Nacked Answer = "nack"
	Stale  Answer = "stale" // it answers a response that is not awaited
)

// Verdict is a client's answer to a response.
type Verdict struct {
	Answer       Answer
	Name         string // of the resource that it is about; empty if it is about none
	Version      string // of the resource that it is about
	Acknowledged string // the last version that was ACKed
	Detail       string // why NACKed, in the client's words
}

// TypeError says that a client asked for a type that is not served.
type TypeError struct{ URL string }

func (e *TypeError) Error() string {
	return fmt.Sprintf("type %.256q is not served; only %q is", e.URL, TypeURL)
}

// Request takes in one request. The verdict is nil if it answers nothing. The
// error is a [*TypeError], after which the stream should end.
func (d *Delta) Request(req *discovery.DeltaDiscoveryRequest) (*Verdict, error) {
	if req.GetTypeUrl() != TypeURL {
		return nil, &TypeError{req.GetTypeUrl()}
	}
	first := !d.begun
	d.begun = true
	d.asked = d.asked || first || len(req.GetResourceNamesSubscribe())+len(req.GetResourceNamesUnsubscribe()) > 0
	if first && len(req.GetResourceNamesSubscribe()) == 0 {
		d.wildcard = true
	}
	for _, name := range req.GetResourceNamesSubscribe() {
		switch name {
		case wildcard:
			d.wildcard = true
		case d.name:
			// Naming a resource again asks for it again.
			d.named, d.sent = true, ""
		default:
			d.removed = append(d.removed, name)
		}
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		switch name {
		case wildcard:
			d.wildcard = false
		case d.name:
			// Under a wildcard the client has just dropped what it may still see.
			d.named, d.sent = false, ""
		}
	}
	if first {
		d.resume(req.GetInitialResourceVersions())
	}
	return d.answered(req), nil
}

// resume takes what a client has from its last stream.
func (d *Delta) resume(versions map[string]string) {
	for name, version := range versions {
		if name == d.name {
			d.sent = version
		} else {
			d.removed = append(d.removed, name)
		}
	}
}

// answered finds out whether a request ACKs or NACKs. Answers come in the order
// of the responses, so whatever was sent before is settled too.
func (d *Delta) answered(req *discovery.DeltaDiscoveryRequest) *Verdict {
	r, number, awaited, ok := d.settle(req)
	switch {
	case !ok:
		return nil
	case !awaited:
		return &Verdict{Answer: Stale, Acknowledged: d.acked}
	}
	d.settleBefore(number)
	if detail := req.GetErrorDetail(); detail != nil {
		return &Verdict{Answer: Nacked, Name: r.name, Version: r.version, Acknowledged: d.acked, Detail: detail.GetMessage()}
	}
	if r.version != "" {
		d.acked = r.version
	}
	return &Verdict{Answer: Acked, Name: r.name, Version: r.version, Acknowledged: d.acked}
}

// Has returns the version of the resource that the client has, or was sent; empty if
// it has none or does not subscribe.
func (d *Delta) Has() string {
	if !d.wildcard && !d.named {
		return ""
	}
	return d.sent
}

// Pending reports whether [Delta.Next] may have something to send although the
// resource has not changed: the client has asked for something.
func (d *Delta) Pending() bool { return len(d.removed) > 0 || d.asked }

// Next returns what is to be sent now that r is what the resource has become;
// nil if nothing is. What was sent counts as held even if it is NACKed: the same
// again would be NACKed again.
func (d *Delta) Next(r *discovery.Resource) *discovery.DeltaDiscoveryResponse {
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: TypeURL, RemovedResources: d.removed}
	d.removed, d.asked = nil, false
	name, version := "", ""
	if (d.wildcard || d.named) && r.GetVersion() != d.sent {
		resp.Resources = []*discovery.Resource{r}
		name, version, d.sent = r.GetName(), r.GetVersion(), r.GetVersion()
	}
	if len(resp.Resources) == 0 && len(resp.RemovedResources) == 0 {
		return nil
	}
	resp.Nonce = d.expect(name, version)
	return resp
}
