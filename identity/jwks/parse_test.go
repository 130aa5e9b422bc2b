package jwks

import (
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"maps"
	"math/big"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokentest"
)

// jwk returns a key as the members of a JWK.
func jwk(t testing.TB, key any, kid string, change map[string]any) map[string]any {
	t.Helper()
	b, err := json.Marshal(jose.JSONWebKey{Key: key, KeyID: kid})
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]any)
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	maps.Copy(m, change)
	return m
}

// document makes a JWK Set.
func document(t testing.TB, keys ...any) []byte {
	t.Helper()
	if keys == nil {
		keys = []any{}
	}
	return tokentest.JSON(t, map[string]any{"keys": keys})
}

func TestT13_KeysThatAreLeftOut(t *testing.T) {
	p256 := tokentest.NewKey(t, elliptic.P256())
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	edwards, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	type m = map[string]any
	good := jwk(t, p256.Public(), "good", nil)
	for _, test := range []struct {
		name string
		key  any
		want string // "" if the key is used
	}{
		{"P-256", jwk(t, p256.Public(), "k", nil), ""},
		{"for signatures", jwk(t, p256.Public(), "k", m{"use": "sig", "alg": "ES256", "key_ops": []string{"verify"}}), ""},
		{"RSA 2048", jwk(t, tokentest.RSAKey(t).Public(), "k", nil), ""},
		{"RSA 1024", jwk(t, small.Public(), "k", nil), "RSA of 2048 to 8192 bits"},
		{"RSA 16384", jwk(t, &rsa.PublicKey{N: oddNumber(16384), E: 65537}, "k", nil), "modulus too large"},
		{"RSA with e=1", jwk(t, &rsa.PublicKey{N: tokentest.RSAKey(t).N, E: 1}, "k", nil), "bad e value"},
		{"RSA with an even e", jwk(t, &rsa.PublicKey{N: tokentest.RSAKey(t).N, E: 65536}, "k", nil), "a key of its kind"},
		{"Ed25519", jwk(t, edwards, "k", nil), `its type is "OKP"`},
		{"symmetric", jwk(t, []byte("secret"), "k", nil), `its type is "oct"`},
		{"private", jwk(t, p256, "k", nil), "its private half was published"},
		{"for encryption", jwk(t, p256.Public(), "k", m{"use": "enc"}), `its use is "enc"`},
		{"for signing only", jwk(t, p256.Public(), "k", m{"key_ops": []string{"sign", "wrapKey"}}), "without \"verify\""},
		{"for nothing", jwk(t, p256.Public(), "k", m{"key_ops": []string{}}), "without \"verify\""},
		{"another algorithm", jwk(t, p256.Public(), "k", m{"alg": "RS256"}), `its algorithm is "RS256"`},
		{"algorithm none", jwk(t, p256.Public(), "k", m{"alg": "none"}), `its algorithm is "none"`},
		{"HS256 over RSA", jwk(t, tokentest.RSAKey(t).Public(), "k", m{"alg": "HS256"}), `its algorithm is "HS256"`},
		{"RS512", jwk(t, tokentest.RSAKey(t).Public(), "k", m{"alg": "RS512"}), `its algorithm is "RS512"`},
		{"no ID", jwk(t, p256.Public(), "", nil), "it has no ID"},
		{"long ID", jwk(t, p256.Public(), strings.Repeat("k", 257), nil), "its ID has 257 bytes"},
		{"point off the curve", jwk(t, p256.Public(), "k", m{"y": jwk(t, p256.Public(), "", nil)["x"]}), "it is not a JWK"},
		{"P-384's name with P-256's point", jwk(t, p256.Public(), "k", m{"crv": "P-384"}), "it is not a JWK"},
		{"no point", m{"kid": "k", "kty": "EC", "crv": "P-256"}, "it is not a JWK"},
		{"half a point", jwk(t, p256.Public(), "k", m{"y": ""}), "it is not a JWK"},
		{"point of zeros", m{"kid": "k", "kty": "EC", "crv": "P-256", "x": strings.Repeat("A", 43), "y": strings.Repeat("A", 43)}, "it is not a JWK"},
		{"coordinate too long", jwk(t, p256.Public(), "k", m{"x": strings.Repeat("A", 44)}), "it is not a JWK"},
		{"secp256k1", jwk(t, p256.Public(), "k", m{"crv": "secp256k1"}), "it is not a JWK"},
		{"RSA without a modulus", m{"kid": "k", "kty": "RSA", "e": "AQAB"}, "it is not a JWK"},
		{"RSA without an exponent", jwk(t, tokentest.RSAKey(t).Public(), "k", m{"e": ""}), "it is not a JWK"},
		{"RSA with e=0", jwk(t, tokentest.RSAKey(t).Public(), "k", m{"e": "AA"}), "bad e value"},
		{"RSA with e of 2048 bits", jwk(t, tokentest.RSAKey(t).Public(), "k", m{"e": strings.Repeat("/", 342)}), "it is not a JWK"},
		{"RSA 2047", jwk(t, &rsa.PublicKey{N: oddNumber(2047), E: 65537}, "k", nil), "RSA of 2048 to 8192 bits"},
		{"RSA 8200", jwk(t, &rsa.PublicKey{N: oddNumber(8200), E: 65537}, "k", nil), "modulus too large"},
		{"padded", jwk(t, p256.Public(), "k", m{"x": jwk(t, p256.Public(), "", nil)["x"].(string) + "="}), "it is not a JWK"},
		{"other private members", jwk(t, tokentest.RSAKey(t).Public(), "k", m{"q": "AA"}), "its private half was published"},
		{"key ID a path", jwk(t, p256.Public(), "../k", m{"use": "enc"}), `its use is "enc"`},
		{"use of two", jwk(t, p256.Public(), "k", m{"use": "sig enc"}), `its use is "sig enc"`},
		{"use an array", jwk(t, p256.Public(), "k", m{"use": []string{"sig"}}), "it is not a JWK"},
		{"type in lower case", jwk(t, p256.Public(), "k", m{"kty": "ec"}), `its type is "ec"`},
		{"wrong kind of member", m{"kid": 1, "kty": "EC"}, "it is not a JWK"},
		{"no key at all", 7, "it is not a JWK"},
		{"null", nil, `its type is ""`},
		{"empty", m{}, `its type is ""`},
	} {
		t.Run(test.name, func(t *testing.T) {
			keys, left, err := parse(document(t, good, test.key))
			if err != nil || keys["good"] == nil {
				t.Fatalf("the good key was lost: %v", err)
			}
			if test.want == "" {
				if len(keys["k"]) != 1 || len(left) != 0 {
					t.Errorf("keys %v, left out %v", keys, left)
				}
				return
			}
			if len(keys) != 1 || len(left) != 1 || !strings.Contains(left[0].reason, test.want) {
				t.Errorf("keys %v, left out %q; expected the reason %q", keys, left, test.want)
			}
			if _, _, err := parse(document(t, test.key)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("a set of only this key: %v; expected an error that says %q", err, test.want)
			}
		})
	}
}

func TestT13_SeveralKeysWithOneID(t *testing.T) {
	a, b := tokentest.NewKey(t, elliptic.P256()).Public(), tokentest.NewKey(t, elliptic.P256()).Public()
	keys, left, err := parse(document(t, jwk(t, a, "k", nil), jwk(t, b, "k", nil), jwk(t, a, "k", nil)))
	if err != nil || len(left) != 0 || len(keys["k"]) != 2 || !equal(keys["k"][0].Public, a) || !equal(keys["k"][1].Public, b) {
		t.Errorf("keys %v, left out %v, error %v; expected both keys once", keys, left, err)
	}
}

func TestParseNamesAlgorithms(t *testing.T) {
	key := tokentest.RSAKey(t).Public()
	keys, _, err := parse(document(t, jwk(t, key, "any", nil), jwk(t, key, "one", map[string]any{"alg": "PS256"})))
	if err != nil {
		t.Fatal(err)
	}
	if got := keys["any"][0].Algorithms; !slices.Equal(got, []string{"RS256", "PS256"}) {
		t.Errorf("without \"alg\": %q", got)
	}
	if got := keys["one"][0].Algorithms; !slices.Equal(got, []string{"PS256"}) {
		t.Errorf("with \"alg\": %q", got)
	}
}

func TestParseRefusesWholeDocuments(t *testing.T) {
	key := jwk(t, tokentest.NewKey(t, elliptic.P256()).Public(), "k", nil)
	many := make([]any, 101)
	for i := range many {
		many[i] = key
	}
	for name, test := range map[string]struct {
		document []byte
		want     string
	}{
		"empty":            {nil, "not JSON"},
		"HTML":             {[]byte("<html>"), "not JSON"},
		"cut off":          {document(t, key)[:60], "not JSON"},
		"array":            {[]byte("[]"), "not JSON"},
		"no keys":          {[]byte("{}"), "none of the 0 keys"},
		"keys null":        {[]byte(`{"keys":null}`), "none of the 0 keys"},
		"keys an object":   {[]byte(`{"keys":{}}`), "not JSON"},
		"keys twice":       {[]byte(`{"keys":[],"keys":[]}`), "not JSON"},
		"101 keys":         {document(t, many...), "has 101 keys; at most 100"},
		"over 1 MiB":       {[]byte(strings.Repeat(" ", 1<<20+1)), "more than 1048576 bytes"},
		"trailing text":    {append(document(t, key), '{'), "not JSON"},
		"deep nesting":     {[]byte(strings.Repeat(`{"keys":[`, 10000)), "not JSON"},
		"other's spelling": {[]byte(strings.Replace(string(document(t, key)), "keys", "KEYS", 1)), "none of the 0 keys"},
	} {
		if keys, _, err := parse(test.document); keys != nil || err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: keys %v, error %v; expected %q", name, keys, err, test.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	key := jwk(f, tokentest.NewKey(f, elliptic.P256()).Public(), "k", nil)
	f.Add(document(f, key))
	f.Add(document(f, key, jwk(f, tokentest.RSAKey(f).Public(), "r", map[string]any{"use": "sig", "alg": "RS256"})))
	f.Add(document(f, jwk(f, []byte("secret"), "s", nil), jwk(f, tokentest.NewKey(f, elliptic.P384()), "p", nil)))
	for _, s := range []string{``, `{}`, `{"keys":[{}]}`, `{"keys":[null]}`, `{"keys":[{"kty":"RSA","n":"AA","e":"AA","kid":"k"}]}`,
		`{"keys":[{"kty":"EC","crv":"P-256","x":"","y":"","kid":"k"}]}`, `{"keys":[{"kty":"EC","kid":"k","x5c":[""]}]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, _, err := parse(b)
		if (err == nil) != (len(keys) > 0) {
			t.Fatalf("%d keys with error %v", len(keys), err)
		}
		for kid, list := range keys {
			for _, k := range list {
				if kid == "" || k.ID != kid || len(k.Algorithms) == 0 {
					t.Fatalf("key %+v under %q", k, kid)
				}
				for _, alg := range k.Algorithms {
					if !slices.Contains(token.AlgorithmsFor(k.Public), alg) {
						t.Fatalf("algorithm %q for a %T", alg, k.Public)
					}
				}
			}
		}
	})
}

func oddNumber(bits int) *big.Int {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return n.SetBit(n, 0, 1)
}
