package caclienttest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	istioca "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/wire"
	"github.com/meshca/meshca/wire/meshcav1"
)

// Resource is the name of the one resource that a [CA] has.
const Resource = "pod-uid"

// CA is a CA that believes every token. Set the exported fields before it
// serves; hooks run concurrently.
type CA struct {
	istioca.UnimplementedIstioCertificateServiceServer
	discovery.UnimplementedAggregatedDiscoveryServiceServer

	*identitytest.CA
	ID       identity.ID   // of whoever asks
	Lifetime time.Duration // of the certificates; one hour if zero
	// OnSign answers instead of [CA.Sign].
	OnSign func(token string, req *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error)
	// OnStream answers instead of [CA.Serve]'s own way, which sends the bundle
	// and then waits for the end.
	OnStream func(*Stream) error

	tb testing.TB

	mu     sync.Mutex
	tokens []string
}

// New makes a CA for the trust domain of id.
func New(tb testing.TB, id identity.ID, opts ...identitytest.CAOption) *CA {
	return &CA{CA: identitytest.NewCA(tb, id.TrustDomain(), opts...), ID: id, tb: tb}
}

// Tokens returns the tokens of all calls and streams so far.
func (c *CA) Tokens() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.tokens...)
}

// AnchorFile writes the root to a file in a temporary directory.
func (c *CA) AnchorFile() string {
	path := filepath.Join(c.tb.TempDir(), "root-cert.pem")
	if err := os.WriteFile(path, identity.EncodePEM(c.Root.Certificate), 0o600); err != nil {
		c.tb.Fatal(err)
	}
	return path
}

// TLS returns the server's side of TLS, for the given names, which may be IP
// addresses.
func (c *CA) TLS(names ...string) *tls.Config {
	key := identitytest.NewKey(c.tb)
	template := &x509.Certificate{
		SerialNumber: c.Root.Certificate.SerialNumber,
		NotBefore:    c.Root.Certificate.NotBefore,
		NotAfter:     c.Root.Certificate.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	leaf := c.Intermediate.Sign(c.tb, template, key.Public())
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2"},
		Certificates: []tls.Certificate{{
			Certificate: [][]byte{leaf.Raw, c.Intermediate.Certificate.Raw}, PrivateKey: key, Leaf: leaf,
		}},
	}
}

// Serve answers on l until the test ends, or until stop is called.
func (c *CA) Serve(l net.Listener, conf *tls.Config) (stop func()) {
	s := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(conf)),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 20 * time.Second}),
	)
	istioca.RegisterIstioCertificateServiceServer(s, c)
	discovery.RegisterAggregatedDiscoveryServiceServer(s, c)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l) // it ends by Stop
	}()
	stop = func() { s.Stop(); <-done }
	c.tb.Cleanup(stop)
	return stop
}

func (c *CA) token(ctx context.Context) string {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	token := ""
	if len(values) == 1 {
		token = strings.TrimPrefix(values[0], "Bearer ")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tokens = append(c.tokens, token)
	return token
}

// CreateCertificate implements Istio's CSR API.
func (c *CA) CreateCertificate(ctx context.Context, req *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
	token := c.token(ctx)
	if c.OnSign != nil {
		return c.OnSign(token, req)
	}
	return c.Sign(req)
}

// Sign gives a certificate for c.ID.
func (c *CA) Sign(req *istioca.IstioCertificateRequest, opts ...identitytest.Option) (*istioca.IstioCertificateResponse, error) {
	return c.SignAs(c.ID, req, opts...)
}

// SignAs gives a certificate for id.
func (c *CA) SignAs(id identity.ID, req *istioca.IstioCertificateRequest, opts ...identitytest.Option) (*istioca.IstioCertificateResponse, error) {
	block, _ := pem.Decode([]byte(req.GetCsr()))
	if block == nil {
		return nil, status.Error(codes.InvalidArgument, "no PEM")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if c.Lifetime != 0 {
		opts = append([]identitytest.Option{identitytest.WithLifetime(c.Lifetime)}, opts...)
	}
	chain := c.LeafFor(id, csr, opts...)
	resp := &istioca.IstioCertificateResponse{}
	for _, cert := range chain {
		resp.CertChain = append(resp.CertChain, string(identity.EncodePEM(cert)))
	}
	resp.CertChain = append(resp.CertChain, string(c.Bundle().MarshalPEM()))
	return resp, nil
}

// LeafFor signs a leaf for the key of a CSR.
func (c *CA) LeafFor(id identity.ID, csr *x509.CertificateRequest, opts ...identitytest.Option) []*x509.Certificate {
	key := identitytest.WithKey(publicOnly{csr.PublicKey}) // first, so that opts can say otherwise
	chain, _ := c.Leaf(c.tb, id, append([]identitytest.Option{key}, opts...)...)
	return chain
}

// Stream is the CA's side of one delta xDS stream.
type Stream struct {
	discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	Token string
	First *discovery.DeltaDiscoveryRequest
}

// DeltaAggregatedResources implements delta ADS.
func (c *CA) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	token := c.token(stream.Context())
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	s := &Stream{stream, token, first}
	if c.OnStream != nil {
		return c.OnStream(s)
	}
	if err := s.SendWorkload("nonce", c.Workload(1)); err != nil {
		return err
	}
	return s.Drain()
}

// SendWorkload sends one resource; its version is the nonce.
func (s *Stream) SendWorkload(nonce string, w *meshcav1.Workload) error {
	content, err := anypb.New(w)
	if err != nil {
		return err
	}
	return s.Send(&discovery.DeltaDiscoveryResponse{
		TypeUrl:   wire.TypeURL,
		Nonce:     nonce,
		Resources: []*discovery.Resource{{Name: Resource, Version: nonce, Resource: content}},
	})
}

// Drain reads until the client hangs up, and ends the stream in good order.
func (s *Stream) Drain() error {
	for {
		if _, err := s.Recv(); err != nil {
			return nil
		}
	}
}

// Answer waits for the ACK or NACK of a nonce; the error is a NACK's text.
func (s *Stream) Answer(nonce string) error {
	req, err := s.Recv()
	if err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	if req.GetResponseNonce() != nonce {
		return fmt.Errorf("answer to nonce %q instead of %q", req.GetResponseNonce(), nonce)
	}
	if d := req.GetErrorDetail(); d != nil {
		return errors.New(d.GetMessage())
	}
	return nil
}

// Workload returns what the CA says of c.ID, with the given sequence.
func (c *CA) Workload(sequence uint64) *meshcav1.Workload {
	return &meshcav1.Workload{
		SpiffeId: c.ID.String(),
		Bundle: &meshcav1.Bundle{
			TrustDomain:     c.TrustDomain.String(),
			Sequence:        sequence,
			X509Authorities: [][]byte{c.Root.Certificate.Raw},
		},
	}
}
