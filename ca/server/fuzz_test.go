package server

import (
	"context"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
)

// FuzzCreateCertificate drives the handler with any request and any
// authorization value: it neither panics nor blames itself, and what it signs
// is for the token's subject.
func FuzzCreateCertificate(f *testing.F) {
	h := start(f, nil)
	good := "Bearer " + h.token(f, nil)
	md, err := structpb.NewStruct(map[string]any{"CertSigner": "x", "ImpersonatedIdentity": []any{1.0, nil, map[string]any{"a": true}}})
	must(f, err)
	for _, req := range []*istio.IstioCertificateRequest{
		{}, {Csr: newCSR(f, catest.NewKey(f), nil), ValidityDuration: -1}, {Csr: giantCSR(f), Metadata: md},
	} {
		b, err := proto.Marshal(req)
		must(f, err)
		f.Add(b, "x", false)
		f.Add(b, "", true)
	}
	service := &csrService{s: h.server}
	f.Fuzz(func(t *testing.T, body []byte, authorization string, withToken bool) {
		req := &istio.IstioCertificateRequest{}
		if proto.Unmarshal(body, req) != nil {
			return
		}
		if withToken { // or the fuzzer would never get behind it
			authorization = good
		}
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", authorization))
		resp, err := service.issue(ctx, reading(req))
		if err != nil {
			switch code := codeOf(err); code {
			case codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument:
			default:
				t.Errorf("%v: %v", code, err)
			}
			return
		}
		certs, err := identity.ParsePEM([]byte(resp.GetCertChain()[0]))
		must(t, err)
		if len(certs[0].URIs) != 1 || certs[0].URIs[0].String() != cartURI || len(certs[0].DNSNames) != 0 {
			t.Errorf("signed for %v %v", certs[0].URIs, certs[0].DNSNames)
		}
	})
}

// reading stands in for a message that has arrived.
func reading(req *istio.IstioCertificateRequest) func(*istio.IstioCertificateRequest) error {
	return func(into *istio.IstioCertificateRequest) error {
		proto.Merge(into, req)
		return nil
	}
}

// BenchmarkCreateCertificate is one call in process: token, CSR and signature,
// without the network.
func BenchmarkCreateCertificate(b *testing.B) {
	h := start(b, nil)
	service := &csrService{s: h.server}
	req := &istio.IstioCertificateRequest{Csr: newCSR(b, catest.NewKey(b), nil)}
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", "Bearer "+h.token(b, nil)))
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := service.issue(ctx, reading(req)); err != nil {
				b.Error(err)
			}
		}
	})
}

// BenchmarkCreateCertificateTLS is the same over loopback TLS, one connection.
func BenchmarkCreateCertificateTLS(b *testing.B) {
	h := start(b, nil)
	client := istio.NewIstioCertificateServiceClient(h.dial(b, nil))
	req := &istio.IstioCertificateRequest{Csr: newCSR(b, catest.NewKey(b), nil)}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+h.token(b, nil))
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := client.CreateCertificate(ctx, req); err != nil {
				b.Error(err)
			}
		}
	})
}
