package demo

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/url"
	"os"
	"regexp"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	istio "istio.io/api/security/v1alpha1"
)

// refusals asks the CA, over the wire and with a client of its own, for what it
// must not give. The verdict is the code that came back; the reason is what the
// CA's log has under the reference in the answer.
func (w *world) refusals(ctx context.Context, p *printer, cart *workload) {
	p.step("what must not work",
		w.mustRefuse(ctx, "token for another audience", codes.Unauthenticated, func() (string, *x509.CertificateRequest, error) {
			tok, err := w.token(cart.namespace, cart.account, "vault")
			return tok, &x509.CertificateRequest{}, err
		}),
		w.mustRefuse(ctx, "CSR asking for …/sa/admin", codes.InvalidArgument, func() (string, *x509.CertificateRequest, error) {
			tok, err := w.token(cart.namespace, cart.account, audience)
			return tok, &x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain, Path: "/ns/shop/sa/admin"}}}, err
		}),
		w.mustRefuse(ctx, "no token", codes.Unauthenticated, func() (string, *x509.CertificateRequest, error) {
			return "", &x509.CertificateRequest{}, nil
		}),
	)
}

var reference = regexp.MustCompile(`\(ref ([0-9a-f]+)\)`)

// mustRefuse makes one call and judges its answer.
func (w *world) mustRefuse(ctx context.Context, what string, want codes.Code, request func() (string, *x509.CertificateRequest, error)) Check {
	c := Check{What: what}
	tok, template, err := request()
	if err != nil {
		c.Saw = err.Error()
		return c
	}
	chain, err := w.createCertificate(ctx, tok, template)
	if err == nil {
		c.Saw = fmt.Sprintf("the CA issued a chain of %d", len(chain))
		return c
	}
	c.Held = status.Code(err) == want
	c.Saw = "refused (" + status.Code(err).String() + ")"
	m := reference.FindStringSubmatch(err.Error())
	if m == nil {
		c.Why, c.Held = "the answer has no reference: "+err.Error(), false
		return c
	}
	var ok bool
	if c.Why, ok = w.refused.reason(m[1]); !ok {
		c.Why, c.Held = "the CA's log has no reason under ref "+m[1], false
	}
	return c
}

// createCertificate is a client of Istio's CSR API in as few lines as it takes.
func (w *world) createCertificate(ctx context.Context, tok string, template *x509.CertificateRequest) ([]string, error) {
	roots := x509.NewCertPool()
	anchor, err := os.ReadFile(w.anchor)
	if err != nil {
		return nil, err
	}
	roots.AppendCertsFromPEM(anchor)
	conn, err := grpc.NewClient(w.addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots})))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, err
	}
	if tok != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+tok)
	}
	resp, err := istio.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istio.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})),
	})
	return resp.GetCertChain(), err
}
