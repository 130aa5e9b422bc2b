package token_test

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokentest"
)

// Each claim that counts, in each wrong shape: none of them verifies.
func TestV9_EachClaimMissingOrOfAWrongKind(t *testing.T) {
	w := newWorld(t, nil)
	huge := strings.Repeat("x", 5000)
	paths := []string{
		"iss", "sub", "aud", "exp", "nbf", "iat", "kube", "kube.namespace", "kube.serviceaccount",
		"kube.serviceaccount.name", "kube.serviceaccount.uid", "kube.pod", "kube.pod.name", "kube.pod.uid",
		"kube.node", "kube.node.name", "kube.node.uid",
	}
	shapes := map[string]any{
		"missing": tokentest.Absent, "null": nil, "bool": true, "float": 1.5, "empty string": "", "string of digits": " 1772370000",
		"empty array": []any{}, "array of null": []any{nil}, "nested array": []any{[]any{"meshca"}}, "object": map[string]any{"a": "b"},
		"huge string": huge, "negative": -1, "zero": 0,
	}
	for _, path := range paths {
		for shape, value := range shapes {
			t.Run(path+"/"+shape, func(t *testing.T) {
				w.verdict(t, w.Token(t, tokentest.With(w.Claims(), path, value)), " ")
			})
		}
	}
	for _, value := range []any{nil, 1, true, []any{"a"}, "a b", "a\x00", strings.Repeat("x", 257)} {
		w.verdict(t, w.Token(t, tokentest.With(w.Claims(), "jti", value)), "its ")
	}
}

func TestV9_T2_Times(t *testing.T) {
	w := newWorld(t, nil)
	now := noon.Unix()
	for _, test := range []struct {
		name          string
		iat, nbf, exp any
		want          string
	}{
		{"just issued", now, now, now + 3600, ""},
		{"exp one second inside the leeway", now - 600, now - 600, now - 29, ""},
		{"exp at the leeway", now - 600, now - 600, now - 30, "expired 30s ago"},
		{"exp one second beyond", now - 600, now - 600, now - 31, "expired 31s ago"},
		{"nbf one second inside the leeway", now, now + 29, now + 600, ""},
		{"nbf at the leeway", now, now + 30, now + 600, ""},
		{"nbf one second beyond", now, now + 31, now + 600, "not valid for another 31s"},
		{"iat at the leeway", now + 30, now, now + 600, ""},
		{"iat one second beyond", now + 31, now, now + 600, "issued 31s from now"},
		{"exp before iat", now, now, now - 1, "not after it was issued"},
		{"exp equals iat", now, now, now, "not after it was issued"},
		{"lifetime at the limit", now - 10, now, now + 3590, ""},
		{"lifetime one second beyond", now, now, now + 3601, "it lives for 3601 s; tokens for audience \"meshca\" may live for 1h0m0s"},
		{"year 9999", now, now, 253402300799, "it lives for 251629934399 s"},
		{"beyond year 9999", now, now, 253402300800, `its "exp" is a number`},
		{"beyond int64", now, now, jsonNumber("99999999999999999999"), `its "exp" is a number`},
		{"wraps around int64", now, now, jsonNumber("18446744075481921616"), `its "exp" is a number`},
		{"fraction", now, now, jsonNumber(fmt.Sprint(now+600) + ".5"), `its "exp" is a number`},
		{"fraction of zero", now, now, jsonNumber(fmt.Sprint(now+600) + ".0"), `its "exp" is a number`},
		{"exponent", now, now, jsonNumber("1.8e9"), `its "exp" is a number`},
		{"negative nbf", now, -1, now + 600, `its "nbf" is a number`},
		{"string", now, now, fmt.Sprint(now + 600), `its "exp" is a string`},
		{"iat missing", tokentest.Absent, now, now + 600, `it has no "iat"`},
		{"nbf missing", now, tokentest.Absent, now + 600, `it has no "nbf"`},
		{"exp missing", now, now, tokentest.Absent, `it has no "exp"`},
		{"exp null", now, now, nil, `its "exp" is null`},
	} {
		t.Run(test.name, func(t *testing.T) {
			claims := tokentest.With(tokentest.With(tokentest.With(w.Claims(), "iat", test.iat), "nbf", test.nbf), "exp", test.exp)
			w.verdict(t, w.Token(t, claims), test.want)
		})
	}
}

// jsonNumber is a number that Go has no type for.
type jsonNumber string

func (n jsonNumber) MarshalJSON() ([]byte, error) { return []byte(n), nil }

func TestV45_V55_Issuer(t *testing.T) {
	w := newWorld(t, nil)
	for _, iss := range []string{
		issuerURL + "/", issuerURL + ".evil.example", strings.TrimSuffix(issuerURL, "l"), strings.ToUpper(issuerURL),
		"http" + strings.TrimPrefix(issuerURL, "https"), " " + issuerURL, issuerURL + "\x00", issuerURL + "#", "https://x/" + issuerURL,
	} {
		w.verdict(t, w.Token(t, tokentest.With(w.Claims(), "iss", iss)), "is not among")
	}
	w.verdict(t, w.Token(t, tokentest.With(w.Claims(), "iss", "kubernetes/serviceaccount")), "comes from a Secret")
	upper := tokentest.With(w.Claims(), "iss", tokentest.Absent)
	upper["ISS"] = issuerURL
	w.verdict(t, w.Token(t, upper), "names no issuer")
}

func TestV45_Audience(t *testing.T) {
	two := newWorld(t, func(i *token.Issuer) {
		i.Audiences = map[string]time.Duration{"meshca": time.Hour, "istio-ca": 24 * time.Hour}
	})
	one := newWorld(t, nil)
	thousand := make([]string, 1000)
	for i := range thousand {
		thousand[i] = "a"
	}
	seventeen := append(thousand[:16:16], "meshca")
	for _, test := range []struct {
		name string
		aud  any
		want string
	}{
		{"string", "meshca", ""},
		{"array", []string{"meshca"}, ""},
		{"array with others", []string{"vault", "meshca", ""}, ""},
		{"sixteen", append(thousand[:15:15], "meshca"), ""},
		{"seventeen", seventeen, `its "aud" is an array of 17`},
		{"thousand", append(thousand, "meshca"), `its "aud" is an array of 1001`},
		{"another", []string{"vault"}, `audience ["vault"] does not hold "meshca"`},
		{"prefix", "mesh", `audience ["mesh"] does not hold "meshca"`},
		{"longer", "meshca2", "does not hold"},
		{"substring", "my-meshca-x", "does not hold"},
		{"case", "MESHCA", "does not hold"},
		{"space", "meshca ", "does not hold"},
		{"joined", "meshca,vault", "does not hold"},
		{"joined by a space", "vault meshca", "does not hold"},
		{"newline", "meshca\n", `audience ["meshca\n"] does not hold "meshca"`},
		{"empty", "", `audience [""] does not hold`},
		{"no entry", []string{}, `audience [] does not hold "meshca"`},
		{"missing", tokentest.Absent, `audience [] does not hold "meshca"`},
		{"null", nil, `its "aud" is null`},
		{"object", map[string]bool{"meshca": true}, `its "aud" is an object`},
		{"mixed", []any{"meshca", 1}, `its "aud" is an array that holds a number`},
		{"nested", []any{[]string{"meshca"}}, `its "aud" is an array that holds an array`},
	} {
		t.Run(test.name, func(t *testing.T) {
			one.verdict(t, one.Token(t, tokentest.With(one.Claims(), "aud", test.aud)), test.want)
		})
	}
	two.verdict(t, two.Token(t, tokentest.With(two.Claims(), "aud", "vault")), `audience ["vault"] holds none of ["meshca" "istio-ca"]`)
}

// A lifetime limit belongs to an audience, and the audience that is reported is
// the one whose limit was kept.
func TestT2_LifetimeLimitByAudience(t *testing.T) {
	w := newWorld(t, func(i *token.Issuer) {
		i.Audiences = map[string]time.Duration{"meshca": time.Hour, "istio-ca": 24 * time.Hour}
	})
	for _, test := range []struct {
		name     string
		aud      []string
		lifetime int64
		accepted string
		want     string
	}{
		{"an hour for us", []string{"meshca"}, 3600, "meshca", ""},
		{"a day for us", []string{"meshca"}, 86400, "", `may live for 1h0m0s, so ask for one with expirationSeconds of at most 3600`},
		{"a day for Istio", []string{"istio-ca"}, 86400, "istio-ca", ""},
		{"more than a day for Istio", []string{"istio-ca"}, 86401, "", `may live for 24h0m0s`},
		{"an hour for both", []string{"istio-ca", "meshca"}, 3600, "meshca", ""},
		{"a day for both counts as Istio's", []string{"meshca", "istio-ca"}, 86400, "istio-ca", ""},
		{"a year", []string{"meshca", "istio-ca"}, 365 * 86400, "", `tokens for audience "istio-ca" may live for 24h0m0s`},
	} {
		t.Run(test.name, func(t *testing.T) {
			claims := tokentest.With(tokentest.With(w.Claims(), "aud", test.aud), "exp", noon.Unix()+test.lifetime)
			raw := w.Token(t, claims)
			w.verdict(t, raw, test.want)
			if c, err := w.v.Verify(t.Context(), raw); err == nil && c.Audience() != test.accepted {
				t.Errorf("accepted for %q, expected %q", c.Audience(), test.accepted)
			}
		})
	}
}

// accounts replaces the subject and, to agree with it, the Kubernetes claims.
func accounts(claims map[string]any, sub, ns, sa string) map[string]any {
	claims = tokentest.With(claims, "sub", sub)
	claims = tokentest.With(claims, "kube.namespace", ns)
	return tokentest.With(claims, "kube.serviceaccount.name", sa)
}

func TestV19_Subject(t *testing.T) {
	w := newWorld(t, nil)
	long := strings.Repeat("a", 253)
	for _, test := range []struct{ ns, sa, want string }{
		{"shop", "cart", ""},
		{"shop", "cart.v2.internal", ""},
		{"shop", long, ""},
		{"shop", long + "a", "its subject"},
		{strings.Repeat("n", 63), "cart", ""},
		{strings.Repeat("n", 64), "cart", "its subject"},
		{"", "cart", "its subject"},
		{"shop", "", "its subject"},
		{"", "", "its subject"},
		{"shop", "cart:admin", "its subject"},
		{"a.b", "cart", "its subject"},
		{"shop", "..", "its subject"},
		{"shop", "a..b", "its subject"},
		{"shop", ".cart", "its subject"},
		{"shop", "-cart", "its subject"},
		{"shop", "cart/../admin", "its subject"},
		{"shop", "%2e%2e", "its subject"},
		{"shop", "Cart", "its subject"},
		{"shop", "cart\x00", "its subject"},
		{"shop", "cаrt", "its subject"}, // a Cyrillic letter
		{"shop ", "cart", "its subject"},
		{"*", "*", "its subject"},
	} {
		raw := w.Token(t, accounts(w.Claims(), "system:serviceaccount:"+test.ns+":"+test.sa, test.ns, test.sa))
		w.verdict(t, raw, test.want)
	}
	for _, sub := range []string{
		"system:serviceaccount:cart", "system:serviceaccount", "system:serviceaccount:", "system:serviceaccount:shop:cart:x",
		"system:node:shop:cart", "System:serviceaccount:shop:cart", "xsystem:serviceaccount:shop:cart", "shop:cart", "cart", ":::", " ",
		"spiffe://cluster.local/ns/shop/sa/cart",
	} {
		w.verdict(t, w.Token(t, tokentest.With(w.Claims(), "sub", sub)), "is not system:serviceaccount:<namespace>:<name>")
	}
}

// The subject and the Kubernetes claims must name one ServiceAccount.
func TestV39_SubjectAndKubernetesClaimsAgree(t *testing.T) {
	w := newWorld(t, nil)
	for path, value := range map[string]any{
		"sub": "system:serviceaccount:shop:admin", "kube.namespace": "bank", "kube.serviceaccount.name": "admin",
	} {
		w.verdict(t, w.Token(t, tokentest.With(w.Claims(), path, value)), "its kubernetes.io claims name")
	}
	w.verdict(t, w.Token(t, accounts(w.Claims(), "system:serviceaccount:shop:cart", "cart", "shop")), "its kubernetes.io claims name")
}

func TestT2_BoundToAPodOnANode(t *testing.T) {
	kubernetes := newWorld(t, nil)
	elsewhere := newWorld(t, func(i *token.Issuer) { i.RequirePod = false })
	for _, test := range []struct {
		path              string
		value             any
		inside, elsewhere string
	}{
		{"kube.pod", tokentest.Absent, "it is bound to no pod", ""},
		{"kube.pod", nil, "it is bound to no pod", ""},
		{"kube.node", tokentest.Absent, "it names no node", ""},
		{"kube.serviceaccount.uid", tokentest.Absent, "no service account UID", ""},
		{"kube.pod.uid", tokentest.Absent, "its pod", "its pod"},
		{"kube.pod.name", tokentest.Absent, "its pod", "its pod"},
		{"kube.node.uid", tokentest.Absent, "its node", "its node"},
		{"kube.node.name", tokentest.Absent, "its node", "its node"},
		{"kube.pod.uid", "*", "its pod", "its pod"},
		{"kube.pod.uid", "a/../b", "its pod", "its pod"},
		{"kube.pod.uid", strings.Repeat("a", 65), "its pod", "its pod"},
		{"kube.pod.name", "Cart 0", "its pod", "its pod"},
		{"kube.node.name", "node\n1", "its node", "its node"},
		{"kube.node.name", strings.Repeat("n", 254), "its node", "its node"},
		{"kube.serviceaccount.uid", "x y", "service account UID", "service account UID"},
	} {
		claims := tokentest.With(kubernetes.Claims(), test.path, test.value)
		kubernetes.verdict(t, kubernetes.Token(t, claims), test.inside)
		elsewhere.verdict(t, elsewhere.Token(t, claims), test.elsewhere)
	}
	none := maps.Clone(kubernetes.Claims())
	delete(none, "kubernetes.io")
	none["kubernetes.io/serviceaccount/namespace"] = "shop" // a token from a Secret
	kubernetes.verdict(t, kubernetes.Token(t, none), "it has no kubernetes.io claims")
	elsewhere.verdict(t, elsewhere.Token(t, none), "it has no kubernetes.io claims")
}
