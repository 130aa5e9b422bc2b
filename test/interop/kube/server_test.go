package kube

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"os"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/kube/pods"
	"github.com/meshca/meshca/ca/kube/review"
	"github.com/meshca/meshca/ca/server"
	"github.com/meshca/meshca/ca/server/servertest"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/test/kubetest"
	meshwire "github.com/meshca/meshca/wire"
)

// authority is a CA over a real API server, as it is wired in a cluster.
type authority struct {
	conn *grpc.ClientConn
	pods *pods.Pods
}

// newAuthority serves callers whose tokens are verified by the issuer's keys, or with
// reviewed, are judged by the API server.
func newAuthority(t *testing.T, c *kubetest.Cluster, name string, reviewed bool) *authority {
	t.Helper()
	config, _ := identify(t, c, name, grants())
	a := &authority{}
	a.pods, _ = follow(t, pods.Config{API: config})
	issuer := token.Issuer{URL: kubetest.Issuer, Audiences: map[string]time.Duration{"meshca": time.Hour}, RequirePod: true}
	if reviewed {
		r, err := review.New(review.Config{API: config})
		must(t, err)
		t.Cleanup(r.Close)
		issuer.Review = r
	} else {
		issuer.Keys = keysOf(t, c)
	}
	tokens, err := token.New(token.Config{Issuers: []token.Issuer{issuer}})
	must(t, err)
	kit := catest.New(t)
	who, err := caller.New(caller.Config{Tokens: tokens, TrustDomain: kit.TrustDomain, Clusters: map[string]caller.Cluster{
		kubetest.Issuer: {Liveness: a.pods, Agents: []caller.ServiceAccount{{Namespace: name, Name: "meshca-agent"}}},
	}})
	must(t, err)
	t.Cleanup(func() { _ = a.conn.Close() })
	address := servertest.Serve(t, server.Config{
		Authority: kit.Authority, Authenticator: who, Names: ca.ServingNames{DNS: []string{"meshca.test"}},
		CallersReady: a.pods.Ready, Pods: a.pods,
	})
	anchor, err := os.ReadFile(kit.Anchor)
	must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(anchor)
	a.conn, err = grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "meshca.test"})))
	must(t, err)
	return a
}

func as(t *testing.T, raw string) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+raw)
}

// issue asks for a certificate as a workload.
func (a *authority) issue(t *testing.T, raw string) error {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, catest.NewKey(t))
	must(t, err)
	csr := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	_, err = istio.NewIstioCertificateServiceClient(a.conn).CreateCertificate(as(t, raw), &istio.IstioCertificateRequest{Csr: csr})
	return err
}

// A pod gets its certificate the moment it is there, and none once it is not, whichever
// way tokens are judged.
func TestT2_CertificatesForPodsThatLive(t *testing.T) {
	c := cluster.Get(t)
	for name, reviewed := range map[string]bool{"issue-offline": false, "issue-reviewed": true} {
		t.Run(name, func(t *testing.T) {
			a := newAuthority(t, c, name, reviewed)
			w := newWorkload(t, c, name)
			raw := w.rawToken(t, c)
			must(t, a.issue(t, raw))
			must(t, c.DeletePod(t.Context(), w.namespace, w.pod))
			within(t, 5*time.Second, "refusing the pod", func() error {
				if err := a.issue(t, raw); status.Code(err) != codes.Unauthenticated {
					return fmt.Errorf("%w; want Unauthenticated", errors.Join(errors.New("not yet"), err))
				}
				return nil
			})
			next := w.another(t, c, w.pod)
			must(t, a.issue(t, next.rawToken(t, c)))
		})
	}
}

// The agents of two nodes see the pods of theirs, while those come and go.
func TestV1_T3_AgentsOfRealNodes(t *testing.T) {
	c := cluster.Get(t)
	const ns = "agents"
	a := newAuthority(t, c, ns, false)
	first := newWorkload(t, c, ns) // on node-of-agents
	second := first
	second.node = "second-node-of-agents"
	var err error
	second.nodeUID, err = c.CreateNode(t.Context(), second.node)
	must(t, err)
	second = second.another(t, c, "cart-1")
	_, err = c.CreateServiceAccount(t.Context(), ns, "meshca-agent")
	must(t, err)
	uids := []string{first.podUID, second.podUID, "no-such-pod"}
	for _, of := range []workload{first, second} {
		agent := of
		agent.serviceAccount = "meshca-agent"
		agent = agent.another(t, c, "agent-on-"+of.node)
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(a.conn).DeltaAggregatedResources(as(t, agent.rawToken(t, c)))
		must(t, err)
		must(t, stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: meshwire.TypeURL, ResourceNamesSubscribe: append([]string{"*"}, uids...)}))
		seen := map[string]bool{} // by UID, whether it is shown
		take := func() string {
			t.Helper()
			resp, err := stream.Recv()
			must(t, err)
			must(t, stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: meshwire.TypeURL, ResponseNonce: resp.GetNonce()}))
			for _, r := range resp.GetResources() {
				seen[r.GetName()] = true
				return r.GetName()
			}
			seen[resp.GetRemovedResources()[0]] = false
			return resp.GetRemovedResources()[0]
		}
		// The watch may bring a pod after it was asked for: then it comes by itself.
		want := map[string]bool{first.podUID: of == first, second.podUID: of == second, "no-such-pod": false}
		for !maps.Equal(seen, want) {
			take()
		}
		late := of.another(t, c, "late-on-"+of.node)
		must(t, stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: meshwire.TypeURL, ResourceNamesSubscribe: []string{late.podUID}}))
		for !seen[late.podUID] {
			take()
		}
		must(t, c.DeletePod(t.Context(), ns, late.pod))
		if take(); seen[late.podUID] {
			t.Error("a pod that is gone is shown")
		}
		must(t, stream.CloseSend())
	}
}
