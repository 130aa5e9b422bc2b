package server

import (
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	istio "istio.io/api/security/v1alpha1"
)

// healthService is grpc.health.v1.Health, the one service that answers without
// credentials: load balancers and kubelets have none, and all it tells is one
// bit. Watch and List are not implemented, since a call that stays open is more
// than a stranger should get.
type healthService struct{ s *Server }

// desc describes the service to gRPC, like that of csrService.
func (h *healthService) desc() *grpc.ServiceDesc {
	return h.s.headersFirst(grpc_health_v1.Health_ServiceDesc.ServiceName, "Check", func(stream grpc.ServerStream) (any, error) {
		leave, err := h.s.healthChecks.enter(sourceOfCall(stream.Context()))
		if err != nil {
			return nil, &callError{code: codes.ResourceExhausted, err: err}
		}
		defer leave()
		req := &grpc_health_v1.HealthCheckRequest{}
		if err := stream.RecvMsg(req); err != nil {
			return nil, readError(err)
		}
		return h.check(req)
	})
}

// check answers for the whole server and for each of its services alike.
func (h *healthService) check(req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	switch req.GetService() {
	case "", istio.IstioCertificateService_ServiceDesc.ServiceName, discovery.AggregatedDiscoveryService_ServiceDesc.ServiceName:
	default:
		return nil, refusef(codes.NotFound, "there is no service %.256q to be healthy", req.GetService())
	}
	state := grpc_health_v1.HealthCheckResponse_SERVING
	if h.s.Ready() != nil {
		state = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	return &grpc_health_v1.HealthCheckResponse{Status: state}, nil
}
