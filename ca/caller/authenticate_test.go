package caller

import (
	"context"
	"crypto/x509"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	satoken "github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

const (
	issuerURL = "https://issuer.test"
	cartURI   = "spiffe://cluster.local/ns/shop/sa/cart"
	podUID    = "7f9c1e2a-4f0e-4c3e-9d55-0a1b2c3d4e5f"
	nodeUID   = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

type fixture struct {
	td     identity.TrustDomain
	cart   identity.ID
	issuer *tokenissuer.Issuer
	ca     *identitytest.CA
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	td := must[identity.TrustDomain](t)(identity.ParseTrustDomain("cluster.local"))
	return &fixture{
		td:     td,
		cart:   must[identity.ID](t)(identity.ParseID(cartURI)),
		issuer: must[*tokenissuer.Issuer](t)(tokenissuer.New(tokenissuer.Config{URL: issuerURL})),
		ca:     identitytest.NewCA(t, td),
	}
}

func (f *fixture) token(t testing.TB, change func(*tokenissuer.Claims)) string {
	t.Helper()
	c := tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: "cart", PodName: "cart-0", PodUID: podUID,
		NodeName: "node-1", NodeUID: nodeUID, Audience: []string{"meshca"}, Lifetime: time.Hour,
	}
	if change != nil {
		change(&c)
	}
	return must[string](t)(f.issuer.Issue(c))
}

func (f *fixture) authenticator(t testing.TB, keys satoken.KeySource, bundles identity.BundleSource, listed ...identity.ID) *Authenticator {
	t.Helper()
	v := must[*satoken.Verifier](t)(satoken.New(satoken.Config{Issuers: []satoken.Issuer{{
		URL: issuerURL, Keys: keys, Audiences: map[string]time.Duration{"meshca": time.Hour}, RequirePod: true,
	}}}))
	return must[*Authenticator](t)(New(Config{Tokens: v, TrustDomain: f.td, ByCertificate: listed, Bundles: bundles}))
}

type keysAway struct{}

func (keysAway) Keys(context.Context, string) ([]satoken.Key, error) {
	return nil, errors.New("connection refused")
}

type noBundle struct{}

func (noBundle) Bundle(td identity.TrustDomain) (*identity.Bundle, error) {
	return nil, &identity.NoBundleError{TrustDomain: td}
}

func TestByToken(t *testing.T) {
	f := newFixture(t)
	a := f.authenticator(t, f.issuer, nil)
	raw := f.token(t, nil)
	// An expired certificate beside the token counts as not shown.
	stale := f.ca.SVID(t, f.cart, identitytest.WithLifetime(-time.Minute)).Certificates()
	for name, c := range map[string]Credentials{
		"token alone":                        {Bearer: raw},
		"token and certificate that expired": {Bearer: raw, Certificates: stale},
	} {
		t.Run(name, func(t *testing.T) {
			who, err := a.Authenticate(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			pod, uid := who.Pod()
			if who.ID() != f.cart || who.Method() != ByToken || pod != "cart-0" || uid != podUID || who.Node() != "node-1" || who.Resource() != podUID {
				t.Errorf("caller %v", who.LogValue())
			}
			if left := time.Until(who.Expires()); left < 59*time.Minute || left > time.Hour {
				t.Errorf("the proof holds for %v", left)
			}
			if strings.Contains(slog.AnyValue(who).Resolve().String(), raw[len(raw)-20:]) {
				t.Error("the token is in the log value")
			}
		})
	}
}

// A fault of ours is never told as a bad credential: Istio's agents would throw
// good tokens away.
func TestV16_RefusedOrUnavailable(t *testing.T) {
	f := newFixture(t)
	good := f.ca.SVID(t, f.cart).Certificates()
	other := must[identity.ID](t)(identity.ParseID("spiffe://cluster.local/ns/shop/sa/other"))
	foreign := must[identity.ID](t)(identity.ParseID("spiffe://other.example/ns/shop/sa/cart"))
	foreignCA := identitytest.NewCA(t, foreign.TrustDomain())
	impostor := identitytest.NewCA(t, f.td)
	asServer := identitytest.WithTemplate(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
	tests := map[string]struct {
		keys        satoken.KeySource
		bundles     identity.BundleSource
		listed      []identity.ID
		creds       Credentials
		want        string
		unavailable bool
	}{
		"nothing":                       {want: "no token and no client certificate"},
		"garbage":                       {creds: Credentials{Bearer: "x"}, want: "token"},
		"wrong audience":                {creds: Credentials{Bearer: f.token(t, func(c *tokenissuer.Claims) { c.Audience = []string{"vault"} })}, want: `does not hold "meshca"`},
		"bound to no pod":               {creds: Credentials{Bearer: f.token(t, func(c *tokenissuer.Claims) { c.PodName, c.PodUID = "", "" })}, want: "bound to no pod"},
		"lives too long":                {creds: Credentials{Bearer: f.token(t, func(c *tokenissuer.Claims) { c.Lifetime = 2 * time.Hour })}, want: "it lives for 7200 s"},
		"keys out of reach":             {keys: keysAway{}, creds: Credentials{Bearer: f.token(t, nil)}, want: "connection refused", unavailable: true},
		"bad token, good certificate":   {listed: []identity.ID{f.cart}, creds: Credentials{Bearer: "x", Certificates: good}, want: "token"},
		"certificate, nobody listed":    {creds: Credentials{Certificates: good}, want: "prove nothing here"},
		"certificate, another listed":   {listed: []identity.ID{other}, creds: Credentials{Certificates: good}, want: "not listed"},
		"another listed, no bundle yet": {listed: []identity.ID{other}, bundles: noBundle{}, creds: Credentials{Certificates: good}, want: "not listed"},
		"certificate, no bundle yet":    {listed: []identity.ID{f.cart}, bundles: noBundle{}, creds: Credentials{Certificates: good}, want: "no trust bundle", unavailable: true},
		"expired certificate":           {listed: []identity.ID{f.cart}, creds: Credentials{Certificates: f.ca.SVID(t, f.cart, identitytest.WithLifetime(-time.Minute)).Certificates()}, want: "it ended at"},
		"certificate of another domain": {listed: []identity.ID{f.cart}, creds: Credentials{Certificates: foreignCA.SVID(t, foreign).Certificates()}, want: "not listed"},
		"certificate of an impostor":    {listed: []identity.ID{f.cart}, creds: Credentials{Certificates: impostor.SVID(t, f.cart).Certificates()}, want: "signed its chain"},
		"an authority's certificate":    {listed: []identity.ID{f.cart}, creds: Credentials{Certificates: []*x509.Certificate{f.ca.Root.Certificate}}, want: "CA certificate"},
		"certificate for servers only":  {listed: []identity.ID{f.cart}, creds: Credentials{Certificates: asLeaf(t, f, asServer)}, want: "extended key usage"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.keys == nil {
				tt.keys = f.issuer
			}
			if tt.bundles == nil {
				tt.bundles = f.ca.Bundle()
			}
			who, err := f.authenticator(t, tt.keys, tt.bundles, tt.listed...).Authenticate(t.Context(), tt.creds)
			if who != nil || err == nil {
				t.Fatalf("Authenticate = %v, %v", who, err)
			}
			var refused *RefusedError
			var unavailable *UnavailableError
			if errors.As(err, &refused) == tt.unavailable || errors.As(err, &unavailable) != tt.unavailable {
				t.Errorf("%T: %v", err, err)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%q; want %q in it", err, tt.want)
			}
			if b := tt.creds.Bearer; len(b) > 20 && strings.Contains(err.Error(), b[len(b)-20:]) {
				t.Error("the token is in the error")
			}
		})
	}
}

// asLeaf signs a leaf that identity.SVID would not hold.
func asLeaf(t *testing.T, f *fixture, opts ...identitytest.Option) []*x509.Certificate {
	t.Helper()
	chain, _ := f.ca.Leaf(t, f.cart, opts...)
	return chain
}

func TestV44_ByCertificate(t *testing.T) {
	f := newFixture(t)
	a := f.authenticator(t, f.issuer, f.ca.Bundle(), f.cart)
	svid := f.ca.SVID(t, f.cart)
	who, err := a.Authenticate(t.Context(), Credentials{Certificates: svid.Certificates()})
	if err != nil {
		t.Fatal(err)
	}
	if who.ID() != f.cart || who.Method() != ByCertificate || who.Resource() != cartURI || !who.Expires().Equal(svid.NotAfter()) {
		t.Errorf("caller %v until %v", who.LogValue(), who.Expires())
	}
}

func TestNewRefuses(t *testing.T) {
	f := newFixture(t)
	tokens := f.authenticator(t, f.issuer, nil).tokens
	foreign := must[identity.ID](t)(identity.ParseID("spiffe://other.example/ns/shop/sa/cart"))
	for name, c := range map[string]Config{
		"no tokens":       {TrustDomain: f.td},
		"no trust domain": {Tokens: tokens},
		"no bundles":      {Tokens: tokens, TrustDomain: f.td, ByCertificate: []identity.ID{f.cart}},
		"foreign ID":      {Tokens: tokens, TrustDomain: f.td, ByCertificate: []identity.ID{foreign}, Bundles: f.ca.Bundle()},
		"root ID":         {Tokens: tokens, TrustDomain: f.td, ByCertificate: []identity.ID{f.td.ID()}, Bundles: f.ca.Bundle()},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// Only the Authenticator makes a Caller, and only package ca's sign makes
// certificates for one: the two halves of "nothing is signed for somebody who
// has not been authenticated".
func TestOnlyTheAuthenticatorMakesACaller(t *testing.T) {
	files := must[[]string](t)(filepath.Glob("*.go"))
	makers := map[string]bool{}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		src := must[[]byte](t)(os.ReadFile(file))
		parsed := must[*ast.File](t)(parser.ParseFile(token.NewFileSet(), file, src, 0))
		for _, d := range parsed.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CompositeLit:
					if id, ok := n.Type.(*ast.Ident); ok && id.Name == "Caller" {
						makers[fn.Name.Name] = true
					}
				case *ast.CallExpr:
					if id, ok := n.Fun.(*ast.Ident); ok && id.Name == "new" {
						if arg, ok := n.Args[0].(*ast.Ident); ok && arg.Name == "Caller" {
							makers[fn.Name.Name] = true
						}
					}
				}
				return true
			})
		}
	}
	if len(makers) != 2 || !makers["byToken"] || !makers["byCert"] {
		t.Errorf("functions that make a Caller: %v; only byToken and byCert may", makers)
	}
}

// What a record says of a caller tells whose word was taken for it.
func TestT19_LogValueNamesTheProof(t *testing.T) {
	f := newFixture(t)
	a := f.authenticator(t, f.issuer, f.ca.Bundle(), f.cart)
	for name, tt := range map[string]struct {
		creds Credentials
		want  map[string]string
	}{
		"token": {Credentials{Bearer: f.token(t, nil), Peer: "10.0.0.7:4711"}, map[string]string{
			"spiffe_id": cartURI, "by": "token", "issuer": issuerURL, "audience": "meshca", "pod_uid": podUID, "peer": "10.0.0.7:4711",
		}},
		"certificate": {Credentials{Certificates: f.ca.SVID(t, f.cart).Certificates(), Peer: "10.0.0.7:4711"}, map[string]string{
			"spiffe_id": cartURI, "by": "certificate", "peer": "10.0.0.7:4711",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			who, err := a.Authenticate(t.Context(), tt.creds)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for _, attr := range who.LogValue().Group() {
				got[attr.Key] = attr.Value.String()
			}
			for k, want := range tt.want {
				if got[k] != want {
					t.Errorf("%s is %q; want %q", k, got[k], want)
				}
			}
			if _, ok := got["issuer"]; ok != (name == "token") {
				t.Errorf("log value %v", got)
			}
		})
	}
}
