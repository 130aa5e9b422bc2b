package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/csr/csrtest"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// asSent is a codec that sends a request's bytes as they are; what comes back is
// an ordinary message.
type asSent struct{}

func (asSent) Name() string { return "proto" }

func (asSent) Marshal(v any) ([]byte, error) { return v.([]byte), nil }

func (asSent) Unmarshal(b []byte, v any) error { return proto.Unmarshal(b, v.(proto.Message)) }

// send makes a call with a message of any bytes.
func send(ctx context.Context, conn *grpc.ClientConn, message []byte) (*istio.IstioCertificateResponse, error) {
	resp := &istio.IstioCertificateResponse{}
	err := conn.Invoke(ctx, istio.IstioCertificateService_CreateCertificate_FullMethodName, message, resp, grpc.ForceCodec(asSent{}))
	return resp, err
}

// message is a request with nothing but a CSR, which need not be text.
func message(csr []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), csr)
}

// Every CSR that is refused, over the wire: the caller learns that it is the CSR,
// and never that its token is bad, which would have it fetch another one.
func TestV37_V41_V53_T1_T16_EveryBadCSRIsAnInvalidArgument(t *testing.T) {
	h := start(t, nil)
	conn := h.dial(t, nil)
	ctx := h.good(t)
	vectors := csrtest.All(t)
	if len(vectors) < 250 {
		t.Errorf("only %d CSRs are sent", len(vectors))
	}
	want := make(map[string]string) // reason by reference
	for name, v := range vectors {
		m := message(v.PEM)
		_, err := send(ctx, conn, m)
		code := codes.InvalidArgument
		switch {
		case len(m) > MaxMessage:
			code = codes.ResourceExhausted
		case !utf8.Valid(v.PEM):
			code = codes.Internal // gRPC's word for a message that does not decode
		}
		if status.Code(err) != code {
			t.Errorf("%s: %v; want %v", name, err, code)
		} else if code == codes.InvalidArgument {
			want[referenceOf(t, err)] = v.Reason
		}
	}
	lines, _ := h.log.find("refused")
	for _, line := range lines {
		ref, _ := line["ref"].(string)
		reason, _ := line["reason"].(string)
		if text, ok := want[ref]; ok {
			if !strings.Contains(reason, text) || line["code"] != "InvalidArgument" {
				t.Errorf("logged as %v with reason %q; want %q in it", line["code"], reason, text)
			}
			delete(want, ref)
		}
	}
	if len(want) != 0 {
		t.Errorf("%d refusals are not in the log", len(want))
	}
	// The connection and the token are as good as before.
	if _, err := send(ctx, conn, message([]byte(newCSR(t, catest.NewKey(t), nil)))); err != nil {
		t.Error(err)
	}
}

// Each kind of key that is accepted is certified, and the same CSR after a while
// yields another certificate for the same key and ID.
func TestT16_T1_GoodCSRsAreServedAgain(t *testing.T) {
	h := start(t, nil)
	conn := h.dial(t, nil)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, err)
	_, edwards, err := ed25519.GenerateKey(nil)
	must(t, err)
	for name, key := range map[string]crypto.Signer{"P-256": csrtest.ECKey(), "P-384": p384, "Ed25519": edwards, "RSA 2048": csrtest.RSAKey()} {
		text := csrtest.Draft{Key: key, Attributes: csrtest.ExtensionRequest(t, csrtest.SAN(t, true, csrtest.URI(t, cartURI)))}.PEM(t)
		serials := make(map[string]bool)
		for range 10 {
			resp, err := send(h.good(t), conn, message(text))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				break
			}
			leaf := leafOf(t, resp)
			if !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(leaf.PublicKey) || leaf.URIs[0].String() != cartURI {
				t.Errorf("%s: certified another key, or for %v", name, leaf.URIs)
			}
			serials[leaf.SerialNumber.String()] = true
			h.later(answerKept)
		}
		if len(serials) != 10 {
			t.Errorf("%s: %d serial numbers in 10 certificates", name, len(serials))
		}
	}
}

func leafOf(t testing.TB, resp *istio.IstioCertificateResponse) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(resp.GetCertChain()[0]))
	leaf, err := x509.ParseCertificate(block.Bytes)
	must(t, err)
	return leaf
}

// One CSR sent by two callers, which nothing in it forbids: each gets a
// certificate for its own ID. One that names a caller is good for that one only.
func TestT1_V41_OneKeyUnderTwoIdentities(t *testing.T) {
	h := start(t, nil)
	conn := h.dial(t, nil)
	other := bearer(t, "Bearer "+h.token(t, func(c *tokenissuer.Claims) { c.ServiceAccount = "other" }))
	const otherURI = "spiffe://cluster.local/ns/shop/sa/other"
	nameless := message(csrtest.Draft{}.PEM(t))
	for ctx, want := range map[context.Context]string{h.good(t): cartURI, other: otherURI} {
		resp, err := send(ctx, conn, nameless)
		must(t, err)
		if leaf := leafOf(t, resp); len(leaf.URIs) != 1 || leaf.URIs[0].String() != want || !csrtest.ECKey().PublicKey.Equal(leaf.PublicKey) {
			t.Errorf("certified for %v; want %s", leaf.URIs, want)
		}
	}
	named := message(csrtest.Draft{Attributes: csrtest.ExtensionRequest(t, csrtest.SAN(t, true, csrtest.URI(t, cartURI)))}.PEM(t))
	if _, err := send(other, conn, named); status.Code(err) != codes.InvalidArgument {
		t.Errorf("%v; want InvalidArgument", err)
	}
	_, err := send(h.good(t), conn, named)
	must(t, err)
}

// hostile are authorization values that a stranger might send.
func hostile(good string) map[string]string {
	part := strings.Split(good, ".")
	b64 := base64.RawURLEncoding.EncodeToString
	return map[string]string{
		"empty": "", "a space": " ", "scheme only": "Bearer", "scheme and a space": "Bearer ", "no scheme": good, "in lower case": "bearer " + good,
		"two spaces": "Bearer  " + good, "Basic": "Basic " + good, "two tokens": "Bearer " + good + ", Bearer " + good,
		"quoted": `Bearer "` + good + `"`, "typing mistake": "Bearer" + good, "dots": "Bearer ..", "many dots": "Bearer " + strings.Repeat(".", 5000),
		"8 KiB": "Bearer " + strings.Repeat("A", 8<<10), "one part": "Bearer " + part[0], "no signature": "Bearer " + part[0] + "." + part[1] + ".",
		"another signature": "Bearer " + part[0] + "." + part[1] + "." + strings.Repeat("A", len(part[2])),
		"deep header":       "Bearer " + b64([]byte(strings.Repeat("[", 700))) + "." + part[1] + "." + part[2],
		"deep claims":       "Bearer " + part[0] + "." + b64([]byte(strings.Repeat(`{"iss":`, 800))) + "." + part[2],
		"NUL in the header": "Bearer " + b64([]byte("{\"alg\":\"ES256\",\"kid\":\"\x00\"}")) + "." + part[1] + "." + part[2],
		"no UTF-8":          "Bearer " + part[0] + "." + b64([]byte("{\"iss\":\"\xff\xfe\"}")) + "." + part[2],
		"sub of colons":     "Bearer " + part[0] + "." + b64([]byte(`{"iss":"`+catest.Issuer+`","sub":"::::"}`)) + "." + part[2],
		"huge exp":          "Bearer " + part[0] + "." + b64([]byte(`{"iss":"`+catest.Issuer+`","exp":`+strings.Repeat("9", 4000)+`}`)) + "." + part[2],
		"key as a token":    "Bearer " + strings.ReplaceAll(secretKey, "\n", ""),
	}
}

// secretKey is not one, and looks like it.
const secretKey = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgCANARYCANARYCANARYCANARYCANARYCANARY\n-----END PRIVATE KEY-----\n"

// Whatever a stranger sends is bounded, crashes nothing and leaves no more than
// a line in the log.
func TestV15_BytesOfStrangers(t *testing.T) {
	h := start(t, nil)
	conn := h.dial(t, nil)
	good := h.token(t, nil)
	for name, value := range hostile(good) {
		ctx := bearer(t)
		if value != "" {
			ctx = bearer(t, value)
		}
		_, err := send(ctx, conn, bytes.Repeat([]byte{0xff}, 1000))
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v; want Unauthenticated", name, err)
			continue
		}
		if line := h.log.wait(t, referenceOf(t, err)); len(fmt.Sprint(line)) > 2000 {
			t.Errorf("%s: a line of %d bytes", name, len(fmt.Sprint(line)))
		}
	}
	// A token is bounded by itself, and all headers are together.
	_, err := send(bearer(t, "Bearer "+strings.Repeat("A", 9000)), conn, nil)
	if line := h.log.wait(t, referenceOf(t, err)); !strings.Contains(line["reason"].(string), "it has 9000 bytes; at most 8192 are read") {
		t.Errorf("reason %v", line["reason"])
	}
	if _, err := send(metadata.AppendToOutgoingContext(h.good(t), "x", strings.Repeat("A", maxHeaders)), conn, message(csrtest.Draft{}.PEM(t))); err == nil {
		t.Errorf("headers of more than %d bytes were read", maxHeaders)
	}
	// Messages that do not decode, from somebody who is known.
	for name, b := range map[string][]byte{
		"ones": bytes.Repeat([]byte{0xff}, 1000), "zeros": make([]byte, 1000), "a length of 2^63": {0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f},
		"a length past the end": {0x0a, 40, 'x'}, "groups": bytes.Repeat([]byte{0x0b}, 60<<10), "deep metadata": deepMetadata(10_000),
		"no UTF-8": message([]byte{0xff}),
	} {
		if _, err := send(h.good(t), conn, b); err == nil || status.Code(err) == codes.Unauthenticated || status.Code(err) == codes.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = send(h.good(t), conn, message(csrtest.Draft{}.PEM(t)))
	must(t, err)
}

// deepMetadata nests lists in the request's metadata.
func deepMetadata(levels int) []byte {
	var value []byte // a structpb.Value
	for range levels {
		list := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), value)
		value = protowire.AppendBytes(protowire.AppendTag(nil, 6, protowire.BytesType), list)
		if len(value) > 60<<10 {
			break
		}
	}
	entry := protowire.AppendBytes(protowire.AppendTag(protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "a"), 2, protowire.BytesType), value)
	fields := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), entry)
	return protowire.AppendBytes(protowire.AppendTag(nil, 4, protowire.BytesType), fields)
}

// Credentials that were refused stand neither in the log nor in the answer, and
// those in the wrong place do not either.
func TestV49_CredentialsStayOutOfLogsAndAnswers(t *testing.T) {
	h := start(t, nil)
	conn := h.dial(t, nil)
	tokens := map[string]string{
		"good":             h.token(t, nil),
		"another audience": h.token(t, func(c *tokenissuer.Claims) { c.Audience = []string{"vault"} }),
		"bound to no pod":  h.token(t, func(c *tokenissuer.Claims) { c.PodName, c.PodUID = "", "" }),
	}
	secrets := []string{"CANARYCANARY"}
	var answers strings.Builder
	call := func(ctx context.Context, csr string) {
		if _, err := send(ctx, conn, message([]byte(csr))); err != nil {
			fmt.Fprintln(&answers, err)
		}
	}
	for _, token := range tokens {
		for _, part := range strings.Split(token, ".")[1:] {
			secrets = append(secrets, part[:20], part[len(part)-20:])
		}
		for _, value := range hostile(token) {
			if value != "" {
				call(bearer(t, value), "")
			}
		}
		call(bearer(t, "Bearer "+token), token)
		call(bearer(t, "Bearer "+token, "Bearer "+token), "")
		call(bearer(t, "Bearer "+token), secretKey)
		call(bearer(t, "Bearer "+token), string(csrtest.Draft{}.PEM(t))+secretKey)
		call(bearer(t, "Bearer "+token), strings.ReplaceAll(secretKey, "PRIVATE KEY", "CERTIFICATE REQUEST"))
		call(metadata.AppendToOutgoingContext(bearer(t, "Bearer "+token), "x-token", token, "cookie", token), string(csrtest.Draft{}.PEM(t)))
	}
	for where, text := range map[string]string{"the log": h.log.String(), "an answer": answers.String()} {
		if len(text) < 1000 {
			t.Errorf("%s has %d bytes; there is nothing to look at", where, len(text))
		}
		for _, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("%s holds %q", where, s)
			}
		}
	}
}
