package server

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/csr/csrtest"
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
	for _, v := range csrtest.All(f) {
		if m := message(v.PEM); len(m) <= MaxMessage {
			f.Add(m, "", true)
		}
	}
	for _, value := range hostile(h.token(f, nil)) {
		f.Add([]byte(nil), value, false)
	}
	f.Add(deepMetadata(100), "", true)
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

// FuzzCredentials reads any authorization values: one that begins as it should is
// taken as it is, none is none, and what is refused is not repeated.
func FuzzCredentials(f *testing.F) {
	f.Add("Bearer x", "", 1)
	f.Add("Bearer x", "Bearer y", 2)
	f.Add("Bearer ", "bearer x", 2)
	for _, value := range hostile("header.payload-payload-payload.signature-signature") {
		f.Add(value, value, 1)
	}
	f.Fuzz(func(t *testing.T, first, second string, count int) {
		values := []string{first, second}[:min(max(count, 0), 2)]
		creds, err := credentialsOf(metadata.NewIncomingContext(t.Context(), metadata.MD{"authorization": values, "x": {first}}))
		token, isBearer := strings.CutPrefix(first, bearerPrefix)
		switch {
		case len(values) == 0 && (err != nil || creds.Bearer != ""):
			t.Errorf("without a value: %q, %v", creds.Bearer, err)
		case len(values) == 1 && isBearer && token != "" && (err != nil || creds.Bearer != token):
			t.Errorf("%q was read as %q, %v", first, creds.Bearer, err)
		case (len(values) > 1 || len(values) == 1 && (!isBearer || token == "")) && (codeOf(err) != codes.Unauthenticated || creds.Bearer != ""):
			t.Errorf("%q were read as %q, %v", values, creds.Bearer, err)
		}
		if err != nil && len(first) > 20 && strings.Contains(err.Error(), first) {
			t.Errorf("%q is in the error: %v", first, err)
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

// requests are more different ones than answers are kept, so that none is repeated.
func requests(b *testing.B) func() *istio.IstioCertificateRequest {
	b.Helper()
	var all []*istio.IstioCertificateRequest
	for range mostAnswers + 64 {
		all = append(all, &istio.IstioCertificateRequest{Csr: newCSR(b, catest.NewKey(b), nil)})
	}
	var next atomic.Uint64
	b.ResetTimer()
	return func() *istio.IstioCertificateRequest { return all[next.Add(1)%uint64(len(all))] }
}

// BenchmarkCreateCertificate is one call in process: token, CSR and signature,
// without the network.
func BenchmarkCreateCertificate(b *testing.B) {
	h := start(b, nil)
	service := &csrService{s: h.server}
	next := requests(b)
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", "Bearer "+h.token(b, nil)))
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := service.issue(ctx, reading(next())); err != nil {
				b.Error(err)
			}
		}
	})
}

// BenchmarkCreateCertificateTLS is the same over loopback TLS, one connection.
func BenchmarkCreateCertificateTLS(b *testing.B) {
	h := start(b, nil)
	client := istio.NewIstioCertificateServiceClient(h.dial(b, nil))
	next := requests(b)
	ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+h.token(b, nil))
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := client.CreateCertificate(ctx, next()); err != nil {
				b.Error(err)
			}
		}
	})
}
