package sds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// StreamSecrets is SDS, state of the world.
func (s *Server) StreamSecrets(stream secretservice.SecretDiscoveryService_StreamSecretsServer) error {
	x := &sotw{names: nameShare{of: &s.names}}
	defer x.names.set(0, 0)
	return converse(s, consumerSotW, stream, x)
}

// DeltaSecrets is SDS, incremental.
func (s *Server) DeltaSecrets(stream secretservice.SecretDiscoveryService_DeltaSecretsServer) error {
	x := &delta{names: nameShare{of: &s.names}}
	defer x.names.set(0, 0)
	return converse(s, consumerDelta, stream, x)
}

// FetchSecrets is SDS without a stream: what there is now of what is asked for.
// It is Unavailable when there is nothing yet, and there may be soon.
func (s *Server) FetchSecrets(_ context.Context, r *discovery.DiscoveryRequest) (*discovery.DiscoveryResponse, error) {
	var x sotw
	if _, err := x.request(r); err != nil {
		s.metrics.refuse(refusedRequest)
		return nil, err
	}
	v := s.current.Load()
	resp, d := x.respond(v)
	if resp != nil {
		s.delivered(consumerFetch, nil, v, d)
		return resp, nil
	}
	for name := range x.held {
		if !v.unknown(name) {
			s.metrics.refuse(refusedNotReady)
			return nil, status.Error(codes.Unavailable, "not there yet; try again later")
		}
	}
	return &discovery.DiscoveryResponse{VersionInfo: version(v.number), TypeUrl: secretType}, nil
}

// request is what the two variants' requests have in common.
type request interface {
	GetNode() *corev3.Node
}

// machine is one variant's state of one stream.
type machine[Req, Resp any] interface {
	request(*Req) (outcome, error)
	respond(*view) (*Resp, delivery)
}

// incoming is one result of a stream's Recv.
type incoming[Req any] struct {
	req *Req
	err error
}

// converse holds one stream until the client or the server goes away. A slow
// client is sent the newest state when it reads again, not those in between.
func converse[Req, Resp any, R interface {
	*Req
	request
}](s *Server, kind consumer, stream grpc.BidiStreamingServer[Req, Resp], x machine[Req, Resp]) error {
	ctx := stream.Context()
	c := s.open(kind)
	defer s.close(c)
	turns := make(chan struct{}, 1)
	requests := receive(s, stream, turns)
	for answered := true; ; {
		v := s.current.Load()
		if resp, d := x.respond(v); resp != nil {
			if err := stream.Send(resp); err != nil {
				return err
			}
			s.delivered(kind, c, v, d)
		}
		if answered {
			answered = false
			turns <- struct{}{}
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-v.replaced:
		case in := <-requests:
			switch {
			case errors.Is(in.err, io.EOF):
				// The client has nothing more to say and may still listen, as
				// command-line tools do.
				requests = nil
			case in.err != nil:
				return in.err
			default:
				out, err := x.request(in.req)
				if err != nil {
					s.metrics.refuse(refusedRequest)
					s.conf.Log.Warn("ending an SDS stream", "kind", kind, "node", nodeID(R(in.req)), "reason", err.Error())
					return err
				}
				s.answered(c, R(in.req), out)
				answered = true
			}
		}
	}
}

// receive reads a stream's requests until it ends, one at each turn: what a client
// sends while it reads no responses stays with gRPC, where flow control bounds it.
func receive[Req, Resp any](s *Server, stream grpc.BidiStreamingServer[Req, Resp], turns <-chan struct{}) <-chan incoming[Req] {
	requests := make(chan incoming[Req])
	s.receivers.Go(func() {
		for {
			select {
			case <-turns:
			case <-stream.Context().Done():
				return
			}
			req, err := stream.Recv()
			select {
			case requests <- incoming[Req]{req, err}:
			case <-stream.Context().Done():
				return
			}
			if err != nil {
				return
			}
		}
	})
	return requests
}

// delivered records that secrets went out. c is nil for a call that is over.
func (s *Server) delivered(kind consumer, c *stream, v *view, d delivery) {
	s.metrics.response(kind, resultSent)
	attrs := []any{slog.String("kind", string(kind))}
	if len(d.names) > 0 {
		attrs = append(attrs, slog.String("names", strings.Join(d.names, " ")))
	}
	if d.removed > 0 {
		attrs = append(attrs, slog.Int("removed", d.removed))
	}
	if v.svid != nil {
		attrs = append(attrs, slog.String("spiffe_id", v.svid.ID().String()))
	}
	if d.svid {
		attrs = append(attrs, slog.String("serial", v.svid.Serial()))
	}
	if d.sequence != 0 {
		attrs = append(attrs, slog.Uint64("bundle_sequence", d.sequence))
	}
	if c != nil {
		c.sent(d, s.conf.Now())
	}
	s.conf.Log.Info("delivered", attrs...)
}

// answered records what a client said of a response.
func (s *Server) answered(c *stream, r request, out outcome) {
	if out.result == "" {
		return
	}
	s.metrics.response(c.kind, out.result)
	switch out.result {
	case resultAcknowledged:
		c.acknowledged(out.sequence)
	case resultRejected:
		s.conf.Log.Warn("a client rejected what it was sent; it is sent the next change only",
			"kind", c.kind, "node", nodeID(r), "code", out.detail.GetCode(), "detail", quote(withoutPEM(out.detail.GetMessage())))
	}
}

// withoutPEM ends a client's complaint where PEM begins: it may quote the
// private key that it was sent.
func withoutPEM(text string) string {
	before, _, found := strings.Cut(text, "-----BEGIN")
	if found {
		return before + "[PEM left out]"
	}
	return text
}

func nodeID(r request) string { return quote(r.GetNode().GetId()) }

// quote makes outside text fit for a log: cut, and without control characters.
func quote(text string) string {
	const most = 256
	if len(text) > most {
		text = text[:most]
	}
	return fmt.Sprintf("%q", text)
}
