package sds

import (
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/wire"
)

// DeltaAggregatedResources tells the proxy beside the workload what policy
// holds for it: the CA's own resource, handed on. The stream waits until there is
// an identity, and lasts until one end goes away.
func (s *Server) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	ctx := stream.Context()
	v := s.current.Load()
	for v.workload == nil {
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-v.replaced:
		}
		v = s.current.Load()
	}
	return converse(s, consumerWorkload, stream, &workloads{wire.NewDelta(v.workload.GetName())})
}

// workloads is the state of one stream of the workload's resource. It does no
// I/O.
type workloads struct{ stream *wire.Delta }

// request takes in one request. The error ends the stream.
func (x *workloads) request(r *discovery.DeltaDiscoveryRequest) (outcome, error) {
	verdict, err := x.stream.Request(r)
	switch {
	case err != nil:
		return outcome{}, status.Error(codes.InvalidArgument, err.Error())
	case verdict == nil:
		return outcome{}, nil
	}
	switch verdict.Answer {
	case wire.Acked:
		return outcome{result: resultAcknowledged}, nil
	case wire.Nacked:
		return outcome{result: resultRejected, detail: r.GetErrorDetail()}, nil
	}
	return outcome{result: resultStale}, nil
}

// respond returns what the client has not been sent of v; nil when that is
// nothing. A workload that v does not have stays as it was sent last: who has lost
// its identity has not lost its policy.
func (x *workloads) respond(v *view) (*discovery.DeltaDiscoveryResponse, delivery) {
	if v.workload == nil {
		return nil, delivery{}
	}
	resp := x.stream.Next(v.workload)
	d := delivery{removed: len(resp.GetRemovedResources())}
	if len(resp.GetResources()) > 0 {
		d.names = []string{v.workload.GetName()}
	}
	return resp, d
}
