package tokenissuer_test

import (
	"crypto/ed25519"
	"crypto/elliptic"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
	"github.com/meshca/meshca/identity/token/tokentest"
)

func TestIssuedTokensVerify(t *testing.T) {
	for name, c := range map[string]tokenissuer.Config{
		"P-256 by default": {},
		"P-384":            {Key: tokentest.NewKey(t, elliptic.P384())},
		"P-521":            {Key: tokentest.NewKey(t, elliptic.P521())},
		"RSA":              {Key: tokentest.RSAKey(t)},
	} {
		t.Run(name, func(t *testing.T) {
			c.URL = "https://demo.invalid"
			iss, err := tokenissuer.New(c)
			if err != nil {
				t.Fatal(err)
			}
			v, err := token.New(token.Config{Issuers: []token.Issuer{{
				URL: iss.URL(), Keys: iss, RequirePod: true, Audiences: map[string]time.Duration{"meshca": time.Minute},
			}}})
			if err != nil {
				t.Fatal(err)
			}
			raw, err := iss.Issue(tokenissuer.Claims{
				Namespace: "shop", ServiceAccount: "cart", PodName: "p", PodUID: "u", NodeName: "n", NodeUID: "v",
				Audience: []string{"meshca"}, Lifetime: time.Minute,
			})
			if err != nil {
				t.Fatal(err)
			}
			got, err := v.Verify(t.Context(), raw)
			if err != nil {
				t.Fatal(err)
			}
			if got.ServiceAccountUID() == "" {
				t.Error("the service account has no UID")
			}
		})
	}
}

func TestJWKSHoldsNoPrivateKey(t *testing.T) {
	iss, err := tokenissuer.New(tokenissuer.Config{URL: "https://demo.invalid"})
	if err != nil {
		t.Fatal(err)
	}
	var set struct{ Keys []map[string]any }
	if err := json.Unmarshal(iss.JWKS(), &set); err != nil || len(set.Keys) != 1 {
		t.Fatalf("JWKS is %s (%v)", iss.JWKS(), err)
	}
	for _, member := range []string{"d", "p", "q", "k"} {
		if set.Keys[0][member] != nil {
			t.Errorf("JWKS holds %q", member)
		}
	}
}

func TestIssuerRefusesWhatItCannotSay(t *testing.T) {
	_, edwards, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tokenissuer.New(tokenissuer.Config{}); err == nil {
		t.Error("an issuer without a URL was made")
	}
	if _, err := tokenissuer.New(tokenissuer.Config{URL: "x", Key: edwards}); err == nil {
		t.Error("an issuer with an Ed25519 key was made")
	}
	iss, err := tokenissuer.New(tokenissuer.Config{URL: "x"})
	if err != nil {
		t.Fatal(err)
	}
	good := tokenissuer.Claims{Namespace: "shop", ServiceAccount: "cart", Audience: []string{"meshca"}, Lifetime: time.Hour}
	for want, change := range map[string]func(*tokenissuer.Claims){
		"a namespace":                  func(c *tokenissuer.Claims) { c.Namespace = "" },
		"service account are needed":   func(c *tokenissuer.Claims) { c.ServiceAccount = "" },
		"an audience is needed":        func(c *tokenissuer.Claims) { c.Audience = nil },
		"is too short":                 func(c *tokenissuer.Claims) { c.Lifetime = 0 },
		"a pod needs a name and a UID": func(c *tokenissuer.Claims) { c.PodName = "p" },
		"a node needs a name and a":    func(c *tokenissuer.Claims) { c.NodeUID = "u" },
	} {
		bad := good
		change(&bad)
		if _, err := iss.Issue(bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, expected %q", err, want)
		}
	}
}
