package mesh

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	istioca "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/test/envoytest"
	"github.com/meshca/meshca/test/kubetest"
)

// shop is namespace shop of a real API server, with pod cart-0 of
// ServiceAccount cart.
type shop struct {
	cluster *kubetest.Cluster
	podUID  string
}

func newShop(t *testing.T) shop {
	t.Helper()
	ctx := t.Context()
	s := shop{cluster: cluster.Get(t)}
	if err := s.cluster.CreateNamespace(ctx, "shop"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.cluster.CreateServiceAccount(ctx, "shop", "cart"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.cluster.CreateNode(ctx, "node-of-mesh"); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.podUID, err = s.cluster.CreatePod(ctx, "shop", "cart-0", "cart", "node-of-mesh"); err != nil {
		t.Fatal(err)
	}
	return s
}

// token asks the TokenRequest API for a token of cart's, as the kubelet would.
func (s shop) token(t *testing.T, r kubetest.TokenRequest) string {
	t.Helper()
	token, err := s.cluster.Token(t.Context(), "shop", "cart", r)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// bound is a request for a token that is bound to the pod.
func (s shop) bound(seconds int64, audiences ...string) kubetest.TokenRequest {
	return kubetest.TokenRequest{Audiences: audiences, Seconds: seconds, PodName: "cart-0", PodUID: s.podUID}
}

// newMeshInCluster makes a CA that believes the cluster's tokens. It gets the
// API server's keys as a ServiceAccount of its own, by nothing but
// system:service-account-issuer-discovery, which Kubernetes binds to all of them.
func newMeshInCluster(t *testing.T, c *kubetest.Cluster) *Mesh {
	t.Helper()
	ctx := t.Context()
	if err := c.CreateNamespace(ctx, "meshca-system"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CreateServiceAccount(ctx, "meshca-system", "meshca"); err != nil {
		t.Fatal(err)
	}
	own, err := c.Token(ctx, "meshca-system", "meshca", kubetest.TokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m := &Mesh{dir: shortDir(t)}
	file := m.write(t, "own.token", []byte(m.keep(own)))
	m.configure(t, fmt.Sprintf(`
token_issuers:
- issuer: %s
  kubernetes: true
  api_server: %s
  api_server_ca_file: %s
  api_server_token_file: %s
`, kubetest.Issuer, c.URL(), c.CAFile(), file))
	if out, err := initCommand(t, m.state()).CombinedOutput(); err != nil {
		t.Fatalf("meshca init: %v\n%s", err, out)
	}
	return m
}

// TestT2_T19_TokensOfARealAPIServer goes from a TokenRequest to an SVID at both
// of the agent's APIs, and wants every other token of that API server refused.
func TestT2_T19_TokensOfARealAPIServer(t *testing.T) {
	t.Parallel()
	s := newShop(t)
	m := newMeshInCluster(t, s.cluster)
	ca := m.startCA(t)

	t.Run("from a pod's token to Envoy and go-spiffe", func(t *testing.T) {
		cart := m.workloadWith(t, "cart", s.token(t, s.bound(3600, "meshca"))).startReadyAgent(t, ca)
		svid, err := source(t, cart).GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if svid.ID.String() != "spiffe://example.org/ns/shop/sa/cart" {
			t.Errorf("the Workload API gave the SVID of %s", svid.ID)
		}
		e := startReadyEnvoy(t, envoytest.Bootstrap{NodeID: "cart", Socket: cart.socket, SDS: envoytest.Delta, Servers: []envoytest.Server{
			{Name: "inbound", Upstream: backend(t), TLS: envoytest.TLS{Certificate: "default", Validation: "ROOTCA", PeerIDs: []string{cart.id}}},
		}})
		if err := once(t.Context(), listener(t, e, "inbound"), goSpiffeClient(source(t, cart), cart.id)); err != nil {
			t.Error(err)
		}
	})
	t.Run("the same token by hand", func(t *testing.T) {
		if _, err := sign(t, m, ca, s.token(t, s.bound(3600, "meshca"))); err != nil {
			t.Error(err)
		}
	})
	for _, tt := range []struct {
		name    string
		request kubetest.TokenRequest
		reason  string // in the log
	}{
		{"for the API server", s.bound(3600), `"` + kubetest.Issuer + `"`},
		{"for another audience", s.bound(3600, "vault"), `"vault"`},
		{"bound to no pod", kubetest.TokenRequest{Audiences: []string{"meshca"}, Seconds: 3600}, "pod"},
		{"living longer than allowed", s.bound(7200, "meshca"), "7200 s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := sign(t, m, ca, m.keep(s.token(t, tt.request)))
			wantRefusal(t, ca, err, codes.Unauthenticated, tt.reason)
		})
	}
}

// sign makes one call of Istio's CSR API, as any client in any language would.
func sign(t *testing.T, m *Mesh, ca *CA, token string) ([]string, error) {
	t.Helper()
	creds, err := credentials.NewClientTLSFromFile(m.anchor(), "")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(ca.address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := istioca.NewIstioCertificateServiceClient(conn).CreateCertificate(
		metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token),
		&istioca.IstioCertificateRequest{Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))})
	return resp.GetCertChain(), err
}

var reference = regexp.MustCompile(`\(ref ([0-9a-f]{16})\)`)

// wantRefusal wants the code and nothing of the reason on the wire, and the
// reason in the log, under the reference that the caller was given.
func wantRefusal(t *testing.T, ca *CA, err error, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("the answer is %v, want %s", err, code)
	}
	ref := reference.FindStringSubmatch(err.Error())
	if ref == nil {
		t.Fatalf("the answer has no reference: %v", err)
	}
	line, logErr := ca.waitLine(t.Context(), "the refusal "+ref[1], func(l logLine) bool { return l.text("ref") == ref[1] })
	if logErr != nil {
		t.Fatal(logErr)
	}
	t.Logf("on the wire: %q; in the log: %q", status.Convert(err).Message(), line.text("reason"))
	if !strings.Contains(line.text("reason"), reason) {
		t.Errorf("the log's reason is %q, which does not name %q", line.text("reason"), reason)
	}
	if strings.Contains(err.Error(), reason) {
		t.Errorf("the caller is told the reason: %v", err)
	}
}
