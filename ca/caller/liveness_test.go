package caller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	satoken "github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// asked is a Liveness that gives one answer.
type asked struct {
	err   error
	times int
}

func (a *asked) Check(_ context.Context, c *satoken.Claims) error {
	a.times++
	if _, uid := c.Pod(); uid != podUID {
		return fmt.Errorf("asked about pod %s", uid)
	}
	return a.err
}

// in makes an authenticator whose issuer is a cluster, beside another issuer.
func (f *fixture) in(t *testing.T, c Cluster) (*Authenticator, *tokenissuer.Issuer) {
	t.Helper()
	other := must[*tokenissuer.Issuer](t)(tokenissuer.New(tokenissuer.Config{URL: "https://other.test"}))
	audiences := map[string]time.Duration{"meshca": time.Hour}
	v := must[*satoken.Verifier](t)(satoken.New(satoken.Config{Issuers: []satoken.Issuer{
		{URL: issuerURL, Keys: f.issuer, Audiences: audiences, RequirePod: true},
		{URL: other.URL(), Keys: other, Audiences: audiences},
	}}))
	return must[*Authenticator](t)(New(Config{Tokens: v, TrustDomain: f.td, Clusters: map[string]Cluster{issuerURL: c}})), other
}

// A token is worth nothing once what it was made for is gone, and it is not the
// token's fault that this cannot be told.
func TestT2_LivenessDecides(t *testing.T) {
	f := newFixture(t)
	for name, tt := range map[string]struct {
		err         error
		unavailable bool
	}{
		"it lives":          {},
		"it is gone":        {err: errors.New("the pod is gone")},
		"cannot be told":    {err: &UnavailableError{Err: errors.New("the API server is away")}, unavailable: true},
		"cannot be told of": {err: fmt.Errorf("pods: %w", &UnavailableError{Err: errors.New("the API server is away")}), unavailable: true},
	} {
		t.Run(name, func(t *testing.T) {
			alive := &asked{err: tt.err}
			a, _ := f.in(t, Cluster{Liveness: alive})
			who, err := a.Authenticate(t.Context(), Credentials{Bearer: f.token(t, nil)})
			if alive.times != 1 {
				t.Errorf("asked %d times", alive.times)
			}
			if tt.err == nil {
				if err != nil || who == nil {
					t.Errorf("%v, %v", who, err)
				}
				return
			}
			var refused *RefusedError
			var unavailable *UnavailableError
			if who != nil || errors.As(err, &refused) == tt.unavailable || errors.As(err, &unavailable) != tt.unavailable {
				t.Fatalf("%v, %v", who, err)
			}
			if !strings.Contains(err.Error(), "system:serviceaccount:shop:cart") {
				t.Errorf("%q does not say whose token it is", err)
			}
			if refused != nil && (refused.Subject != "system:serviceaccount:shop:cart" || refused.Claims == nil) {
				t.Errorf("refused: %+v", refused)
			}
		})
	}
}

// A token that proves nothing asks nobody, and a cluster is asked about its own
// tokens only.
func TestT3_AskedAboutItsOwnOnly(t *testing.T) {
	f := newFixture(t)
	alive := &asked{err: errors.New("gone")}
	a, other := f.in(t, Cluster{Liveness: alive, Agents: []ServiceAccount{{"shop", "cart"}}})
	if _, err := a.Authenticate(t.Context(), Credentials{Bearer: f.token(t, func(c *tokenissuer.Claims) { c.Audience = []string{"vault"} })}); err == nil {
		t.Error("a token for another audience was taken")
	}
	foreign := must[string](t)(other.Issue(tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: "cart", PodName: "cart-0", PodUID: podUID, NodeName: "node-1", NodeUID: nodeUID,
		Audience: []string{"meshca"}, Lifetime: time.Hour,
	}))
	who, err := a.Authenticate(t.Context(), Credentials{Bearer: foreign})
	if err != nil || alive.times != 0 {
		t.Fatalf("%v; asked %d times", err, alive.times)
	}
	if who.Agent() {
		t.Error("a token of another issuer makes an agent")
	}
}

// An agent is who runs under an account that is named for that, in a pod on a node.
func TestT3_WhoIsAnAgent(t *testing.T) {
	f := newFixture(t)
	for name, tt := range map[string]struct {
		agents []ServiceAccount
		want   bool
	}{
		"named":             {[]ServiceAccount{{"x", "y"}, {"shop", "cart"}}, true},
		"nobody named":      {nil, false},
		"another namespace": {[]ServiceAccount{{"bank", "cart"}}, false},
		"another name":      {[]ServiceAccount{{"shop", "cart2"}}, false},
	} {
		a, _ := f.in(t, Cluster{Agents: tt.agents})
		who, err := a.Authenticate(t.Context(), Credentials{Bearer: f.token(t, nil)})
		if err != nil || who.Agent() != tt.want {
			t.Errorf("%s: %v, %v", name, who, err)
		}
	}
	// Without a node there is nothing to be the agent of.
	audiences := map[string]time.Duration{"meshca": time.Hour}
	v := must[*satoken.Verifier](t)(satoken.New(satoken.Config{Issuers: []satoken.Issuer{{URL: issuerURL, Keys: f.issuer, Audiences: audiences}}}))
	a := must[*Authenticator](t)(New(Config{Tokens: v, TrustDomain: f.td, Clusters: map[string]Cluster{issuerURL: {Agents: []ServiceAccount{{"shop", "cart"}}}}}))
	for name, change := range map[string]func(*tokenissuer.Claims){
		"no node": func(c *tokenissuer.Claims) { c.NodeName, c.NodeUID = "", "" },
		"no pod":  func(c *tokenissuer.Claims) { c.PodName, c.PodUID, c.NodeName, c.NodeUID = "", "", "", "" },
	} {
		who, err := a.Authenticate(t.Context(), Credentials{Bearer: f.token(t, change)})
		if err != nil || who.Agent() {
			t.Errorf("%s: %v, %v", name, who, err)
		}
	}
}

func TestNewRefusesClusters(t *testing.T) {
	f := newFixture(t)
	tokens := f.authenticator(t, f.issuer, nil).tokens
	for name, c := range map[string]map[string]Cluster{
		"of no issuer":            {"https://isuer.test": {}},
		"with an unheard of name": {issuerURL: {Agents: []ServiceAccount{{"shop", "Cart"}}}},
	} {
		if _, err := New(Config{Tokens: tokens, TrustDomain: f.td, Clusters: c}); err == nil {
			t.Errorf("a cluster %s was taken", name)
		}
	}
}
