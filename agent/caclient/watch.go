package caclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/meshca/meshca/wire"
)

// doingWatch describes the call of [Client.Watch] in errors and logs.
const doingWatch = "following the trust bundle at %s"

// farewell is how long the end of a stream is waited for after we have hung up.
const farewell = time.Second

// Watch is a subscription that outlives its streams: it remembers which versions
// it has, so that the next stream brings only what differs. Fill in the fields
// and pass it to [Client.Watch], to one call at a time.
type Watch struct {
	// Token is asked anew for each stream; required.
	Token TokenSource
	// Apply takes a workload over. An error refuses it: its text goes to the CA
	// as a NACK. Required.
	Apply func(wire.Workload) error
	// Removed is told that the CA no longer has a resource; may be nil.
	Removed func(name string)
	// Refused is told why a response was refused; may be nil.
	Refused func(error)
	// Connected is told of each stream's beginning and end; may be nil.
	Connected func(bool)

	versions map[string]string // resource name → version held
}

// NackError says that a stream was left because of what it brought. The NACK
// has been sent.
type NackError struct {
	Address string
	Err     error
}

func (e *NackError) Error() string {
	return fmt.Sprintf("refusing what %s sent: %v", e.Address, e.Err)
}

func (e *NackError) Unwrap() error { return e.Err }

// Watch opens a stream at the first CA that answers and follows it until it
// ends. It returns nil when the CA ended it in good order (its token or its
// time was up): the caller is expected to call again at once. Errors are those
// of [Client.Sign], and [*NackError].
//
// After a NACK the next CA is asked where there is another: this one may be
// behind. With one address the stream stays, for the CA's next version.
func (c *Client) Watch(ctx context.Context, w *Watch) error {
	if w.versions == nil {
		w.versions = make(map[string]string)
	}
	return c.round(ctx, doingWatch, func(_ context.Context, l *link) error {
		// Only the connection has to stand within the attempt's deadline.
		return c.follow(ctx, l, w)
	})
}

func (c *Client) follow(ctx context.Context, l *link, w *Watch) error {
	token, err := w.Token()
	if err != nil {
		return errStop{&TokenError{Err: err}}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(l.cc).
		DeltaAggregatedResources(ctx, grpc.PerRPCCredentials(bearer(token)))
	if err != nil {
		return c.explainRefusal(c.callError(doingWatch, l, err), token)
	}
	first := &discovery.DeltaDiscoveryRequest{
		Node:                    &core.Node{Id: "meshca-agent", UserAgentName: "meshca-agent"},
		TypeUrl:                 wire.TypeURL,
		ResourceNamesSubscribe:  []string{"*"},
		InitialResourceVersions: w.versions,
	}
	// Where Send fails, the reason comes from Recv.
	if err := stream.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return c.callError(doingWatch, l, err)
	}
	if w.Connected != nil {
		w.Connected(true)
		defer w.Connected(false)
	}
	for received := false; ; received = true {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			err = c.explainRefusal(c.callError(doingWatch, l, err), token)
			if received {
				// It did answer; that is no reason to ask the others at once.
				err = errStop{&UnreachableError{Doing: doingWatch, Attempts: []Attempt{{c.conf.Addresses[l.n], err}}}}
			}
			return err
		}
		refusal := c.accept(w, resp)
		if refusal != nil && w.Refused != nil {
			w.Refused(refusal)
		}
		if err := stream.Send(reply(resp, refusal)); err != nil {
			continue // Recv says why
		}
		if refusal != nil && len(c.conf.Addresses) > 1 {
			leave(stream, cancel)
			return errStop{&NackError{Address: c.conf.Addresses[l.n], Err: refusal}}
		}
	}
}

// accept applies one response, or says why not.
func (c *Client) accept(w *Watch, resp *discovery.DeltaDiscoveryResponse) error {
	if resp.GetTypeUrl() != wire.TypeURL {
		return fmt.Errorf("the response is of type %.256q, not %q", resp.GetTypeUrl(), wire.TypeURL)
	}
	workloads := make([]wire.Workload, len(resp.GetResources()))
	for i, r := range resp.GetResources() {
		var err error
		if workloads[i], err = wire.Parse(c.conf.TrustDomain, r.GetResource()); err != nil {
			return fmt.Errorf("resource %.256q: %w", r.GetName(), err)
		}
	}
	for i, r := range resp.GetResources() {
		if err := w.Apply(workloads[i]); err != nil {
			return fmt.Errorf("resource %.256q: %w", r.GetName(), err)
		}
		w.versions[r.GetName()] = r.GetVersion()
	}
	for _, name := range resp.GetRemovedResources() {
		delete(w.versions, name)
		if w.Removed != nil {
			w.Removed(name)
		}
	}
	return nil
}

// reply acknowledges a response, or refuses it with the reason.
func reply(resp *discovery.DeltaDiscoveryResponse, refusal error) *discovery.DeltaDiscoveryRequest {
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}
	if refusal != nil {
		req.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: refusal.Error()}
	}
	return req
}

// leave hangs up and gives the CA a moment to read the NACK before cancel tears
// the stream down.
func leave(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient, cancel context.CancelFunc) {
	defer time.AfterFunc(farewell, cancel).Stop()
	if stream.CloseSend() != nil {
		return
	}
	for {
		if _, err := stream.Recv(); err != nil {
			return
		}
	}
}
