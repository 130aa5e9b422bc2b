package caclient

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	istioca "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/identity"
)

// doingSign describes the call of [Client.Sign] in errors and logs.
const doingSign = "asking %s for a certificate"

// maxElements bounds the elements of an answer's chain: more intermediates than
// any verifier would walk, and the roots.
const maxElements = 11

// SignRequest is what [Client.Sign] asks with.
type SignRequest struct {
	// Token is asked anew for each attempt; required.
	Token TokenSource
	// CSR returns the request, DER. It is called when the connection stands, so
	// that the key can be made while the connection is; it may be called several
	// times. Required.
	CSR func(context.Context) ([]byte, error)
	// Lifetime is how long the certificate should be valid, counted in whole
	// seconds; zero leaves it to the CA.
	Lifetime time.Duration
	// Accept judges an answer. An error counts as that CA's failure, and the
	// next one is asked. Required.
	Accept func(*Signed) error
}

// Signed is a CA's answer, parsed but not verified in any way: nothing says yet
// that it is about the key that was sent, or about us.
type Signed struct {
	Chain   []*x509.Certificate // leaf first, without a root
	Roots   []*x509.Certificate // the CA's current bundle, at least one
	Address string              // who answered
}

// Sign asks the CAs in turn for a certificate until one gives an answer that
// req.Accept takes. Errors: [*UnreachableError] when none did,
// [*RefusedError], [*TokenError], [*AnchorError], or the context's cause.
func (c *Client) Sign(ctx context.Context, req SignRequest) error {
	return c.round(ctx, doingSign, func(attempt context.Context, l *link) error {
		signed, err := c.sign(attempt, l, &req)
		if err != nil {
			return err
		}
		if err := req.Accept(signed); err != nil {
			return &AnswerError{Err: err}
		}
		return nil
	})
}

func (c *Client) sign(ctx context.Context, l *link, req *SignRequest) (*Signed, error) {
	csr, err := req.CSR(ctx)
	if err != nil {
		return nil, errStop{fmt.Errorf("making a key and a request: %w", err)}
	}
	token, err := req.Token()
	if err != nil {
		return nil, errStop{&TokenError{Err: err}}
	}
	resp, err := istioca.NewIstioCertificateServiceClient(l.cc).CreateCertificate(ctx,
		&istioca.IstioCertificateRequest{
			Csr:              string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
			ValidityDuration: int64(req.Lifetime / time.Second),
		}, grpc.PerRPCCredentials(bearer(token)))
	if err != nil {
		return nil, c.explainRefusal(c.callError(doingSign, l, err), token)
	}
	signed, err := parseSigned(resp.GetCertChain())
	if err != nil {
		return nil, &AnswerError{Err: err}
	}
	signed.Address = c.conf.Addresses[l.n]
	return signed, nil
}

// explainRefusal adds to a refused token what it says of itself.
func (c *Client) explainRefusal(err error, token string) error {
	var refused *RefusedError
	if errors.As(err, &refused) && refused.Code == codes.Unauthenticated {
		refused.Token = describeToken(token, c.conf.Now())
	}
	return err
}

// parseSigned reads cert_chain: the leaf and each intermediate one certificate
// an element, and all roots in the last one.
func parseSigned(elements []string) (*Signed, error) {
	if len(elements) < 2 {
		return nil, fmt.Errorf("its chain has %d elements; at least the leaf and the roots are needed", len(elements))
	}
	if len(elements) > maxElements {
		return nil, fmt.Errorf("its chain has %d elements; at most %d are looked at", len(elements), maxElements)
	}
	last := len(elements) - 1
	s := &Signed{}
	for i, e := range elements[:last] {
		certs, err := identity.ParsePEM([]byte(e))
		if err != nil {
			return nil, fmt.Errorf("element %d of its chain: %w", i+1, err)
		}
		if len(certs) != 1 {
			return nil, fmt.Errorf("element %d of its chain holds %d certificates; it must hold one", i+1, len(certs))
		}
		s.Chain = append(s.Chain, certs[0])
	}
	roots, err := identity.ParsePEM([]byte(elements[last]))
	if err != nil {
		return nil, fmt.Errorf("the roots, element %d of its chain: %w", last+1, err)
	}
	s.Roots = roots
	return s, nil
}
