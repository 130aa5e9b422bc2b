package token_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokentest"
)

// The right value inside of an array or an object is of the wrong kind, for all
// but "aud".
func TestV9_EachClaimInsideOfAnother(t *testing.T) {
	w := newWorld(t, nil)
	for _, path := range []string{
		"iss", "sub", "exp", "nbf", "iat", "jti", "kube", "kube.namespace", "kube.serviceaccount", "kube.serviceaccount.name",
		"kube.serviceaccount.uid", "kube.pod", "kube.pod.name", "kube.pod.uid", "kube.node", "kube.node.name", "kube.node.uid",
	} {
		claims := w.Claims()
		value := any(claims)
		for name := range strings.SplitSeq(path, ".") {
			if name == "kube" {
				name = "kubernetes.io"
			}
			value = value.(map[string]any)[name]
		}
		w.verdict(t, w.Token(t, tokentest.With(claims, path, []any{value})), " ")
		w.verdict(t, w.Token(t, tokentest.With(claims, path, jsonNumber("["+strings.Repeat("[],", 1500)+"[]]"))), " ")
		w.verdict(t, w.Token(t, tokentest.With(claims, path, map[string]any{"": value})), " ")
	}
}

// The rows of the leeway that TestV9_T2_Times leaves out.
func TestV9_T2_TimesAtTheEdges(t *testing.T) {
	w := newWorld(t, nil)
	now := noon.Unix()
	for _, claim := range []string{"exp", "nbf", "iat"} {
		for shape, value := range map[string]any{
			"negative": -1, "negative zero": jsonNumber("-0"), "zero": 0, "fraction": jsonNumber(fmt.Sprint(now) + ".5"),
			"fraction of zero": jsonNumber(fmt.Sprint(now) + ".0"), "exponent": jsonNumber("1.8e9"), "whole exponent": jsonNumber("18E8"),
			"beyond year 9999": 253402300800, "beyond int64": jsonNumber("9223372036854775808"), "beyond uint64": jsonNumber("18446744073709551616"),
			"thousand digits": jsonNumber(strings.Repeat("9", 1000)), "string": fmt.Sprint(now), "date": noon.Format(time.RFC3339),
		} {
			t.Run(claim+"/"+shape, func(t *testing.T) {
				w.verdict(t, w.Token(t, tokentest.With(w.Claims(), claim, value)), `its "`+claim+`" is a`)
			})
		}
	}
	for _, test := range []struct {
		name          string
		iat, nbf, exp int64
		want          string
	}{
		{"iat one second inside the leeway", now + 29, now, now + 600, ""},
		{"nbf long ago", now, 1, now + 600, ""},
		{"iat in the year 9999", 253402300798, now, 253402300799, "issued "},
		{"nbf in the year 9999", now, 253402300799, now + 600, "not valid for another"},
		{"exp now", now - 600, now - 600, now, ""},
		{"exp a second ago", now - 600, now - 600, now - 1, ""},
		{"exp in a second", now - 600, now - 600, now + 1, ""},
		{"nbf after exp", now, now + 20, now + 10, ""}, // inside the leeway of both
	} {
		claims := tokentest.With(tokentest.With(tokentest.With(w.Claims(), "iat", test.iat), "nbf", test.nbf), "exp", test.exp)
		t.Run(test.name, func(t *testing.T) { w.verdict(t, w.Token(t, claims), test.want) })
	}
}

func TestV19_T2_NamesInAToken(t *testing.T) {
	w := newWorld(t, nil)
	for _, sub := range []string{
		"system:serviceaccount:shop:cart:x:y", "system::serviceaccount:shop:cart", "system:serviceaccount::shop:cart", ":system:serviceaccount:shop:cart",
		"system:serviceaccount:shop:cart\n", " system:serviceaccount:shop:cart", "system:serviceaccount:shop:.", "system:serviceaccount:.:cart",
		"system:serviceaccount:" + strings.Repeat("a.", 2000) + ":cart", "system:serviceaccount:shop:" + strings.Repeat("a.", 126) + "aa",
	} {
		w.verdict(t, w.Token(t, tokentest.With(w.Claims(), "sub", sub)), "is not system:serviceaccount:<namespace>:<name>")
	}
	long := strings.Repeat("n", 253)
	for _, test := range []struct {
		path  string
		value any
		want  string
	}{
		{"kube.pod.name", long, ""},
		{"kube.pod.name", long + "n", "its pod"},
		{"kube.pod.name", "cart.v2.x", ""},
		{"kube.pod.name", "cart..x", "its pod"},
		{"kube.pod.name", ".", "its pod"},
		{"kube.pod.name", "", "its pod"},
		{"kube.pod.name", "..", "its pod"},
		{"kube.pod.uid", "", "its pod"},
		{"kube.node.name", long, ""},
		{"kube.node.name", "node-1.example.org.", "its node"},
		{"kube.node.name", "", "its node"},
		{"kube.node.name", "Node-1", "its node"},
		{"kube.node.uid", strings.Repeat("a", 65), "its node"},
		{"kube.node", nil, "it names no node"},
		{"kube.serviceaccount.uid", "", "no service account UID"},
	} {
		w.verdict(t, w.Token(t, tokentest.With(w.Claims(), test.path, test.value)), test.want)
	}
}

// Algorithms that other verifiers know, with keys that make them meaningful.
func TestT13_V58_ForeignAlgorithms(t *testing.T) {
	rsaKey, p256 := tokentest.RSAKey(t), tokentest.NewKey(t, elliptic.P256())
	source := keys{
		{ID: "rsa", Algorithms: []string{"RS256", "PS256"}, Public: rsaKey.Public()},
		{ID: "p256", Algorithms: []string{"ES256"}, Public: p256.Public()},
	}
	w := newWorld(t, func(i *token.Issuer) { i.Keys = source })
	jwk, err := json.Marshal(jose.JSONWebKey{Key: rsaKey.Public(), KeyID: "rsa"})
	if err != nil {
		t.Fatal(err)
	}
	point, err := p256.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		alg, kid string
		key      any
	}{
		{"HS256", "rsa", jwk}, {"HS256", "rsa", rsaKey.N.Bytes()}, {"HS256", "p256", point}, {"HS384", "p256", point}, {"HS512", "p256", point},
		{"HS256", "p256", []byte{}},
	} {
		header := tokentest.JSON(t, map[string]string{"alg": test.alg, "kid": test.kid})
		w.verdict(t, tokentest.Sign(t, test.alg, test.key, header, tokentest.JSON(t, w.Claims())), "its algorithm is "+`"`+test.alg)
	}
	for _, says := range []string{
		"EdDSA", "Ed25519", "ES256K", "ES224", "ES521", "RS384", "PS512", "RSA1_5", "RSA-OAEP-256", "dir", "A128KW", "NONE", "nOnE", "none ", "", "ES256 ", "ES256\x00",
		"ES256,none",
	} {
		header := tokentest.JSON(t, map[string]string{"alg": says, "kid": "p256"})
		w.verdict(t, tokentest.Sign(t, "ES256", p256, header, tokentest.JSON(t, w.Claims())), "its algorithm is")
	}
}

// A PS256 signature has a salt as long as its hash (RFC 7518 §3.5), and an ECDSA
// one two numbers of the curve's size (§3.4). Other forms that a lenient library
// takes would give a token many spellings.
func TestV58_OneFormOfSignature(t *testing.T) {
	rsaKey, p256 := tokentest.RSAKey(t), tokentest.NewKey(t, elliptic.P256())
	source := keys{
		{ID: "rsa", Algorithms: []string{"PS256"}, Public: rsaKey.Public()},
		{ID: "p256", Algorithms: []string{"ES256"}, Public: p256.Public()},
	}
	w := newWorld(t, func(i *token.Issuer) { i.Keys = source })
	signed := func(kid, alg string) (string, []byte) {
		header := tokentest.JSON(t, map[string]string{"alg": alg, "kid": kid})
		s := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(tokentest.JSON(t, w.Claims()))
		digest := sha256.Sum256([]byte(s))
		return s + ".", digest[:]
	}
	const longest = rsa.PSSSaltLengthAuto
	for salt, want := range map[int]string{32: "", 1: "does not match", 31: "does not match", 33: "does not match", longest: "does not match"} {
		s, digest := signed("rsa", "PS256")
		signature, err := rsa.SignPSS(rand.Reader, rsaKey, crypto.SHA256, digest, &rsa.PSSOptions{SaltLength: salt})
		if err != nil {
			t.Fatal(err)
		}
		w.verdict(t, s+base64.RawURLEncoding.EncodeToString(signature), want)
	}

	s, digest := signed("p256", "ES256")
	r, sigma, err := ecdsa.Sign(rand.Reader, p256, digest)
	if err != nil {
		t.Fatal(err)
	}
	asn1, err := ecdsa.SignASN1(rand.Reader, p256, digest)
	if err != nil {
		t.Fatal(err)
	}
	n := elliptic.P256().Params().N
	fixed := func(size int, numbers ...*big.Int) (b []byte) {
		for _, i := range numbers {
			b = append(b, i.FillBytes(make([]byte, size))...)
		}
		return b
	}
	for name, test := range map[string]struct {
		signature []byte
		want      string
	}{
		"fixed size":         {fixed(32, r, sigma), ""},
		"33 bytes each":      {fixed(33, r, sigma), "does not match"},
		"DER":                {asn1, "does not match"},
		"a byte more":        {append(fixed(32, r, sigma), 0), "does not match"},
		"a byte less":        {fixed(32, r, sigma)[:63], "does not match"},
		"a byte before":      {append([]byte{0}, fixed(32, r, sigma)...), "does not match"},
		"twice":              {append(fixed(32, r, sigma), fixed(32, r, sigma)...), "does not match"},
		"numbers exchanged":  {fixed(32, sigma, r), "does not match"},
		"zeros":              {make([]byte, 64), "does not match"},
		"r is the order":     {fixed(32, n, sigma), "does not match"},
		"s is the order":     {fixed(32, r, n), "does not match"},
		"s is one":           {fixed(32, r, big.NewInt(1)), "does not match"},
		"a single byte":      {[]byte{1}, "does not match"},
		"as long as allowed": {make([]byte, 2000), "does not match"},
	} {
		t.Run(name, func(t *testing.T) { w.verdict(t, s+base64.RawURLEncoding.EncodeToString(test.signature), test.want) })
	}
}

// Forms of JOSE that are no signed token in the compact form.
func TestV55_V58_OtherForms(t *testing.T) {
	rsaKey := tokentest.RSAKey(t)
	w := newWorld(t, func(i *token.Issuer) {
		i.Keys = keys{{ID: "rsa", Algorithms: []string{"RS256"}, Public: rsaKey.Public()}}
	})
	claims := tokentest.JSON(t, w.Claims())
	good := tokentest.Sign(t, "RS256", rsaKey, []byte(`{"alg":"RS256","kid":"rsa"}`), claims)
	w.verdict(t, good, "")
	part := strings.Split(good, ".")

	encrypter, err := jose.NewEncrypter(jose.A128GCM, jose.Recipient{Algorithm: jose.RSA_OAEP_256, Key: rsaKey.Public(), KeyID: "rsa"},
		(&jose.EncrypterOptions{Compression: jose.DEFLATE}).WithContentType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	encrypted, err := encrypter.Encrypt([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	jwe, err := encrypted.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	form := strings.Split(jwe, ".")
	sign := func(header string) string { return tokentest.Sign(t, "RS256", rsaKey, []byte(header), claims) }
	unencoded := func() string { // RFC 7797: the payload is signed as it is
		header := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","kid":"rsa","b64":false,"crit":["b64"]}`))
		digest := sha256.Sum256([]byte(header + "." + part[1]))
		signature, err := rsa.SignPKCS1v15(nil, rsaKey, crypto.SHA256, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return header + "." + part[1] + "." + base64.RawURLEncoding.EncodeToString(signature)
	}
	std := func(s string) string {
		b, err := base64.RawURLEncoding.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return base64.StdEncoding.EncodeToString(b)
	}
	slash := tokentest.Sign(t, "RS256", rsaKey, []byte(`{"alg":"RS256","kid":"rsa","typ":"`+"\u007f\u007f?>"+`"}`), claims)
	const notIn = "which does not occur in a compact JWS"
	for _, test := range []struct{ name, raw, want string }{
		{"JWE", jwe, "it has 4 dots"},
		{"first three parts of a JWE", strings.Join(form[:3], "."), "its header holds"},
		{"detached payload", part[0] + ".." + part[2], "not the JSON of a token"},
		{"unencoded payload", unencoded(), "only alg, kid and typ are accepted"},
		{"b64 true", sign(`{"alg":"RS256","kid":"rsa","b64":true}`), "only alg, kid and typ are accepted"},
		{"crit empty", sign(`{"alg":"RS256","kid":"rsa","crit":[]}`), "only alg, kid and typ are accepted"},
		{"crit null", sign(`{"alg":"RS256","kid":"rsa","crit":null}`), "only alg, kid and typ are accepted"},
		{"zip null", sign(`{"alg":"RS256","kid":"rsa","zip":null}`), "only alg, kid and typ are accepted"},
		{"x5t#S256", sign(`{"alg":"RS256","kid":"rsa","x5t#S256":"AAAA"}`), "only alg, kid and typ are accepted"},
		{"typ null", sign(`{"alg":"RS256","kid":"rsa","typ":null}`), `its header's "typ" is null`},
		{"typ in lower case", sign(`{"alg":"RS256","kid":"rsa","typ":"jwt"}`), ""},
		{"kid an object", sign(`{"alg":"RS256","kid":{"rsa":1}}`), `its header's "kid" is an object`},
		{"kid as SQL", sign(`{"alg":"RS256","kid":"rsa' OR '1'='1"}`), "does not publish"},
		{"kid a URL", sign(`{"alg":"RS256","kid":"https://evil.example/rsa"}`), "does not publish"},
		{"kid an absolute path", sign(`{"alg":"RS256","kid":"/proc/self/environ"}`), "does not publish"},
		{"kid in upper case", sign(`{"alg":"RS256","kid":"RSA"}`), "does not publish"},
		{"kid of two IDs", sign(`{"alg":"RS256","kid":"rsa,rsa"}`), "does not publish"},
		{"general JSON", `{"payload":"` + part[1] + `","signatures":[{"protected":"` + part[0] + `","signature":"` + part[2] + `"}]}`, notIn},
		{"JSON in base64", base64.RawURLEncoding.EncodeToString([]byte(`{"payload":"` + part[1] + `"}`)), "it has 0 dots"},
		{"padding in the header", part[0] + "=." + part[1] + "." + part[2], notIn},
		{"padding in the claims", part[0] + "." + part[1] + "=." + part[2], notIn},
		{"escaped padding", part[0] + "." + part[1] + "%3D." + part[2], notIn},
		{"CR LF inside", part[0] + ".\r\n" + part[1] + "." + part[2], `'\r', ` + notIn},
		{"tab at the end", good + "\t", notIn},
		{"standard alphabet in the header", std(strings.Split(slash, ".")[0]) + "." + part[1] + "." + part[2], notIn},
		{"standard alphabet in the signature", part[0] + "." + part[1] + "." + std(part[2]), notIn},
		{"full-width letter", strings.Replace(good, part[2][:1], "Ａ", 1), notIn},
		{"header of 1 mod 4 letters", part[0] + strings.Repeat("A", (5-len(part[0])%4)%4) + "." + part[1] + "." + part[2], "its header is not"},
		{"ten thousand levels", tokentest.Sign(t, "RS256", rsaKey, []byte(`{"alg":"RS256","kid":"rsa"}`), []byte(strings.Repeat("[", 10000))), "at most 8192 are read"},
		{"as many levels as fit", tokentest.Sign(t, "RS256", rsaKey, []byte(`{"alg":"RS256","kid":"rsa"}`), []byte(strings.Repeat("[", 5700))), "not the JSON of a token"},
		{"as many objects as fit", tokentest.Sign(t, "RS256", rsaKey, []byte(`{"alg":"RS256","kid":"rsa"}`), []byte(strings.Repeat(`{"iss":`, 800))), "not the JSON of a token"},
		{"levels in the audience", w.signedBy(t, rsaKey, "aud", jsonNumber(strings.Repeat("[", 2500)+strings.Repeat("]", 2500))), `its "aud" is an array that holds an array`},
		{"levels in the issuer", w.signedBy(t, rsaKey, "iss", jsonNumber(strings.Repeat("[", 2500)+strings.Repeat("]", 2500))), `its "iss" is an array`},
		{"levels in the header", sign(`{"alg":"RS256","kid":` + strings.Repeat("[", 400) + strings.Repeat("]", 400) + `}`), `its header's "kid" is an array`},
	} {
		t.Run(test.name, func(t *testing.T) { w.verdict(t, test.raw, test.want) })
	}
	// Bits that decode to nothing, in each of the parts that have some.
	for i := range part {
		other := slices.Clone(part)
		if len(other[i])%4 == 0 {
			continue
		}
		other[i] = otherSpelling(other[i])
		w.verdict(t, strings.Join(other, "."), "not base64url")
	}
}

// signedBy changes a claim and signs with an RSA key.
func (w *world) signedBy(t *testing.T, key *rsa.PrivateKey, path string, value any) string {
	t.Helper()
	return tokentest.Sign(t, "RS256", key, []byte(`{"alg":"RS256","kid":"rsa"}`), tokentest.JSON(t, tokentest.With(w.Claims(), path, value)))
}

// counting is a source that notes what it is asked for.
type counting struct {
	keys
	asked atomic.Int64
}

func (c *counting) Keys(ctx context.Context, kid string) ([]token.Key, error) {
	c.asked.Add(1)
	return c.keys.Keys(ctx, kid)
}

// Whatever can be told from a token's bytes is told before a key is looked up,
// and no signature is checked without a key. Nor does anything that a token names
// as a place of keys lead to a question.
func TestV10_V15_CheapRefusalsAskForNoKey(t *testing.T) {
	source := &counting{}
	w := newWorld(t, func(i *token.Issuer) { i.Keys = source })
	source.keys = keys{{ID: w.KID, Algorithms: []string{"ES256"}, Public: w.Key.Public()}}
	good := w.Token(t, w.Claims())
	part := strings.Split(good, ".")
	claims := tokentest.JSON(t, w.Claims())
	sign := func(header string) string { return tokentest.Sign(t, "ES256", w.Key, []byte(header), claims) }
	named := func(member, value string) string {
		return sign(`{"alg":"ES256","kid":"` + w.KID + `","` + member + `":` + value + `}`)
	}
	claimed := func(path string, value any) string { return w.Token(t, tokentest.With(w.Claims(), path, value)) }
	for name, raw := range map[string]string{
		"nothing": "", "8 KiB and a byte": good + strings.Repeat("A", 8<<10+1-len(good)), "1 MiB": strings.Repeat("A.", 1<<19),
		"one dot": part[0] + "." + part[1], "three dots": good + ".", "a line break": good + "\n", "padding": good + "=",
		"header over 1 KiB": sign(`{"alg":"ES256","kid":"` + w.KID + strings.Repeat("k", 1000) + `"}`),
		"header no JSON":    sign(`{`), "no algorithm": sign(`{"kid":"` + w.KID + `"}`), "none": sign(`{"alg":"none","kid":"` + w.KID + `"}`),
		"HS256": sign(`{"alg":"HS256","kid":"` + w.KID + `"}`), "no key ID": sign(`{"alg":"ES256"}`),
		"long key ID": sign(`{"alg":"ES256","kid":"` + strings.Repeat("k", 257) + `"}`),
		"jku":         named("jku", `"https://evil.example/jwks"`), "x5u": named("x5u", `"https://evil.example/x"`), "jwk": named("jwk", string(w.JWKS())),
		"crit": named("crit", `["exp"]`), "zip": named("zip", `"DEF"`),
		"no signature": part[0] + "." + part[1] + ".", "claims no JSON": part[0] + ".AAAA." + part[2],
		"issuer missing": claimed("iss", tokentest.Absent), "issuer unknown": claimed("iss", "https://evil.example"),
		"issuer longer": claimed("iss", issuerURL+"/"), "issuer an array": claimed("iss", []string{issuerURL}),
	} {
		t.Run(name, func(t *testing.T) {
			c, err := w.v.Verify(t.Context(), raw)
			var invalid *token.InvalidError
			if c != nil || !errors.As(err, &invalid) {
				t.Errorf("claims %v, error %v", c, err)
			}
			if n := source.asked.Swap(0); n != 0 {
				t.Errorf("%d questions for a key", n)
			}
		})
	}
	// A question is asked once for a good one, so the count above says something.
	w.verdict(t, good, "")
	if n := source.asked.Load(); n != 1 {
		t.Errorf("%d questions for a good token's key; expected 1", n)
	}
}

// A token that was good ends while nobody looks: each verification goes by the
// clock of that moment, and none is remembered.
func TestV46_ATokenEndsAtUse(t *testing.T) {
	now := noon
	iss := tokentest.NewIssuer(t, issuerURL, nil, atNoon)
	v, err := token.New(token.Config{
		Issuers: []token.Issuer{{URL: issuerURL, Keys: iss, RequirePod: true, Audiences: map[string]time.Duration{"meshca": time.Hour}}},
		Now:     func() time.Time { return now },
	})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{iss, v}
	raw := iss.Token(t, iss.Claims())
	for _, test := range []struct {
		at   time.Duration
		want string
	}{
		{0, ""}, {time.Hour + 29*time.Second, ""}, {time.Hour + 30*time.Second, "expired 30s ago"}, {240 * time.Hour, "expired 239h"}, {time.Hour, ""},
	} {
		now = noon.Add(test.at)
		w.verdict(t, raw, test.want)
	}
}
