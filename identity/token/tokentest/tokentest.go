package tokentest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha512" // for ES384 and up
	"encoding/base64"
	"encoding/json"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// Issuer is an issuer whose key signs on demand.
type Issuer struct {
	*tokenissuer.Issuer
	Key crypto.Signer
	KID string
	now func() time.Time
}

// NewIssuer makes an issuer with the given key; with a new P-256 key if nil.
func NewIssuer(t testing.TB, url string, key crypto.Signer, now func() time.Time) *Issuer {
	t.Helper()
	if key == nil {
		key = NewKey(t, elliptic.P256())
	}
	iss, err := tokenissuer.New(tokenissuer.Config{URL: url, Key: key, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	var set struct{ Keys []struct{ Kid string } }
	if err := json.Unmarshal(iss.JWKS(), &set); err != nil {
		t.Fatal(err)
	}
	return &Issuer{Issuer: iss, Key: key, KID: set.Keys[0].Kid, now: now}
}

// NewKey makes an ECDSA key.
func NewKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// rsaKey is made once for a test binary: making one takes long.
var rsaKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// RSAKey returns an RSA key of 2048 bits, always the same within a test binary.
func RSAKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsaKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Claims returns what an API server would write for ns/shop, sa/cart: for the
// audience "meshca", living for an hour from now on. The caller may change it.
func (i *Issuer) Claims() map[string]any {
	now := i.now().Unix()
	return map[string]any{
		"iss": i.URL(), "aud": []any{"meshca"}, "sub": "system:serviceaccount:shop:cart",
		"exp": now + 3600, "nbf": now, "iat": now, "jti": "6f1e5ff4-35a5-4c4c-9b0f-2b1f8f2f6d61",
		"kubernetes.io": map[string]any{
			"namespace":      "shop",
			"serviceaccount": map[string]any{"name": "cart", "uid": "11111111-2222-4333-8444-555555555555"},
			"pod":            map[string]any{"name": "cart-7d9f-x2x8l", "uid": "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"},
			"node":           map[string]any{"name": "node-1.example.org", "uid": "99999999-8888-4777-8666-555555555555"},
			"warnafter":      now + 3000,
		},
	}
}

// Header returns the header that goes with the issuer's key.
func (i *Issuer) Header(alg string) map[string]any { return map[string]any{"alg": alg, "kid": i.KID} }

// Token signs claims properly.
func (i *Issuer) Token(t testing.TB, claims map[string]any) string {
	t.Helper()
	alg := "RS256"
	if key, ok := i.Key.(*ecdsa.PrivateKey); ok {
		alg = map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[key.Params().BitSize]
	}
	return Sign(t, alg, i.Key, JSON(t, i.Header(alg)), JSON(t, claims))
}

// With returns a copy of claims in which the member at a dotted path has a new
// value, or is gone if the value is [Absent]. A path member that itself holds
// dots is "kubernetes.io", written "kube".
func With(claims map[string]any, path string, value any) map[string]any {
	claims = maps.Clone(claims)
	first, rest, more := strings.Cut(path, ".")
	if first == "kube" {
		first = "kubernetes.io"
	}
	switch {
	case more:
		inner, _ := claims[first].(map[string]any)
		claims[first] = With(inner, rest, value)
	case value == Absent:
		delete(claims, first)
	default:
		claims[first] = value
	}
	return claims
}

type absent struct{}

// Absent is the value of no member.
var Absent any = absent{}

// JSON marshals.
func JSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Sign makes a compact JWS of any header and payload, whatever they are. The
// algorithm is what the signature is made with; the header may say otherwise.
// The key is a crypto.Signer, or the bytes of a symmetric key for the HS
// algorithms; "none" makes an empty signature.
func Sign(t testing.TB, alg string, key any, header, payload []byte) string {
	t.Helper()
	signed := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload)
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature(t, alg, key, []byte(signed)))
}

func signature(t testing.TB, alg string, key any, signed []byte) []byte {
	t.Helper()
	if alg == "none" {
		return nil
	}
	hash := map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}[alg[2:]]
	h := hash.New()
	h.Write(signed)
	digest := h.Sum(nil)
	var sig []byte
	var err error
	switch key := key.(type) {
	case []byte:
		mac := hmac.New(hash.New, key)
		mac.Write(signed)
		return mac.Sum(nil)
	case *rsa.PrivateKey:
		if alg[:2] == "PS" {
			sig, err = rsa.SignPSS(rand.Reader, key, hash, digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
			break
		}
		sig, err = rsa.SignPKCS1v15(nil, key, hash, digest)
	case *ecdsa.PrivateKey:
		r, s, e := ecdsa.Sign(rand.Reader, key, digest)
		if e != nil {
			t.Fatal(e)
		}
		size := (key.Params().BitSize + 7) / 8
		sig = make([]byte, 2*size)
		r.FillBytes(sig[:size])
		s.FillBytes(sig[size:])
	default:
		t.Fatalf("signing with a key of type %T", key)
	}
	if err != nil {
		t.Fatal(err)
	}
	return sig
}
