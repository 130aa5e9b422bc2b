package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/types/known/durationpb"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/csr"
)

// callError is a refusal whose code does not follow from the cause's type.
type callError struct {
	code  codes.Code
	err   error
	after time.Duration // when to come back; zero if that is not said
}

func (e *callError) Error() string { return e.err.Error() }

func (e *callError) Unwrap() error { return e.err }

func refusef(code codes.Code, format string, args ...any) error {
	return &callError{code: code, err: fmt.Errorf(format, args...)}
}

// codeOf says what an error is called on the wire. What nobody foresaw is
// Internal: deny, and never as the caller's fault.
func codeOf(err error) codes.Code {
	var (
		own         *callError
		refused     *caller.RefusedError
		unavailable *caller.UnavailableError
		badCSR      *csr.RefusedError
		badKey      *ca.KeyError
		notReady    *ca.NotReadyError
		tooShort    *ca.LifetimeError
		noAudit     *ca.AuditError
	)
	switch {
	case errors.As(err, &own):
		return own.code
	case errors.As(err, &refused):
		return codes.Unauthenticated
	case errors.As(err, &badCSR), errors.As(err, &badKey):
		return codes.InvalidArgument
	case errors.As(err, &unavailable), errors.As(err, &notReady), errors.As(err, &tooShort), errors.As(err, &noAudit):
		return codes.Unavailable
	case errors.Is(err, context.DeadlineExceeded):
		return codes.Unavailable
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case status.Code(err) == codes.Unimplemented: // by the generated code
		return codes.Unimplemented
	}
	return codes.Internal
}

// wireText is all that a refused caller is told, beside the reference. It is
// constant for a code, so that it tells an attacker nothing that the code does
// not.
func wireText(c codes.Code) string {
	switch c {
	case codes.Unauthenticated:
		return "the credentials prove nothing here"
	case codes.PermissionDenied:
		return "not allowed"
	case codes.InvalidArgument:
		return "the request is not acceptable"
	case codes.ResourceExhausted:
		return "too many requests"
	case codes.Unavailable, codes.DeadlineExceeded:
		return "not available now"
	case codes.Unimplemented:
		return "no such method"
	case codes.NotFound:
		return "no such service"
	case codes.Canceled:
		return "canceled"
	}
	return "internal error"
}

// call is what is known about a call while it runs.
type call struct {
	method string
	peer   string
	who    *caller.Caller // nil until authenticated; written by its handler only
	told   atomic.Bool    // its handler has returned, and what of that is to be logged has been
}

type callKey struct{}

// callOf returns the call that ctx belongs to; callTagger makes one for each.
func callOf(ctx context.Context) *call {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c
	}
	return &call{}
}

// callTagger begins each call, and logs those that gRPC refused before a
// handler of ours saw them, such as ones with an unknown compression.
type callTagger struct{ s *Server }

func (t *callTagger) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	c := &call{method: cut(info.FullMethodName)}
	if p, ok := peer.FromContext(ctx); ok {
		c.peer = p.Addr.String()
	}
	return context.WithValue(ctx, callKey{}, c)
}

func (t *callTagger) HandleRPC(ctx context.Context, s stats.RPCStats) {
	end, ok := s.(*stats.End)
	if !ok || end.Error == nil {
		return
	}
	c := callOf(ctx)
	if c.told.Swap(true) {
		return
	}
	st := status.Convert(end.Error)
	if c.method == istio.IstioCertificateService_CreateCertificate_FullMethodName {
		t.s.metrics.requests.WithLabelValues(outcome(st.Code())).Inc()
	}
	t.s.log.Warn("refused before it was read", "method", c.method, "code", st.Code().String(), "peer", c.peer, "reason", cut(st.Message()))
}

func (t *callTagger) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

func (t *callTagger) HandleConn(context.Context, stats.ConnStats) {}

// headersFirst describes a service of one method, with one message each way,
// whose handler begins at the HEADERS. What is to be known before a message is
// taken in can then be asked first. gRPC calls such a handler without an
// interceptor.
func (s *Server) headersFirst(service, method string, handler func(grpc.ServerStream) (resp any, err error)) *grpc.ServiceDesc {
	return &grpc.ServiceDesc{ServiceName: service, HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{
		StreamName: method,
		Handler: func(_ any, stream grpc.ServerStream) error {
			return s.edge(stream.Context(), func() error {
				resp, err := handler(stream)
				if err != nil {
					return err
				}
				if err := stream.SendMsg(resp); err != nil {
					return gone(err)
				}
				return nil
			})
		},
	}}}
}

// begin sees each call's HEADERS, and has all but xDS streams end when their
// time is over, wherever they are: gRPC gives up waiting for a message when the
// context that it gets here ends. It refuses nothing; gRPC would forget to cancel
// the context of a call that is refused here, and with a deadline of the
// client's choosing that holds the connection's memory until then.
func (s *Server) begin(ctx context.Context, info *tap.Info) (context.Context, error) {
	if info.FullMethodName == discovery.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName {
		return ctx, nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.callTimeout)
	_ = cancel // gRPC cancels the parent with the end of the call, and that stops the timer
	return ctx, nil
}

func (s *Server) streamEdge(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return s.edge(stream.Context(), func() error { return handler(srv, stream) })
}

// edge is where errors turn into codes: the cause goes to the log, once, and the
// caller gets the code, its constant text and the reference to the log line.
// A panic is such an error too; the process stays up.
func (s *Server) edge(ctx context.Context, handler func() error) error {
	err := guard(handler)
	c := callOf(ctx)
	c.told.Store(true) // also if it succeeded: whether the answer arrives is no refusal
	if err == nil {
		return nil
	}
	code := codeOf(err)
	if code == codes.Canceled {
		s.log.Debug("canceled by the caller", "method", c.method, "peer", c.peer)
		return status.Error(code, wireText(code))
	}
	if r, ok := refusalOf(c, code, err); ok {
		s.refused(r)
		s.census.Refused(r.PodUID, s.now(), r.Reason)
	}
	ref := newReference()
	s.log.LogAttrs(ctx, levelOf(code), "refused", refusalAttrs(c, code, ref, err)...)
	return told(code, ref, err)
}

// told is what the caller gets to see: nothing that depends on the cause, except
// when to come back.
func told(code codes.Code, ref string, err error) error {
	s := status.New(code, wireText(code)+" (ref "+ref+")")
	var own *callError
	if errors.As(err, &own) && own.after > 0 {
		if with, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(own.after)}); err == nil {
			s = with
		}
	}
	return s.Err()
}

// refusalOf is what there is to say to a pod that was refused: nothing while its
// token proves nothing, and nothing where it should only come again.
func refusalOf(c *call, code codes.Code, err error) (Refusal, bool) {
	switch code {
	case codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument, codes.ResourceExhausted:
	default:
		return Refusal{}, false
	}
	r := Refusal{Code: code, Reason: cut(err.Error())}
	var refused *caller.RefusedError
	var own *callError
	switch {
	case errors.As(err, &own) && own.after > 0: // nothing that the pod's owner could do
		return Refusal{}, false
	case c.who != nil:
		r.Namespace, _, _ = c.who.ID().Workload()
		r.Pod, r.PodUID = c.who.Pod()
	case errors.As(err, &refused) && refused.Claims != nil:
		r.Namespace = refused.Claims.Namespace()
		r.Pod, r.PodUID = refused.Claims.Pod()
	}
	return r, r.PodUID != ""
}

func refusalAttrs(c *call, code codes.Code, ref string, err error) []slog.Attr {
	attrs := []slog.Attr{
		slog.String("ref", ref), slog.String("method", c.method), slog.String("code", code.String()),
		slog.String("peer", c.peer), slog.String("reason", err.Error()),
	}
	var refused *caller.RefusedError
	var crash *panicError
	switch {
	case c.who != nil:
		attrs = append(attrs, slog.Any("caller", c.who))
	case errors.As(err, &refused) && refused.Subject != "":
		attrs = append(attrs, slog.String("subject", cut(refused.Subject)))
	case errors.As(err, &crash):
		attrs = append(attrs, slog.String("stack", string(crash.stack)))
	}
	return attrs
}

func levelOf(code codes.Code) slog.Level {
	if code == codes.Internal {
		return slog.LevelError
	}
	return slog.LevelWarn
}

// panicError is a panic in a handler.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return cut(fmt.Sprintf("panic: %v", e.value)) }

func guard(handler func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &panicError{v, debug.Stack()}
		}
	}()
	return handler()
}

func unknownMethod(_ any, stream grpc.ServerStream) error {
	return refusef(codes.Unimplemented, "there is no method %q", callOf(stream.Context()).method)
}

// newReference links what a caller was told to a line in the log.
func newReference() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	return hex.EncodeToString(b[:])
}

// cut bounds text of unknown origin. Quoting is the log handler's.
func cut(s string) string {
	const most = 256
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
