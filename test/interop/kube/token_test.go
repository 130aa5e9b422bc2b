package kube

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/test/kubetest"
)

// apiServerKeys is the API server's JWKS, fetched once.
type apiServerKeys struct{ set jose.JSONWebKeySet }

func (s *apiServerKeys) Keys(_ context.Context, kid string) ([]token.Key, error) {
	var keys []token.Key
	for _, k := range s.set.Key(kid) {
		keys = append(keys, token.Key{ID: k.KeyID, Algorithms: []string{k.Algorithm}, Public: k.Key})
	}
	return keys, nil
}

// workload is what a pod's token is about.
type workload struct {
	namespace, serviceAccount, serviceAccountUID string
	pod, podUID, node, nodeUID                   string
}

// newWorkload makes a namespace with a ServiceAccount and one pod on a node.
func newWorkload(t *testing.T, c *kubetest.Cluster, namespace string) workload {
	t.Helper()
	ctx := t.Context()
	w := workload{namespace: namespace, serviceAccount: "cart", pod: "cart-0", node: "node-of-" + namespace}
	if err := c.CreateNamespace(ctx, namespace); err != nil {
		t.Fatal(err)
	}
	var err error
	if w.serviceAccountUID, err = c.CreateServiceAccount(ctx, namespace, w.serviceAccount); err != nil {
		t.Fatal(err)
	}
	if w.nodeUID, err = c.CreateNode(ctx, w.node); err != nil {
		t.Fatal(err)
	}
	if w.podUID, err = c.CreatePod(ctx, namespace, w.pod, w.serviceAccount, w.node); err != nil {
		t.Fatal(err)
	}
	return w
}

func keysOf(t *testing.T, c *kubetest.Cluster) *apiServerKeys {
	t.Helper()
	doc, err := c.JWKS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	keys := new(apiServerKeys)
	if err := json.Unmarshal(doc, &keys.set); err != nil {
		t.Fatal(err)
	}
	return keys
}

func newVerifier(t *testing.T, c *kubetest.Cluster) *token.Verifier {
	t.Helper()
	keys := keysOf(t, c)
	v, err := token.New(token.Config{
		Now: time.Now,
		Issuers: []token.Issuer{{
			URL:        kubetest.Issuer,
			Keys:       keys,
			Audiences:  map[string]time.Duration{"meshca": time.Hour},
			RequirePod: true,
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestTokenOfTokenRequestIsVerified(t *testing.T) {
	c := cluster.Get(t)
	w := newWorkload(t, c, "verified")
	raw, err := c.Token(t.Context(), w.namespace, w.serviceAccount, kubetest.TokenRequest{
		Audiences: []string{"meshca"}, Seconds: 3600, PodName: w.pod, PodUID: w.podUID,
	})
	if err != nil {
		t.Fatal(err)
	}
	claims, err := newVerifier(t, c).Verify(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	got := workload{
		namespace: claims.Namespace(), serviceAccount: claims.ServiceAccount(),
		serviceAccountUID: claims.ServiceAccountUID(),
	}
	got.pod, got.podUID = claims.Pod()
	got.node, got.nodeUID = claims.Node()
	if got != w {
		t.Errorf("claims are of %+v, want %+v", got, w)
	}
	if claims.ID() == "" {
		t.Error("the token has no jti")
	}
}

func TestTokenThatProvesNothingHere(t *testing.T) {
	c := cluster.Get(t)
	w := newWorkload(t, c, "refused")
	for name, request := range map[string]kubetest.TokenRequest{
		"for another audience":       {Audiences: []string{"vault"}, Seconds: 3600, PodName: w.pod},
		"for the API server":         {Seconds: 3600, PodName: w.pod},
		"bound to no pod":            {Audiences: []string{"meshca"}, Seconds: 3600},
		"living longer than allowed": {Audiences: []string{"meshca"}, Seconds: 7200, PodName: w.pod},
	} {
		t.Run(name, func(t *testing.T) {
			raw, err := c.Token(t.Context(), w.namespace, w.serviceAccount, request)
			if err != nil {
				t.Fatal(err)
			}
			var invalid *token.InvalidError
			if _, err := newVerifier(t, c).Verify(t.Context(), raw); !errors.As(err, &invalid) {
				t.Errorf("Verify = %v, want an InvalidError", err)
			}
		})
	}
}

func TestAPIServerIssuesNoTokenForAPodThatIsGone(t *testing.T) {
	c := cluster.Get(t)
	w := newWorkload(t, c, "gone")
	if err := c.DeletePod(t.Context(), w.namespace, w.pod); err != nil {
		t.Fatal(err)
	}
	_, err := c.Token(t.Context(), w.namespace, w.serviceAccount, kubetest.TokenRequest{
		Audiences: []string{"meshca"}, PodName: w.pod, PodUID: w.podUID,
	})
	var status *kubetest.StatusError
	if !errors.As(err, &status) || status.Code != http.StatusNotFound {
		t.Errorf("Token = %v, want the API server to answer 404", err)
	}
}
