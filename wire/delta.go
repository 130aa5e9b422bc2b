package wire

import (
	"fmt"
	"slices"
	"strconv"

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

	nonce uint64
	open  []response // sent and not answered, oldest first
	acked string     // version that the client acknowledged last
}

// NewDelta begins a stream on which the client can see the resource of that name.
func NewDelta(name string) *Delta { return &Delta{name: name} }

type response struct{ nonce, version string }

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
	nonce := req.GetResponseNonce()
	if nonce == "" {
		return nil
	}
	i := slices.IndexFunc(d.open, func(r response) bool { return r.nonce == nonce })
	if i < 0 {
		return &Verdict{Answer: Stale, Acknowledged: d.acked}
	}
	r := d.open[i]
	d.open = slices.Delete(d.open, 0, i+1)
	if detail := req.GetErrorDetail(); detail != nil {
		return &Verdict{Answer: Nacked, Version: r.version, Acknowledged: d.acked, Detail: detail.GetMessage()}
	}
	if r.version != "" {
		d.acked = r.version
	}
	return &Verdict{Answer: Acked, Version: r.version, Acknowledged: d.acked}
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
	version := ""
	if (d.wildcard || d.named) && r.GetVersion() != d.sent {
		resp.Resources = []*discovery.Resource{r}
		version, d.sent = r.GetVersion(), r.GetVersion()
	}
	if len(resp.Resources) == 0 && len(resp.RemovedResources) == 0 {
		return nil
	}
	d.nonce++
	resp.Nonce = strconv.FormatUint(d.nonce, 10)
	if len(d.open) == maxOpen {
		d.open = slices.Delete(d.open, 0, 1)
	}
	d.open = append(d.open, response{resp.Nonce, version})
	return resp
}
