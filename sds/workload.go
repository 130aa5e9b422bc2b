package sds

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The JWT and WIT profiles are switched off. The standard names no code for a
// profile that an operator has disabled (SPIFFE_Workload_API §1); of those in
// SPIFFE_Workload_Endpoint, appendix A, Unimplemented is the one that tells a
// client not to try again, and so it is what the embedded
// UnimplementedSpiffeWorkloadAPIServer answers with. PermissionDenied would
// have clients ask for ever.

// FetchX509SVID streams the SVID with its key and all bundles
// (SPIFFE_Workload_API §5.2.1).
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return publish(s, consumerSVID, stream, func(v *view) *workload.X509SVIDResponse { return v.x509 })
}

// FetchX509Bundles streams all bundles, the own domain's among them
// (SPIFFE_Workload_API §5.2.2). It needs no SVID to be there.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return publish(s, consumerBundles, stream, func(v *view) *workload.X509BundlesResponse { return v.bundles })
}

// publish sends what pick finds in the current view, and again whenever that
// has become another, always the full set (§4.3).
//
// It ends with PermissionDenied as soon as the CA has refused this identity,
// and with Unavailable when there is nothing to send: at the start after
// FirstSVIDWait, later at once. The stream ends rather than let the client
// believe that what it holds is current.
func publish[Resp any](s *Server, kind consumer, stream grpc.ServerStreamingServer[Resp], pick func(*view) *Resp) error {
	ctx := stream.Context()
	c := s.open(kind)
	defer s.close(c)
	first := time.NewTimer(s.conf.FirstSVIDWait)
	defer first.Stop()
	var last *Resp
	for {
		v := s.current.Load()
		now := pick(v)
		switch {
		case v.denied != nil:
			s.metrics.refuse(refusedDenied)
			s.conf.Log.Warn("ending a Workload API stream: the CA refuses this identity", "kind", kind, "reason", quote(v.denied.Error()))
			return status.Error(codes.PermissionDenied, "no identity is issued to this workload")
		case now == nil && last != nil:
			return s.notReady(kind, "the SVID has ended and there is no newer one; try again later")
		case now != nil && now != last:
			if err := stream.Send(now); err != nil {
				return err
			}
			last = now
			s.delivered(kind, c, v, delivery{svid: kind == consumerSVID, sequence: v.sequence()})
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-v.replaced:
		case <-first.C:
			if last == nil {
				return s.notReady(kind, "there is no SVID yet; try again later")
			}
		}
	}
}

func (s *Server) notReady(kind consumer, why string) error {
	s.metrics.refuse(refusedNotReady)
	s.conf.Log.Warn("ending a Workload API stream", "kind", kind, "reason", why)
	return status.Error(codes.Unavailable, why)
}
