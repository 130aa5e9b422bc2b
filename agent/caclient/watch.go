package caclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

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
	// Names are the resources to subscribe to, by name; nil means the wildcard,
	// under which the CA decides from the token what there is to see. It must not
	// be empty when a stream is opened.
	Names *Names
	// Apply takes a workload over, which came under a name. An error refuses it:
	// its text goes to the CA as a NACK. Required.
	Apply func(name string, w wire.Workload) error
	// Removed is told that the CA does not have a resource, or not any more; may
	// be nil.
	Removed func(name string)
	// Ignored is told of a resource that is not among the names; may be nil.
	Ignored func(name string)
	// Refused is told why a response was refused; may be nil.
	Refused func(error)
	// Connected is told of each stream's beginning and end; may be nil.
	Connected func(bool)

	versions map[string]string // resource name → version held
	told     map[string]uint64 // name → the addition that the CA was told of last
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
// behind. With one address the stream stays, for the CA's next version; so it
// does while it has good news of other names than the one that was refused.
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
	sub := &subscription{watch: w, parse: func(r *discovery.Resource) (wire.Workload, error) {
		return wire.Parse(c.conf.TrustDomain, r.GetResource())
	}}
	first, err := sub.begin()
	if err != nil {
		return errStop{err}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(l.cc).
		DeltaAggregatedResources(ctx, grpc.PerRPCCredentials(bearer(token)))
	if err != nil {
		return c.explainRefusal(c.callError(doingWatch, l, err), token)
	}
	// Where Send fails, the reason comes from Recv.
	if err := stream.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return c.callError(doingWatch, l, err)
	}
	if w.Connected != nil {
		w.Connected(true)
		defer w.Connected(false)
	}
	responses := receive(ctx, stream)
	defer func() {
		cancel()
		for range responses { // until the receiver has ended
		}
	}()
	for answered := false; ; {
		changed, later := sub.due()
		select {
		case <-later:
			sub.later = nil
		case <-changed:
			if req := sub.change(); req != nil {
				_ = stream.Send(req) // Recv says why it failed
			}
		case r, ok := <-responses:
			if !ok {
				return context.Cause(ctx)
			}
			if r.err != nil {
				return c.streamEnd(l, r.err, token, answered)
			}
			answered = true
			if refusal := c.answer(stream, sub, r.resp); refusal != nil && len(c.conf.Addresses) > 1 && sub.hopeless() {
				leave(stream, responses, cancel)
				return errStop{&NackError{Address: c.conf.Addresses[l.n], Err: refusal}}
			}
		}
	}
}

// streamEnd judges what ended a stream.
func (c *Client) streamEnd(l *link, err error, token string, answered bool) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	err = c.explainRefusal(c.callError(doingWatch, l, err), token)
	if answered {
		// It did answer; that is no reason to ask the others at once.
		err = errStop{&UnreachableError{Doing: doingWatch, Attempts: []Attempt{{c.conf.Addresses[l.n], err}}}}
	}
	return err
}

// answer applies a response and acknowledges it, or refuses it and says why. It
// returns a refusal that the CA was told of.
func (c *Client) answer(stream deltaStream, sub *subscription, resp *discovery.DeltaDiscoveryResponse) (refusal error) {
	refusal = sub.accept(resp)
	if refusal != nil && sub.watch.Refused != nil {
		sub.watch.Refused(refusal)
	}
	if stream.Send(reply(resp, refusal)) != nil {
		return nil // Recv says why
	}
	return refusal
}

type deltaStream = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// response is what one Recv returned.
type response struct {
	resp *discovery.DeltaDiscoveryResponse
	err  error
}

// receive reads a stream until it ends or ctx does, and then closes the channel.
// The next response is read once the one before has been taken, so that the
// CA's pace is ours.
func receive(ctx context.Context, stream deltaStream) <-chan response {
	out := make(chan response)
	go func() {
		defer close(out)
		for {
			resp, err := stream.Recv()
			select {
			case out <- response{resp, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return out
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
func leave(stream deltaStream, responses <-chan response, cancel context.CancelFunc) {
	defer time.AfterFunc(farewell, cancel).Stop()
	if stream.CloseSend() != nil {
		return
	}
	for r := range responses {
		if r.err != nil {
			return
		}
	}
}
