package pods

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/kube/apitest"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	cartUID    = "7f9c1e2a-4f0e-4c3e-9d55-0a1b2c3d4e5f"
	accountUID = "aaaaaaaa-0000-4000-8000-000000000001"
	nodeUID    = "bbbbbbbb-0000-4000-8000-000000000001"
)

// rig is a Pods over an API server in memory, inside a synctest bubble.
type rig struct {
	t        *testing.T
	api      *apitest.API
	pods     *Pods
	log      *strings.Builder
	registry *prometheus.Registry
	issuer   *tokenissuer.Issuer
	verifier *token.Verifier
	stop     func()
}

// bubble runs a test on a clock of its own, against a cluster with the pod
// shop/cart-0 under the ServiceAccount cart on node-1.
func bubble(t *testing.T, test func(r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, stop: func() {}, api: &apitest.API{}, log: &strings.Builder{}, registry: prometheus.NewRegistry()}
		defer func() { r.stop() }() // inside the bubble, even after a failure
		r.api.Put("namespaces", apitest.Named("", "shop", "ns-1"))
		r.api.Put("nodes", apitest.Named("", "node-1", nodeUID))
		r.api.Put("serviceaccounts", apitest.Named("shop", "cart", accountUID))
		r.api.Put("pods", cart())
		var err error
		r.issuer, err = tokenissuer.New(tokenissuer.Config{URL: "https://issuer.test"})
		r.must(err)
		r.verifier, err = token.New(token.Config{Issuers: []token.Issuer{{
			URL: "https://issuer.test", Keys: r.issuer, Audiences: map[string]time.Duration{"meshca": time.Hour}, RequirePod: true,
		}}})
		r.must(err)
		r.pods, err = New(Config{API: r.api.Config(), Log: slog.New(slog.NewTextHandler(r.log, nil)), Metrics: r.registry})
		r.must(err)
		test(r)
	})
}

func cart() apitest.Object { return apitest.Pod("shop", "cart-0", cartUID, "cart", "node-1") }

// away lets every connection to the API server end with err while the switch is on.
func (r *rig) away(err error) *atomic.Bool {
	var away atomic.Bool
	r.api.Broken = func(*http.Request) error {
		if away.Load() {
			return err
		}
		return nil
	}
	return &away
}

// run follows the cluster until the test ends.
func (r *rig) run() {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = r.pods.Run(ctx)
	}()
	r.stop = func() { cancel(); <-ended }
	synctest.Wait()
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// pass lets time pass.
func (r *rig) pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// claims are those of a fresh token of the cart's; change may be nil.
func (r *rig) claims(change func(*tokenissuer.Claims)) *token.Claims {
	r.t.Helper()
	c := tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: "cart", ServiceAccountUID: accountUID, PodName: "cart-0", PodUID: cartUID,
		NodeName: "node-1", NodeUID: nodeUID, Audience: []string{"meshca"}, Lifetime: time.Hour,
	}
	if change != nil {
		change(&c)
	}
	raw, err := r.issuer.Issue(c)
	r.must(err)
	claims, err := r.verifier.Verify(r.t.Context(), raw)
	r.must(err)
	return claims
}

func (r *rig) check(change func(*tokenissuer.Claims)) error {
	r.t.Helper()
	return r.pods.Check(r.t.Context(), r.claims(change))
}

// alive fails the test if the cart does not live.
func (r *rig) alive(when string) {
	r.t.Helper()
	if err := r.check(nil); err != nil {
		r.t.Errorf("%s: %v", when, err)
	}
}

// refused fails the test unless err is a definite no for the reason.
func (r *rig) refused(when string, err error, reason string) {
	r.t.Helper()
	var unavailable *caller.UnavailableError
	if err == nil || errors.As(err, &unavailable) || !strings.Contains(err.Error(), reason) {
		r.t.Errorf("%s: %v; want a refusal with %q", when, err, reason)
	}
}

// unknown fails the test unless err says that it cannot be told, for the reason.
func (r *rig) unknown(when string, err error, reason string) {
	r.t.Helper()
	var unavailable *caller.UnavailableError
	if !errors.As(err, &unavailable) || !strings.Contains(err.Error(), reason) {
		r.t.Errorf("%s: %v; want an UnavailableError with %q", when, err, reason)
	}
}

func itemsOf(list runtime.Object) []any {
	var all []any
	_ = apimeta.EachListItem(list, func(o runtime.Object) error { all = append(all, o); return nil })
	return all
}
