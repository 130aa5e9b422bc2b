package token_test

import (
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"maps"
	"strings"
	"testing"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokentest"
)

// keys is a fixed source.
type keys []token.Key

func (k keys) Keys(_ context.Context, kid string) ([]token.Key, error) {
	var found []token.Key
	for _, key := range k {
		if key.ID == kid {
			found = append(found, key)
		}
	}
	return found, nil
}

func TestV55_Bounds(t *testing.T) {
	w := newWorld(t, nil)
	good := w.Token(t, w.Claims())
	padded := func(n int) string { // a good token of n bytes
		claims, raw := w.Claims(), ""
		for size := n * 3 / 4; ; size-- {
			claims["x"] = strings.Repeat("a", max(size-len(good)*3/4, 0))
			if raw = w.Token(t, claims); len(raw) <= n {
				return raw
			}
		}
	}
	header := func(n int) string {
		h := `{"alg":"ES256","kid":"` + w.KID + `"` + strings.Repeat(" ", n-len(w.KID)-24) + `}`
		if len(h) != n {
			t.Fatalf("header has %d bytes, expected %d", len(h), n)
		}
		return tokentest.Sign(t, "ES256", w.Key, []byte(h), tokentest.JSON(t, w.Claims()))
	}
	part := strings.Split(good, ".")
	deep := `{"iss":"` + issuerURL + `","x":` + strings.Repeat("[", 2500) + strings.Repeat("]", 2500) + `}`
	for _, test := range []struct{ name, raw, want string }{
		{"good", good, ""},
		{"8 KiB", padded(8 << 10), ""},
		{"8 KiB and a byte", good + strings.Repeat("A", 8<<10+1-len(good)), "it has 8193 bytes; at most 8192 are read"},
		{"1 MiB", strings.Repeat("A", 1<<20), "it has 1048576 bytes"},
		{"header of 1 KiB", header(1 << 10), ""},
		{"header of 1 KiB and a byte", header(1<<10 + 1), "its header has 1025 bytes; at most 1024 are read"},
		{"empty", "", "there is none"},
		{"no dot", strings.ReplaceAll(good, ".", ""), "it has 0 dots"},
		{"one dot", part[0] + "." + part[1], "it has 1 dots"},
		{"three dots", good + ".", "it has 3 dots"},
		{"five parts (JWE)", good + "." + part[0] + "." + part[1], "it has 4 dots"},
		{"only dots", "..", "its header is not a JSON object"},
		{"no signature", part[0] + "." + part[1] + ".", "its signature is missing"},
		{"no claims", part[0] + ".." + part[2], "not the JSON of a token"},
		{"padding", good + "==", `'=', which does not occur`},
		{"standard alphabet", part[0] + "." + part[1] + ".+/+/", `'+', which does not occur`},
		{"line break inside", good[:20] + "\n" + good[20:], `'\n', which does not occur`},
		{"line break at the end", good + "\n", `'\n', which does not occur`},
		{"Bearer", "Bearer " + good, `' ', which does not occur`},
		{"two tokens", good + "," + good, `',', which does not occur`},
		{"NUL", good + "\x00", `'\x00', which does not occur`},
		{"JSON serialisation", `{"payload":"` + part[1] + `","protected":"` + part[0] + `","signature":"` + part[2] + `"}`, "does not occur"},
		{"deep nesting", tokentest.Sign(t, "ES256", w.Key, tokentest.JSON(t, w.Header("ES256")), []byte(deep)), "it has no"},
		{"bits that decode to nothing", part[0] + "." + part[1] + "." + otherSpelling(part[2]), "its signature is missing or not base64url"},
	} {
		t.Run(test.name, func(t *testing.T) { w.verdict(t, test.raw, test.want) })
	}
}

// otherSpelling changes bits of the last character that a lenient decoder drops.
func otherSpelling(b64 string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, b64[len(b64)-1])
	return b64[:len(b64)-1] + string(alphabet[last^1])
}

// The header is taken literally: three members, nothing that brings a key or
// changes the meaning of the rest.
func TestT13_V58_HeaderMembers(t *testing.T) {
	w := newWorld(t, nil)
	claims := tokentest.JSON(t, w.Claims())
	evil := tokentest.NewIssuer(t, issuerURL, nil, atNoon)
	for member, value := range map[string]any{
		"jwk": json.RawMessage(evil.JWKS()), "jku": "https://evil.example/jwks", "x5u": "https://evil.example/x", "x5c": []string{"AAAA"},
		"x5t": "AAAA", "crit": []string{"exp"}, "b64": false, "zip": "DEF", "enc": "A128GCM", "cty": "JWT", "nonce": "n", "ALG": "ES256", "": 1,
	} {
		header := w.Header("ES256")
		header[member] = value
		raw := tokentest.Sign(t, "ES256", w.Key, tokentest.JSON(t, header), claims)
		w.verdict(t, raw, "only alg, kid and typ are accepted")
		raw = tokentest.Sign(t, "ES256", evil.Key, tokentest.JSON(t, header), claims)
		w.verdict(t, raw, "only alg, kid and typ are accepted")
	}
	id := w.KID
	for _, test := range []struct{ header, want string }{
		{`{"alg":"ES256","kid":"` + id + `"}`, ""},
		{`{"alg":"ES256","kid":"` + id + `","typ":"JWT"}`, ""},
		{`{"alg":"ES256","kid":"` + id + `","typ":"at+jwt"}`, `its type is "at+jwt"`},
		{`{"alg":"ES256","kid":"` + id + `","typ":1}`, `its header's "typ" is a number`},
		{`{"alg":"ES256"}`, "its key ID has 0 bytes"},
		{`{"alg":"ES256","kid":""}`, "its key ID has 0 bytes"},
		{`{"alg":"ES256","kid":null}`, `its header's "kid" is null`},
		{`{"alg":"ES256","kid":["` + id + `"]}`, `its header's "kid" is an array`},
		{`{"alg":"ES256","kid":"` + strings.Repeat("k", 257) + `"}`, "its key ID has 257 bytes"},
		{`{"alg":"ES256","kid":"../../dev/null"}`, `key "../../dev/null", which its issuer does not publish`},
		{`{"alg":"ES256","kid":"` + id + `\u0000"}`, "does not publish"},
		{`{"alg":"ES256","kid":"x","kid":"` + id + `"}`, "unique members"},
		{`{"alg":"none","alg":"ES256","kid":"` + id + `"}`, "unique members"},
		{`{"alg":"ES256","\u0061lg":"none","kid":"` + id + `"}`, "unique members"},
		{`{"kid":"` + id + `"}`, `its algorithm is ""`},
		{`{"alg":["ES256"],"kid":"` + id + `"}`, `its header's "alg" is an array`},
		{`null`, "not a JSON object"},
		{`[]`, "not a JSON object"},
		{`{}`, `its algorithm is ""`},
		{`{"alg":"ES256","kid":"` + id + `"} x`, "not a JSON object"},
		{``, "not a JSON object"},
	} {
		t.Run(test.header, func(t *testing.T) {
			w.verdict(t, tokentest.Sign(t, "ES256", w.Key, []byte(test.header), claims), test.want)
		})
	}
}

// The key decides which algorithms there are. The header can only agree.
func TestT13_V58_AlgorithmIsTheKeys(t *testing.T) {
	rsaKey := tokentest.RSAKey(t)
	p256, p384, p521 := tokentest.NewKey(t, elliptic.P256()), tokentest.NewKey(t, elliptic.P384()), tokentest.NewKey(t, elliptic.P521())
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	all := []string{"RS256", "RS384", "RS512", "PS256", "PS384", "ES256", "ES384", "ES512", "HS256", "none"}
	source := keys{
		{ID: "rsa", Algorithms: all, Public: rsaKey.Public()},
		{ID: "rsa-rs256", Algorithms: []string{"RS256"}, Public: rsaKey.Public()},
		{ID: "rsa-1024", Algorithms: all, Public: small.Public()},
		{ID: "p256", Algorithms: all, Public: p256.Public()},
		{ID: "p384", Algorithms: all, Public: p384.Public()},
		{ID: "p521", Algorithms: all, Public: p521.Public()},
		{ID: "bytes", Algorithms: all, Public: []byte("a secret")},
		{ID: "none", Algorithms: nil, Public: p256.Public()},
		{ID: "two", Algorithms: all, Public: p384.Public()},
		{ID: "two", Algorithms: all, Public: tokentest.NewKey(t, elliptic.P256()).Public()},
		{ID: "two", Algorithms: all, Public: p256.Public()},
	}
	w := newWorld(t, func(i *token.Issuer) { i.Keys = source })
	der, err := x509.MarshalPKIXPublicKey(rsaKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	const notAccepted, notForKey = "accepted are RS256, PS256, ES256, ES384, ES512", "is not to be used"
	for _, test := range []struct {
		name, says, kid, sign string
		key                   any
		want                  string
	}{
		{"RS256", "RS256", "rsa", "RS256", rsaKey, ""},
		{"PS256", "PS256", "rsa", "PS256", rsaKey, ""},
		{"ES256", "ES256", "p256", "ES256", p256, ""},
		{"ES384", "ES384", "p384", "ES384", p384, ""},
		{"ES512", "ES512", "p521", "ES512", p521, ""},
		{"none", "none", "p256", "none", nil, notAccepted},
		{"None", "None", "p256", "none", nil, notAccepted},
		{"none with a signature", "none", "p256", "ES256", p256, notAccepted},
		{"lower case", "es256", "p256", "ES256", p256, notAccepted},
		{"HS256 with the public key in PEM", "HS256", "rsa", "HS256", publicPEM, notAccepted},
		{"HS256 with the public key in DER", "HS256", "rsa", "HS256", der, notAccepted},
		{"RS256 said, HS256 made", "RS256", "rsa", "HS256", publicPEM, "its signature does not match"},
		{"RS512", "RS512", "rsa", "RS512", rsaKey, notAccepted},
		{"PS384", "PS384", "rsa", "PS384", rsaKey, notAccepted},
		{"PS256 with a key for RS256", "PS256", "rsa-rs256", "PS256", rsaKey, notForKey},
		{"PS256 said, RS256 made", "PS256", "rsa", "RS256", rsaKey, "its signature does not match"},
		{"ES256 with an RSA key", "ES256", "rsa", "ES256", p256, notForKey},
		{"RS256 with a P-256 key", "RS256", "p256", "RS256", rsaKey, notForKey},
		{"ES384 with a P-256 key", "ES384", "p256", "ES384", p256, notForKey},
		{"ES256 with a P-384 key", "ES256", "p384", "ES256", p384, notForKey},
		{"RSA 1024", "RS256", "rsa-1024", "RS256", small, notForKey},
		{"key of bytes", "HS256", "bytes", "HS256", []byte("a secret"), notAccepted},
		{"key of bytes, RS256 said", "RS256", "bytes", "HS256", []byte("a secret"), notForKey},
		{"key without algorithms", "ES256", "none", "ES256", p256, notForKey},
		{"last of several keys with one ID", "ES256", "two", "ES256", p256, ""},
		{"none of several keys with one ID", "ES256", "two", "ES256", tokentest.NewKey(t, elliptic.P256()), "does not match"},
		{"unknown key", "ES256", "p256 ", "ES256", p256, "does not publish"},
		{"another's key", "ES256", "p256", "ES256", tokentest.NewKey(t, elliptic.P256()), "does not match"},
	} {
		t.Run(test.name, func(t *testing.T) {
			header := tokentest.JSON(t, map[string]string{"alg": test.says, "kid": test.kid})
			w.verdict(t, tokentest.Sign(t, test.sign, test.key, header, tokentest.JSON(t, w.Claims())), test.want)
		})
	}
}

// A signature covers exactly its own header and claims.
func TestV7_SignatureCoversWhatIsRead(t *testing.T) {
	w := newWorld(t, nil)
	admin := accounts(w.Claims(), "system:serviceaccount:shop:admin", "shop", "admin")
	mine := strings.Split(w.Token(t, w.Claims()), ".")
	payload := base64.RawURLEncoding.EncodeToString(tokentest.JSON(t, admin))
	w.verdict(t, mine[0]+"."+payload+"."+mine[2], "its signature does not match")
	header := base64.RawURLEncoding.EncodeToString([]byte(`{"typ":"JWT","alg":"ES256","kid":"` + w.KID + `"}`))
	w.verdict(t, header+"."+mine[1]+"."+mine[2], "its signature does not match")
	zero := base64.RawURLEncoding.EncodeToString(make([]byte, 64)) // CVE-2022-21449's signature
	w.verdict(t, mine[0]+"."+mine[1]+"."+zero, "its signature does not match")
}

// A claim that occurs twice could be read in two ways by two readers.
func TestV9_RepeatedClaims(t *testing.T) {
	w := newWorld(t, nil)
	claims := string(tokentest.JSON(t, w.Claims()))
	insert := func(text string) string { return "{" + text + strings.TrimPrefix(claims, "{") }
	for _, payload := range []string{
		insert(`"iss":"` + issuerURL + `",`), insert(`"aud":"vault",`), insert(`"exp":1,`), insert(`"\u0073ub":"system:serviceaccount:shop:admin",`),
		insert(`"kubernetes.io":{},`),
		strings.Replace(claims, `"namespace":"shop"`, `"namespace":"bank","namespace":"shop"`, 1),
		strings.Replace(claims, `"pod":{`, `"pod":{"uid":"x",`, 1),
	} {
		if payload == claims {
			t.Fatal("nothing was repeated")
		}
		w.verdict(t, tokentest.Sign(t, "ES256", w.Key, tokentest.JSON(t, w.Header("ES256")), []byte(payload)), "duplicate key")
	}
	for payload, want := range map[string]string{
		claims + "x":                        "not the JSON of a token",
		"[" + claims + "]":                  "not the JSON of a token",
		`"` + issuerURL + `"`:               "not the JSON of a token",
		"null":                              "names no issuer",
		insert(`"x":"` + "\xff\xfe" + `",`): "not UTF-8",
	} {
		w.verdict(t, tokentest.Sign(t, "ES256", w.Key, tokentest.JSON(t, w.Header("ES256")), []byte(payload)), want)
	}
	other := maps.Clone(w.Claims())
	other["EXP"], other["Aud"] = 1, "vault" // other names, not other spellings
	w.verdict(t, w.Token(t, other), "")
}
