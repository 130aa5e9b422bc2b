package server

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strconv"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/wire/meshcav1"
)

const wildcard = "*"

// maxOpen bounds how many responses are remembered for an agent that never
// answers.
const maxOpen = 16

// deltaState is one delta xDS stream. It can see one resource, its caller's, so
// its state does not grow with what the agent asks for. Only the stream's
// handler touches it.
type deltaState struct {
	name string // of the one resource

	begun    bool
	wildcard bool
	named    bool
	sent     string   // version that the agent has, or was sent; empty: none
	removed  []string // to be answered as not there

	nonce uint64
	open  []response // sent and not answered, oldest first
	acked string     // version that the agent acknowledged last
}

type response struct{ nonce, version string }

// verdict is an agent's answer to a response.
type verdict struct {
	result       string // acked, nacked or stale
	version      string // of the resource that it is about
	acknowledged string // the last version that was ACKed
	detail       string // why NACKed
}

// request takes in one request. The verdict is nil if it answers nothing.
func (d *deltaState) request(req *discovery.DeltaDiscoveryRequest) (*verdict, error) {
	if req.GetTypeUrl() != meshcav1.TypeURL {
		return nil, refusef(codes.InvalidArgument, "type %.256q is not served; only %q is", req.GetTypeUrl(), meshcav1.TypeURL)
	}
	first := !d.begun
	d.begun = true
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
			// Under a wildcard the agent has just dropped what it may still see.
			d.named, d.sent = false, ""
		}
	}
	if first {
		d.resume(req.GetInitialResourceVersions())
	}
	return d.answered(req), nil
}

// resume takes what an agent has from its last stream.
func (d *deltaState) resume(versions map[string]string) {
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
func (d *deltaState) answered(req *discovery.DeltaDiscoveryRequest) *verdict {
	nonce := req.GetResponseNonce()
	if nonce == "" {
		return nil
	}
	i := slices.IndexFunc(d.open, func(r response) bool { return r.nonce == nonce })
	if i < 0 {
		return &verdict{result: stale, acknowledged: d.acked}
	}
	r := d.open[i]
	d.open = slices.Delete(d.open, 0, i+1)
	if detail := req.GetErrorDetail(); detail != nil {
		return &verdict{result: nacked, version: r.version, acknowledged: d.acked, detail: detail.GetMessage()}
	}
	if r.version != "" {
		d.acked = r.version
	}
	return &verdict{result: acked, version: r.version, acknowledged: d.acked}
}

// next returns what is to be sent now, nil if nothing is. What was sent counts
// as held even if it is NACKed: the same again would be NACKed again.
func (d *deltaState) next(who *caller.Caller, bundle *identity.Bundle) (*discovery.DeltaDiscoveryResponse, error) {
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: meshcav1.TypeURL, RemovedResources: d.removed}
	d.removed = nil
	version := ""
	if d.wildcard || d.named {
		r, err := resource(d.name, who, bundle)
		if err != nil {
			return nil, err
		}
		if r.GetVersion() != d.sent {
			resp.Resources = []*discovery.Resource{r}
			version, d.sent = r.GetVersion(), r.GetVersion()
		}
	}
	if len(resp.Resources) == 0 && len(resp.RemovedResources) == 0 {
		return nil, nil
	}
	d.nonce++
	resp.Nonce = strconv.FormatUint(d.nonce, 10)
	if len(d.open) == maxOpen {
		d.open = slices.Delete(d.open, 0, 1)
	}
	d.open = append(d.open, response{resp.Nonce, version})
	return resp, nil
}

// resource is the caller's own, with a version that says when it is the same.
func resource(name string, who *caller.Caller, bundle *identity.Bundle) (*discovery.Resource, error) {
	w := &meshcav1.Workload{
		SpiffeId: who.ID().String(),
		Bundle:   &meshcav1.Bundle{TrustDomain: bundle.TrustDomain().String(), Sequence: bundle.Sequence()},
	}
	for _, a := range bundle.Authorities() {
		w.Bundle.X509Authorities = append(w.Bundle.X509Authorities, a.Raw)
	}
	content, err := proto.MarshalOptions{Deterministic: true}.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("encoding the resource of %s: %w", who.ID(), err)
	}
	hash := sha256.Sum256(content)
	return &discovery.Resource{
		Name:     name,
		Version:  fmt.Sprintf("%d-%x", bundle.Sequence(), hash[:8]),
		Resource: &anypb.Any{TypeUrl: meshcav1.TypeURL, Value: content},
	}, nil
}
