package server

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
)

func ownURI(t testing.TB) []*url.URL {
	t.Helper()
	u, err := url.Parse(cartURI)
	must(t, err)
	return []*url.URL{u}
}

// svidOf reads an answer as Istio's agents do: every element but the last is
// one certificate, the last holds the roots.
func svidOf(t testing.TB, resp *istio.IstioCertificateResponse, key crypto.Signer) (*identity.SVID, []*x509.Certificate) {
	t.Helper()
	n := len(resp.GetCertChain())
	if n < 2 {
		t.Fatalf("the answer has %d elements; want at least 2", n)
	}
	var chain []*x509.Certificate
	for i, e := range resp.GetCertChain()[:n-1] {
		certs, err := identity.ParsePEM([]byte(e))
		must(t, err)
		if len(certs) != 1 || !strings.HasSuffix(e, "-----END CERTIFICATE-----\n") {
			t.Fatalf("element %d holds %d certificates", i, len(certs))
		}
		chain = append(chain, certs[0])
	}
	roots, err := identity.ParsePEM([]byte(resp.GetCertChain()[n-1]))
	must(t, err)
	svid, err := identity.NewSVID(chain, key)
	must(t, err)
	return svid, roots
}

func TestV54_ChainAsIstioReadsIt(t *testing.T) {
	h := start(t, nil)
	key := catest.NewKey(t)
	resp, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, key, nil)})
	must(t, err)
	svid, roots := svidOf(t, resp, key)
	if got := len(svid.Certificates()); got != 2 {
		t.Errorf("the chain has %d certificates; want leaf and intermediate", got)
	}
	bundle, _ := h.authority.Bundle()
	if len(roots) != len(bundle.Authorities()) || !roots[0].Equal(bundle.Authorities()[0]) {
		t.Errorf("the last element holds %d roots; the bundle has %d", len(roots), len(bundle.Authorities()))
	}
	id, err := identity.Verify(svid.Certificates(), identity.Client, bundle, time.Now())
	must(t, err)
	if id.String() != cartURI {
		t.Errorf("the SVID is of %s", id)
	}
}

// What is given is in the certificate, whatever was asked for.
func TestV54_ValidityDuration(t *testing.T) {
	h := start(t, nil)
	client := istio.NewIstioCertificateServiceClient(h.dial(t, nil))
	for seconds, want := range map[int64]time.Duration{
		0: time.Hour, -1: time.Hour, -1 << 63: time.Hour, 1: 5 * time.Minute, 1800: 30 * time.Minute,
		86400: 24 * time.Hour, 90 * 86400: 24 * time.Hour, 1<<63 - 1: 24 * time.Hour,
	} {
		key, began := catest.NewKey(t), time.Now().Truncate(time.Second)
		resp, err := client.CreateCertificate(h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, key, nil), ValidityDuration: seconds})
		must(t, err)
		svid, _ := svidOf(t, resp, key)
		if end := svid.Leaf().NotAfter; end.Before(began.Add(want)) || end.After(time.Now().Add(want)) {
			t.Errorf("%d s asked for: ends in %v; want %v", seconds, time.Until(end).Round(time.Second), want)
		}
	}
}

// The two clients that Istio has, as they make their requests.
func TestIstioClientsAreServed(t *testing.T) {
	h := start(t, nil)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	tests := map[string]struct {
		key      crypto.Signer
		csr      func(*x509.CertificateRequest)
		metadata map[string]any
		cluster  []string
	}{
		"pilot-agent": {rsaKey, func(c *x509.CertificateRequest) {
			c.Subject, c.URIs = pkix.Name{Organization: []string{""}}, ownURI(t)
		}, map[string]any{"CertSigner": ""}, []string{"Kubernetes"}},
		"pilot-agent with a signer": {rsaKey, nil, map[string]any{"CertSigner": "x", "WorkloadName": "cart"}, []string{""}},
		"ztunnel for itself":        {catest.NewKey(t), func(c *x509.CertificateRequest) { c.URIs = ownURI(t) }, map[string]any{"ImpersonatedIdentity": ""}, nil},
		"two clusters":              {catest.NewKey(t), nil, nil, []string{"a", "b"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			ctx := h.good(t)
			for _, c := range tt.cluster {
				ctx = metadata.AppendToOutgoingContext(ctx, "clusterid", c)
			}
			md, err := structpb.NewStruct(tt.metadata)
			must(t, err)
			resp, err := h.create(t, ctx, &istio.IstioCertificateRequest{Csr: newCSR(t, tt.key, tt.csr), Metadata: md})
			must(t, err)
			svid, _ := svidOf(t, resp, tt.key)
			if svid.ID().String() != cartURI {
				t.Errorf("got the SVID of %s", svid.ID())
			}
		})
	}
}

// T1 at the other end of the wire: what the leaf holds follows from the token
// alone.
func TestT1_V41_NothingOfTheCSRReachesTheLeaf(t *testing.T) {
	h := start(t, nil)
	client := istio.NewIstioCertificateServiceClient(h.dial(t, nil))
	key := catest.NewKey(t)
	for name, change := range map[string]func(*x509.CertificateRequest){
		"DNS":         func(c *x509.CertificateRequest) { c.DNSNames = []string{"pay.shop"} },
		"IP":          func(c *x509.CertificateRequest) { c.IPAddresses = []net.IP{{10, 0, 0, 1}} },
		"common name": func(c *x509.CertificateRequest) { c.Subject.CommonName = "admin" },
		"CA":          extension(asn1.ObjectIdentifier{2, 5, 29, 19}, []byte{0x30, 3, 1, 1, 0xff}),
		"EKU":         extension(asn1.ObjectIdentifier{2, 5, 29, 37}, []byte{0x30, 6, 6, 4, 0x55, 0x1d, 0x25, 0}),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := client.CreateCertificate(h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, key, change)})
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("%v; want InvalidArgument", err)
			}
		})
	}
	resp, err := client.CreateCertificate(h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, key, func(c *x509.CertificateRequest) {
		c.Subject, c.URIs = pkix.Name{Organization: []string{""}}, ownURI(t)
	})})
	must(t, err)
	svid, _ := svidOf(t, resp, key)
	leaf := svid.Leaf()
	if len(leaf.Subject.Names) != 0 || leaf.IsCA || len(leaf.URIs) != 1 || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 ||
		len(leaf.ExtKeyUsage) != 2 || len(leaf.UnknownExtKeyUsage) != 0 || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("leaf: subject %q, CA %v, names %v %v, usages %v %v", leaf.Subject, leaf.IsCA, leaf.URIs, leaf.DNSNames, leaf.KeyUsage, leaf.ExtKeyUsage)
	}
}

func extension(oid asn1.ObjectIdentifier, value []byte) func(*x509.CertificateRequest) {
	return func(c *x509.CertificateRequest) {
		c.ExtraExtensions = []pkix.Extension{{Id: oid, Value: value}}
	}
}

func TestImpersonationIsRefused(t *testing.T) {
	h := start(t, nil)
	for name, v := range map[string]any{"another": "spiffe://cluster.local/ns/shop/sa/admin", "itself": cartURI, "number": 1.0, "list": []any{cartURI}} {
		t.Run(name, func(t *testing.T) {
			md, err := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": v})
			must(t, err)
			_, err = h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil), Metadata: md})
			if status.Code(err) != codes.PermissionDenied {
				t.Fatalf("%v; want PermissionDenied", err)
			}
			line := h.log.wait(t, referenceOf(t, err))
			if !strings.Contains(line["reason"].(string), "ImpersonatedIdentity") {
				t.Errorf("reason %q", line["reason"])
			}
		})
	}
}

func TestAuthorizationValues(t *testing.T) {
	h := start(t, nil)
	raw := h.token(t, nil)
	csr := newCSR(t, catest.NewKey(t), nil)
	for name, tt := range map[string]struct {
		values []string
		reason string
	}{
		"none":          {nil, "no token"},
		"two":           {[]string{"Bearer " + raw, "Bearer " + raw}, "2 authorization values"},
		"two, one good": {[]string{"Bearer x", "Bearer " + raw}, "2 authorization values"},
		"no prefix":     {[]string{raw}, "is not \"Bearer \""},
		"lower case":    {[]string{"bearer " + raw}, "is not \"Bearer \""},
		"Basic":         {[]string{"Basic " + raw}, "is not \"Bearer \""},
		"empty":         {[]string{"Bearer "}, "is not \"Bearer \""},
		"two spaces":    {[]string{"Bearer  " + raw}, "token"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := h.create(t, bearer(t, tt.values...), &istio.IstioCertificateRequest{Csr: csr})
			if status.Code(err) != codes.Unauthenticated {
				t.Fatalf("%v; want Unauthenticated", err)
			}
			if line := h.log.wait(t, referenceOf(t, err)); !strings.Contains(line["reason"].(string), tt.reason) {
				t.Errorf("reason %q; want %q in it", line["reason"], tt.reason)
			}
		})
	}
}

// A certificate renews what is listed, and only that.
func TestV44_RenewalByCertificate(t *testing.T) {
	h := start(t, func(s *settings) { s.byCert = []string{cartURI} })
	svid := func(serviceAccount string) *tls.Certificate {
		key := catest.NewKey(t)
		c := claims()
		c.ServiceAccount = serviceAccount
		raw, err := h.tokens.Issue(c)
		must(t, err)
		resp, err := h.create(t, bearer(t, "Bearer "+raw), &istio.IstioCertificateRequest{Csr: newCSR(t, key, nil)})
		must(t, err)
		s, _ := svidOf(t, resp, key)
		pair := &tls.Certificate{PrivateKey: key}
		for _, c := range s.Certificates() {
			pair.Certificate = append(pair.Certificate, c.Raw)
		}
		return pair
	}
	renew := func(cert *tls.Certificate, values ...string) error {
		key := catest.NewKey(t)
		conn := h.dial(t, func(c *tls.Config) { c.Certificates = []tls.Certificate{*cert} })
		resp, err := istio.NewIstioCertificateServiceClient(conn).CreateCertificate(bearer(t, values...), &istio.IstioCertificateRequest{Csr: newCSR(t, key, nil)})
		if err == nil {
			s, _ := svidOf(t, resp, key)
			if s.ID().String() != cartURI {
				t.Errorf("renewed %s", s.ID())
			}
		}
		return err
	}
	must(t, renew(svid("cart")))
	if who := h.gate.last(); who.Method() != caller.ByCertificate || !strings.HasPrefix(who.Peer(), "127.0.0.1:") {
		t.Errorf("renewed for %v", who.LogValue())
	}
	if err := renew(svid("other")); status.Code(err) != codes.Unauthenticated {
		t.Errorf("an ID that is not listed: %v", err)
	}
	// A certificate that proves nothing counts as not shown: the good token
	// beside it decides, and the handshake does not fail.
	selfSigned := selfSignedFor(t, cartURI)
	must(t, renew(selfSigned, "Bearer "+h.token(t, nil)))
	if err := renew(selfSigned); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a self-signed certificate: %v", err)
	}
}

func selfSignedFor(t testing.TB, uri string) *tls.Certificate {
	t.Helper()
	u, err := url.Parse(uri)
	must(t, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: asn1Serial, URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
