package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/wire"
)

// PolicySource is the policy that holds for the workload, kept current by the
// agent. It is safe for concurrent use. Use [NewPolicy], then [PolicySource.Run].
type PolicySource struct {
	conf Config

	mu      sync.Mutex       // never held while logging
	held    *policy.Resolved // nil until the first
	why     error            // why there is none
	changed chan struct{}
}

// NewPolicy makes a source that holds nothing yet. It contacts nobody.
func NewPolicy(c Config) (*PolicySource, error) {
	if c.Socket == "" || c.Log == nil {
		return nil, errors.New("policy client: Socket and Log must both be given")
	}
	return &PolicySource{
		conf: c, changed: make(chan struct{}),
		why: fmt.Errorf("the agent at %q has not sent one yet", c.Socket),
	}, nil
}

// Run follows the agent until ctx ends. What goes wrong on the way is logged and
// tried again; what was received stays.
func (s *PolicySource) Run(ctx context.Context) error {
	conn, err := dial(s.conf.Socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	api := discovery.NewAggregatedDiscoveryServiceClient(conn)
	said := ""
	again(ctx, func() bool {
		taken, err := s.follow(ctx, api)
		if ctx.Err() != nil {
			return false
		}
		if taken {
			said = ""
		}
		s.lost(fmt.Errorf("asking the agent at %q: %s", s.conf.Socket, reason(err)))
		if why := reason(err); why != said { // once for each kind of trouble
			said = why
			text := "no policy from the agent yet; trying again"
			if s.has() {
				text = "the agent's stream of policies has ended; the last one stays in force"
			}
			s.conf.Log.Warn(text, "socket", s.conf.Socket, "reason", why)
		}
		return taken
	})
	return nil
}

// follow takes what one stream brings until the stream ends, which always is an
// error. It reports whether the stream brought anything of use.
func (s *PolicySource) follow(ctx context.Context, api discovery.AggregatedDiscoveryServiceClient) (taken bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := api.DeltaAggregatedResources(ctx)
	if err != nil {
		return false, err
	}
	first := &discovery.DeltaDiscoveryRequest{
		Node:                   &core.Node{Id: "meshca-proxy", UserAgentName: "meshca-proxy"},
		TypeUrl:                wire.TypeURL,
		ResourceNamesSubscribe: []string{"*"},
	}
	// Where Send fails, the reason comes from Recv.
	if err := stream.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return taken, err
		}
		refusal := s.accept(resp)
		if refusal == nil {
			taken = true
		} else {
			s.lost(refusal)
			s.conf.Log.Error("the agent sent a policy that cannot be used; what was received before stays in force",
				"socket", s.conf.Socket, "error", refusal.Error())
		}
		answer := &discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResponseNonce: resp.GetNonce()}
		if refusal != nil {
			answer.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: shorten(refusal.Error())}
		}
		if err := stream.Send(answer); err != nil && !errors.Is(err, io.EOF) {
			return taken, err
		}
	}
}

// accept takes one response over, or says why not. What it says of removed
// resources takes nothing away.
func (s *PolicySource) accept(resp *discovery.DeltaDiscoveryResponse) error {
	if resp.GetTypeUrl() != wire.TypeURL {
		return fmt.Errorf("the response is of type %q, not %q", shorten(resp.GetTypeUrl()), wire.TypeURL)
	}
	if n := len(resp.GetResources()); n > 1 {
		return fmt.Errorf("the response has %d workloads; there is one here", n)
	}
	for _, r := range resp.GetResources() {
		id, err := identity.ParseID(r.GetName())
		if err != nil {
			return fmt.Errorf("the resource's name: %w", err)
		}
		w, err := wire.Parse(id.TrustDomain(), r.GetResource())
		if err != nil {
			return fmt.Errorf("resource %q: %w", shorten(r.GetName()), err)
		}
		if w.ID != id {
			return fmt.Errorf("resource %q is about %s", shorten(r.GetName()), w.ID)
		}
		if err := s.take(w.Policy); err != nil {
			return err
		}
	}
	return nil
}

// take puts a policy in force, or says why it may not take the place of the one
// that is.
func (s *PolicySource) take(p *policy.Resolved) error {
	if p == nil {
		s.lost(errors.New("the agent has none: the CA was given no policies, or the agent has not reached it yet, or refuses what it sends; the agent's log says which"))
		return nil
	}
	s.mu.Lock()
	held := s.held
	taken, err := p.Succeeds(held)
	if !taken {
		s.mu.Unlock()
		return err
	}
	s.held = p
	news := held == nil || !held.Equal(p.Result)
	if news {
		close(s.changed)
		s.changed = make(chan struct{})
	}
	s.mu.Unlock()
	if news {
		s.conf.Log.Info("policy in force", "version", p.Version, "workload_version", p.WorkloadVersion, "mode", p.Mode.String(), "source", p.Source.String(), "ports", p.DescribePorts())
	}
	return nil
}

// lost notes why there is none, for whoever asks while there is none.
func (s *PolicySource) lost(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held != nil {
		return
	}
	before := s.why
	s.why = why
	if before.Error() != why.Error() {
		// Whoever waits may want to say why.
		close(s.changed)
		s.changed = make(chan struct{})
	}
}

func (s *PolicySource) has() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held != nil
}

// Policy returns what holds for the workload. Without one the error says why;
// once there has been one, there always is.
func (s *PolicySource) Policy() (policy.Resolved, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		return policy.Resolved{}, s.why
	}
	return *s.held, nil
}

// Changed returns a channel that is closed when [PolicySource.Policy] has
// something else to say.
func (s *PolicySource) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}
