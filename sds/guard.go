package sds

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// registrar registers services so that each of their calls passes
// [Server.guard] when its headers have arrived.
//
// gRPC runs the interceptor of a unary call when the whole request is there: one
// that is half-sent would be counted by nobody. On the wire such a call is a
// stream with one message each way, and so it is served as one. (A tap handle
// sees the headers too, but gRPC never ends the context of a call that it
// refuses: each would leave a timer for as long as the client's grpc-timeout.)
type registrar struct{ *grpc.Server }

func (r registrar) RegisterService(desc *grpc.ServiceDesc, impl any) {
	d := *desc
	d.Methods = nil
	d.Streams = slices.Clone(desc.Streams)
	for _, m := range desc.Methods {
		d.Streams = append(d.Streams, grpc.StreamDesc{
			StreamName:    m.MethodName,
			ServerStreams: true, // gRPC has stream interceptors pass over what streams in no direction
			Handler: func(srv any, stream grpc.ServerStream) error {
				resp, err := m.Handler(srv, stream.Context(), stream.RecvMsg, nil)
				if err != nil {
					return err
				}
				return stream.SendMsg(resp)
			},
		})
	}
	r.Server.RegisterService(&d, impl)
}

// guard is what every call passes before its handler.
func (s *Server) guard(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return s.surviving(info.FullMethod, func() error {
		leave, err := s.admit(stream.Context(), info.FullMethod)
		if err != nil {
			return err
		}
		defer leave()
		return next(srv, &guardedStream{ServerStream: stream, server: s, method: info.FullMethod})
	})
}

// surviving runs f. A panic in it costs that call and not the whole agent,
// which other workloads and the renewal live in.
func (s *Server) surviving(method string, f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			s.metrics.refuse(refusedPanic)
			s.conf.Log.Error("a call ended in a panic; this is a bug, please report it",
				"method", quote(method), "panic", quote(fmt.Sprint(r)), "stack", string(debug.Stack()))
			err = status.Error(codes.Internal, "internal error")
		}
	}()
	return f()
}

// guardedStream bounds what a client can ask for on one stream. As gRPC has it,
// one goroutine at a time receives.
type guardedStream struct {
	grpc.ServerStream
	server *Server
	method string
	begun  bool
	pace   *bucket
	slowed bool // and that has been told
}

// RecvMsg returns the client's next request. The first one must be there in
// requestTimeout. Later ones are read no faster than the stream's budget allows:
// flow control then stops the client. The stream is not ended, because Envoy
// would only open it again and be sent everything.
func (g *guardedStream) RecvMsg(m any) error {
	if !g.begun {
		g.begun = true
		g.pace = newBucket(requestsPerSecond, requestsBurst, time.Now())
		return g.first(m)
	}
	if err := g.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	// A pause is not a deadline: the monotonic clock is the right one.
	wait := g.pace.debt(time.Now())
	if wait <= 0 {
		return nil
	}
	g.tellSlowed()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-g.Context().Done():
		return status.FromContextError(g.Context().Err()).Err()
	}
}

func (g *guardedStream) tellSlowed() {
	if g.slowed {
		return
	}
	g.slowed = true
	g.server.metrics.slowed.Inc()
	g.server.conf.Log.Warn("a client asks faster than it is answered; its stream is slowed down",
		"method", quote(g.method), "requests_per_second", requestsPerSecond)
}

// first waits for the first request. Only the end of the call stops gRPC's own
// RecvMsg, so that it goes on in the background until then.
func (g *guardedStream) first(m any) error {
	done := make(chan error, 1)
	g.server.receivers.Go(func() {
		done <- g.server.surviving(g.method, func() error { return g.ServerStream.RecvMsg(m) })
	})
	timer := time.NewTimer(requestTimeout)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		g.server.metrics.refuse(refusedSlow)
		return status.Errorf(codes.DeadlineExceeded, "no whole request in %v", requestTimeout)
	}
}

// admit lets a call in, or says why not. Shed load is Unavailable
// (SPIFFE_Workload_Endpoint §6), which clients of both protocols retry.
func (s *Server) admit(ctx context.Context, method string) (leave func(), err error) {
	if err := requireHeader(ctx, method); err != nil {
		s.metrics.refuse(refusedHeader)
		return nil, err
	}
	if why, ok := s.admission.enter(); !ok {
		s.metrics.refuse(why)
		return nil, status.Error(codes.Unavailable, "too many calls on this socket; try again later")
	}
	return s.admission.leave, nil
}
