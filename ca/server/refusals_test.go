package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

var asn1Serial = big.NewInt(7)

var wireForm = regexp.MustCompile(`^([a-z ]+) \(ref ([0-9a-f]{16})\)$`)

// referenceOf returns the reference of a refusal, and demands that there is
// nothing else in it but the constant text.
func referenceOf(t testing.TB, err error) string {
	t.Helper()
	st := status.Convert(err)
	m := wireForm.FindStringSubmatch(st.Message())
	if m == nil || m[1] != wireText(st.Code()) {
		t.Fatalf("the wire says %q; want %q and a reference", st.Message(), wireText(st.Code()))
	}
	return m[2]
}

// unsigned replaces a token's header and signature.
func unsigned(t testing.TB, raw, header string, sign func(input string) []byte) string {
	t.Helper()
	parts := strings.Split(raw, ".")
	input := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + parts[1]
	return input + "." + base64.RawURLEncoding.EncodeToString(sign(input))
}

func giantCSR(t testing.TB) string {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 16383))
	must(t, err)
	n.SetBit(n.SetBit(n, 16383, 1), 0, 1)
	spki, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: n, E: 65537})
	must(t, err)
	body, err := asn1.Marshal(struct {
		Version    int
		Subject    asn1.RawValue
		Key        asn1.RawValue
		Attributes asn1.RawValue
	}{0, asn1.RawValue{FullBytes: []byte{0x30, 0}}, asn1.RawValue{FullBytes: spki}, asn1.RawValue{FullBytes: []byte{0xa0, 0}}})
	must(t, err)
	der, err := asn1.Marshal(struct {
		Body      asn1.RawValue
		Algorithm struct {
			OID    asn1.ObjectIdentifier
			Params asn1.RawValue
		}
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: body}, struct {
		OID    asn1.ObjectIdentifier
		Params asn1.RawValue
	}{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, asn1.NullRawValue}, asn1.BitString{Bytes: make([]byte, 2048), BitLength: 16384}})
	must(t, err)
	return armor(der)
}

func overLimit(t testing.TB) string {
	t.Helper()
	n := MaxMessage + 1
	for proto.Size(&istio.IstioCertificateRequest{Csr: strings.Repeat("x", n)}) > MaxMessage+1 {
		n--
	}
	return strings.Repeat("x", n)
}

// The ten refusals that matter most: the right code on the wire with a constant
// text, and one line in the log with the same reference and the real reason.
func TestT19_T16_T17_V37_TenWorstRefusals(t *testing.T) {
	h := start(t, nil)
	key := catest.NewKey(t)
	good, goodToken := newCSR(t, key, nil), h.token(t, nil)
	past, err := tokenissuer.New(tokenissuer.Config{URL: catest.Issuer, Key: h.tokenKey, Now: func() time.Time { return time.Now().Add(-2 * time.Hour) }})
	must(t, err)
	expired, err := past.Issue(claims())
	must(t, err)
	hmacToken := func() string {
		der, err := x509.MarshalPKIXPublicKey(h.tokenKey.Public())
		must(t, err)
		return unsigned(t, goodToken, `{"alg":"HS256","typ":"JWT"}`, func(input string) []byte {
			m := hmac.New(sha256.New, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
			m.Write([]byte(input))
			return m.Sum(nil)
		})
	}
	uris := func(list ...string) string {
		return newCSR(t, key, func(c *x509.CertificateRequest) {
			for _, s := range list {
				u, err := url.Parse(s)
				must(t, err)
				c.URIs = append(c.URIs, u)
			}
		})
	}
	badSignature := func() string {
		block, _ := pem.Decode([]byte(good))
		block.Bytes[len(block.Bytes)-1] ^= 1
		return armor(block.Bytes)
	}
	const admin = "spiffe://cluster.local/ns/shop/sa/admin"
	tests := []struct {
		name, token, csr string
		code             codes.Code
		reason           string
	}{
		{"wrong audience", h.token(t, func(c *tokenissuer.Claims) { c.Audience = []string{"vault"} }), good, codes.Unauthenticated, `does not hold "meshca"`},
		{"expired", expired, good, codes.Unauthenticated, "expired 1h0m"},
		{"alg none", unsigned(t, goodToken, `{"alg":"none"}`, func(string) []byte { return nil }), good, codes.Unauthenticated, "token: "},
		{"HS256 with the public key", hmacToken(), good, codes.Unauthenticated, "HS256"},
		{"two URI SANs", goodToken, uris(cartURI, admin), codes.InvalidArgument, `asks for the identity "` + admin + `"`},
		{"another's ID", goodToken, uris(admin), codes.InvalidArgument, `asks for the identity "` + admin + `"`},
		{"bad self-signature", goodToken, badSignature(), codes.InvalidArgument, "not by its own key"},
		{"RSA-16384", goodToken, giantCSR(t), codes.InvalidArgument, "has 16384 bits; 2048 to 4096 are accepted"},
		{"64 KiB and one byte", goodToken, overLimit(t), codes.ResourceExhausted, "larger than max"},
		{"trailing bytes", goodToken, good + "x", codes.InvalidArgument, "after its PEM block"},
	}
	client := istio.NewIstioCertificateServiceClient(h.dial(t, nil))
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := h.metric(t, "meshca_ca_requests_total", outcome(tt.code))
			resp, err := client.CreateCertificate(bearer(t, "Bearer "+tt.token), &istio.IstioCertificateRequest{Csr: tt.csr})
			if status.Code(err) != tt.code || resp != nil {
				t.Fatalf("%v, %v; want %v", resp, err, tt.code)
			}
			var line map[string]any
			if tt.code == codes.ResourceExhausted {
				// gRPC's own refusal has gRPC's text; the log has the rest.
				line = h.log.wait(t, "refused", tt.reason)
			} else {
				line = h.log.wait(t, referenceOf(t, err))
			}
			if reason := line["reason"].(string); !strings.Contains(reason, tt.reason) {
				t.Errorf("reason %q; want %q in it", reason, tt.reason)
			}
			if line["code"] != tt.code.String() || !strings.HasPrefix(line["peer"].(string), "127.0.0.1:") ||
				!strings.HasSuffix(line["method"].(string), "/CreateCertificate") {
				t.Errorf("log line %v", line)
			}
			if tt.code == codes.InvalidArgument {
				if who, _ := line["caller"].(map[string]any); who["spiffe_id"] != cartURI || who["pod_uid"] != podUID {
					t.Errorf("the line names the caller as %v", line["caller"])
				}
			}
			if after := h.metric(t, "meshca_ca_requests_total", outcome(tt.code)); after != before+1 {
				t.Errorf("outcome %q was counted %v times", outcome(tt.code), after-before)
			}
		})
	}
	// And the same key, token and CSR without the fault pass.
	if _, err := client.CreateCertificate(bearer(t, "Bearer "+goodToken), &istio.IstioCertificateRequest{Csr: good}); err != nil {
		t.Error(err)
	}
}

// A passing fault is never the caller's: Istio's agents act on the difference.
func TestCodeOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want codes.Code
	}{
		{&caller.RefusedError{Err: errors.New("x")}, codes.Unauthenticated},
		{&caller.UnavailableError{Err: errors.New("x")}, codes.Unavailable},
		{fmt.Errorf("issuing: %w", &ca.NotReadyError{Reason: "x"}), codes.Unavailable},
		{&ca.LifetimeError{}, codes.Unavailable},
		{&ca.AuditError{Err: errors.New("x")}, codes.Unavailable},
		{&ca.KeyError{}, codes.InvalidArgument},
		{context.DeadlineExceeded, codes.Unavailable},
		{fmt.Errorf("x: %w", context.Canceled), codes.Canceled},
		{errors.New("x"), codes.Internal},
		{status.Error(codes.OK, ""), codes.Internal},
	} {
		if tt.err == nil {
			continue
		}
		if got := codeOf(tt.err); got != tt.want {
			t.Errorf("codeOf(%v) = %v; want %v", tt.err, got, tt.want)
		}
	}
}

// T14 for this package: text that a caller controls cannot forge a log line.
func TestV66_T14_LogLinesStayLines(t *testing.T) {
	h := start(t, nil)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	evil := "x\n{\"level\":\"INFO\",\"msg\":\"forged\"}\n" + strings.Repeat("y", 1000)
	_, err = h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, key, func(c *x509.CertificateRequest) { c.Subject.CommonName = evil })})
	if status.Code(err) != codes.InvalidArgument {
		t.Fatal(err)
	}
	line := h.log.wait(t, referenceOf(t, err))
	if reason := line["reason"].(string); len(reason) > 1500 || strings.Contains(reason, "\n") || !strings.Contains(reason, `x\n`) {
		t.Errorf("reason %q", reason)
	}
	if bytes.Contains([]byte(h.log.String()), []byte("\n{\"level\":\"INFO\",\"msg\":\"forged\"")) {
		t.Error("a line was forged")
	}
}

// leaver is a client that has gone when its answer is ready.
type leaver struct {
	grpc.ServerStream
	ctx context.Context
	req *istio.IstioCertificateRequest
}

func (l leaver) Context() context.Context { return l.ctx }
func (l leaver) RecvMsg(into any) error   { return reading(l.req)(into.(*istio.IstioCertificateRequest)) }
func (l leaver) SendMsg(any) error        { return status.Error(codes.Unavailable, "transport is closing") }

// A call that succeeded counts as that, once, though its client did not wait.
func TestT19_ClientLeavesBeforeTheAnswer(t *testing.T) {
	h := start(t, nil)
	tagger := &callTagger{h.server}
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer "+h.token(t, nil)))
	ctx = tagger.TagRPC(ctx, &stats.RPCTagInfo{FullMethodName: istio.IstioCertificateService_CreateCertificate_FullMethodName})
	err := (&csrService{s: h.server}).desc().Streams[0].Handler(nil, leaver{ctx: ctx, req: &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)}})
	tagger.HandleRPC(ctx, &stats.End{Error: err})
	if status.Code(err) != codes.Canceled {
		t.Errorf("%v; want Canceled", err)
	}
	// And one that left after it had been answered.
	ctx = tagger.TagRPC(ctx, &stats.RPCTagInfo{FullMethodName: istio.IstioCertificateService_CreateCertificate_FullMethodName})
	must(t, h.server.edge(ctx, func() error { return nil }))
	tagger.HandleRPC(ctx, &stats.End{Error: status.Error(codes.Unavailable, "transport is closing")})
	if found, _ := h.log.find("refused"); len(found) != 0 {
		t.Errorf("logged as refused: %v", found)
	}
	for outcome, want := range map[string]float64{"ok": 1, "canceled": 0, "unavailable": 0, "internal": 0} {
		if n := h.metric(t, "meshca_ca_requests_total", outcome); n != want {
			t.Errorf("outcome %q was counted %v times; want %v", outcome, n, want)
		}
	}
}

// What strangers cause is said with the same few words and at the same level
// each time, so that a log can be protected from repetition by message and code.
func TestT19_T17_StrangersLinesAreAlike(t *testing.T) {
	h := start(t, nil)
	client := istio.NewIstioCertificateServiceClient(h.dial(t, nil))
	for _, value := range []string{"Bearer x", "Bearer " + strings.Repeat("y", 9000), "Basic z", "Bearer " + unsigned(t, h.token(t, nil), `{"alg":"none"}`, func(string) []byte { return nil })} {
		_, err := client.CreateCertificate(bearer(t, value), &istio.IstioCertificateRequest{})
		line := h.log.wait(t, referenceOf(t, err))
		if line["msg"] != "refused" || line["level"] != "WARN" || line["code"] != "Unauthenticated" {
			t.Errorf("log line %v", line)
		}
		if reason := line["reason"].(string); len(reason) > 1024 {
			t.Errorf("a reason of %d bytes", len(reason))
		}
	}
}
