package server

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/csr"
	"github.com/meshca/meshca/identity"
)

// impersonated is the request metadata by which ztunnel asks for the identity
// of another workload on its node.
const impersonated = "ImpersonatedIdentity"

// csrService is istio.v1.auth.IstioCertificateService.
type csrService struct{ s *Server }

// desc describes the service to gRPC. On the wire it is what the generated one
// is. That one, however, would have us called when the whole message has
// arrived, and whoever sends half of one would be asked nothing until then.
func (c *csrService) desc() *grpc.ServiceDesc {
	return c.s.headersFirst(istio.IstioCertificateService_ServiceDesc.ServiceName, "CreateCertificate", func(stream grpc.ServerStream) (any, error) {
		return c.issue(stream.Context(), func(req *istio.IstioCertificateRequest) error { return stream.RecvMsg(req) })
	})
}

// issue counts and times one call. Read yields its message.
func (c *csrService) issue(ctx context.Context, read func(*istio.IstioCertificateRequest) error) (*istio.IstioCertificateResponse, error) {
	began := time.Now()
	code := codes.Internal // what a panic will be called
	defer func() {
		c.s.metrics.requests.WithLabelValues(outcome(code)).Inc()
		c.s.metrics.duration.Observe(time.Since(began).Seconds())
	}()
	resp, err := c.create(ctx, read)
	if err != nil {
		code = codeOf(err)
		return nil, err
	}
	code = codes.OK
	return resp, nil
}

// create is the whole of issuing: who asks, what for, sign. The caller comes
// before the place in the queue, so that nobody unknown takes one, and before
// the message, so that nobody unknown has us keep half of one.
func (c *csrService) create(ctx context.Context, read func(*istio.IstioCertificateRequest) error) (*istio.IstioCertificateResponse, error) {
	who, err := c.s.authenticate(ctx)
	if err != nil {
		return nil, err
	}
	leave, err := c.s.calls.enter(keyOf(ctx, who))
	if err != nil {
		return nil, &callError{codes.ResourceExhausted, err}
	}
	defer leave()
	req := &istio.IstioCertificateRequest{}
	if err := read(req); err != nil {
		return nil, readError(err)
	}
	if err := checkMetadata(req.GetMetadata()); err != nil {
		return nil, err
	}
	pub, err := csr.Parse([]byte(req.GetCsr()), who.ID())
	if err != nil {
		return nil, err
	}
	issued, err := c.s.authority.Issue(ctx, who, pub, lifetime(req.GetValidityDuration()))
	if err != nil {
		return nil, err
	}
	return answer(issued)
}

// checkMetadata tolerates everything that Istio's agents send and that changes
// nothing (CertSigner, ClusterID and more) and refuses impersonation: granting
// the caller's own identity instead would go unnoticed by it.
func checkMetadata(md *structpb.Struct) error {
	v, ok := md.GetFields()[impersonated]
	if !ok {
		return nil
	}
	switch kind := v.GetKind().(type) {
	case nil, *structpb.Value_NullValue:
		return nil
	case *structpb.Value_StringValue:
		if kind.StringValue == "" {
			return nil
		}
		return refusef(codes.PermissionDenied, "it asks for the identity %.256q by %s, which is not granted to anybody", kind.StringValue, impersonated)
	}
	return refusef(codes.PermissionDenied, "its %s is not a string; impersonation is not granted to anybody", impersonated)
}

// lifetime converts what was asked for; the authority bounds it. Seconds that
// would overflow a Duration are as good as the longest one.
func lifetime(seconds int64) time.Duration {
	const most = int64(ca.DefaultLeafCeiling / time.Second)
	return time.Duration(max(0, min(seconds, most))) * time.Second
}

// answer lays out a chain as Istio's clients read it: one certificate an
// element, the leaf first, and the last element holds all roots. ztunnel reads
// only the first certificate of every element but the last.
func answer(issued *ca.Issued) (*istio.IstioCertificateResponse, error) {
	if len(issued.Bundle.Authorities()) == 0 {
		return nil, errors.New("the bundle has no authority to answer with")
	}
	resp := &istio.IstioCertificateResponse{}
	for _, c := range issued.Chain {
		resp.CertChain = append(resp.CertChain, string(identity.EncodePEM(c)))
	}
	resp.CertChain = append(resp.CertChain, string(issued.Bundle.MarshalPEM()))
	return resp, nil
}
