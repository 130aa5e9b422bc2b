package server

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/csr"
	"github.com/meshca/meshca/identity"
)

// impersonated is the request metadata by which ztunnel asks for the identity
// of another workload on its node.
const impersonated = "ImpersonatedIdentity"

// csrService is istio.v1.auth.IstioCertificateService.
type csrService struct {
	s     *Server
	above atomic.Pointer[above]
}

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

// create is the whole of issuing: who asks, what for, wait for a turn, sign. The
// caller comes before the place in the queue, so that nobody unknown takes one, and
// before the message, so that nobody unknown has us keep half of one.
func (c *csrService) create(ctx context.Context, read func(*istio.IstioCertificateRequest) error) (*istio.IstioCertificateResponse, error) {
	who, err := c.s.authenticate(ctx)
	if err != nil {
		return nil, err
	}
	leave, err := c.s.calls.enter(keyOf(ctx, who))
	var full *fullError
	switch {
	case errors.As(err, &full):
		return nil, busy(err, c.s.queue.delay(c.classOf(who)))
	case err != nil:
		return nil, &callError{code: codes.ResourceExhausted, err: err}
	}
	defer leave()
	req := &istio.IstioCertificateRequest{}
	if err := read(req); err != nil {
		return nil, readError(err)
	}
	if err := checkMetadata(req.GetMetadata()); err != nil {
		return nil, err
	}
	asked := lifetime(req.GetValidityDuration())
	bundle, _ := c.s.authority.Bundle()
	resp, again, err := c.s.answers.get(ctx, requestOf(who, req.GetCsr(), asked), bundle, c.s.callTimeout, func(ctx context.Context) (*istio.IstioCertificateResponse, error) {
		return c.inTurn(ctx, who, req.GetCsr(), asked)
	})
	if again {
		c.s.metrics.repeated.Inc()
	}
	return resp, err
}

// inTurn signs when there is a worker for it.
func (c *csrService) inTurn(ctx context.Context, who *caller.Caller, request string, asked time.Duration) (resp *istio.IstioCertificateResponse, err error) {
	began := time.Now()
	waited := c.s.queue.do(ctx, c.classOf(who), cmp.Or(who.Node(), who.Resource()), func() {
		c.s.metrics.waited.Observe(time.Since(began).Seconds())
		resp, err = c.sign(ctx, who, request, asked)
	})
	var full *busyError
	switch {
	case errors.As(waited, &full):
		return nil, busy(waited, full.After)
	case waited != nil:
		return nil, waited
	}
	return resp, err
}

// classOf tells a renewal from a first certificate as far as this replica knows: for
// others' certificates it waits in the shorter line.
func (c *csrService) classOf(who *caller.Caller) class {
	if c.s.census.Holds(who.Resource(), c.s.now()) {
		return renewal
	}
	return first
}

func (c *csrService) sign(ctx context.Context, who *caller.Caller, request string, asked time.Duration) (*istio.IstioCertificateResponse, error) {
	pub, err := csr.Parse([]byte(request), who.ID())
	if err != nil {
		return nil, err
	}
	issued, err := c.s.authority.Issue(ctx, who, pub, asked)
	if err != nil {
		return nil, err
	}
	c.s.census.Issued(who.Resource(), who.ID(), who.Node(), c.s.now(), issued.Chain[0].NotAfter)
	return c.answer(issued)
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
func (c *csrService) answer(issued *ca.Issued) (*istio.IstioCertificateResponse, error) {
	if len(issued.Bundle.Authorities()) == 0 {
		return nil, errors.New("the bundle has no authority to answer with")
	}
	rest := c.above.Load()
	if rest == nil || !rest.of(issued) {
		rest = newAbove(issued)
		c.above.Store(rest)
	}
	return &istio.IstioCertificateResponse{CertChain: append([]string{string(identity.EncodePEM(issued.Chain[0]))}, rest.elements...)}, nil
}

// above is what answers hold beside the leaf. It is the same in nearly all of them,
// and shared: answers are kept, and read only.
type above struct {
	chain    []*x509.Certificate
	bundle   *identity.Bundle
	elements []string
}

func newAbove(issued *ca.Issued) *above {
	a := &above{chain: issued.Chain[1:], bundle: issued.Bundle}
	for _, c := range a.chain {
		a.elements = append(a.elements, string(identity.EncodePEM(c)))
	}
	a.elements = append(a.elements, string(issued.Bundle.MarshalPEM()))
	return a
}

// of reports whether issued has the same issuers, in memory, and the same roots.
func (a *above) of(issued *ca.Issued) bool {
	return a.bundle == issued.Bundle && slices.Equal(a.chain, issued.Chain[1:])
}
