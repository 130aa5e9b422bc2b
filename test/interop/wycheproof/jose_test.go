package wycheproof

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/meshca/meshca/identity/jwks"
	"github.com/meshca/meshca/identity/token"
)

// joseFile is one of Wycheproof's files of JOSE objects. A key or a set of them is
// what its issuer would publish; symmetric ones have no public half.
type joseFile struct {
	TestGroups []struct {
		Public, Private json.RawMessage
		Tests           []struct {
			TcID            int
			Comment, Result string
			JWS, JWE        json.RawMessage // a string, or an object in the JSON form
		}
	}
}

// set is what the issuer publishes, the mistake of publishing a secret included.
func set(t *testing.T, public, private json.RawMessage) []byte {
	t.Helper()
	key := public
	if len(key) == 0 || string(key) == "null" {
		key = private
	}
	var members map[string]json.RawMessage
	must(t, json.Unmarshal(key, &members))
	if members["keys"] != nil {
		return key
	}
	return fmt.Appendf(nil, `{"keys":[%s]}`, key)
}

// text is an object as it would be sent for a token.
func text(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return s
	}
	return string(raw)
}

// takes reports whether a token of this form would be believed if its payload were
// claims, which Wycheproof's never is: its form and header pass, its issuer
// publishes the key, and the signature is good.
func takes(t *testing.T, v *token.Verifier, keys *jwks.Cache, raw string) bool {
	t.Helper()
	claims, err := v.Verify(t.Context(), raw)
	var invalid *token.InvalidError
	if claims != nil || !errors.As(err, &invalid) {
		t.Fatalf("%q: claims %v, error %v", raw, claims, err)
	}
	if !strings.Contains(invalid.Reason, "its claims are not the JSON of a token") {
		return false
	}
	part := strings.Split(raw, ".")
	if len(part) != 3 {
		t.Fatalf("%q passed for three parts", raw)
	}
	decode := func(s string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(s)
		must(t, err)
		return b
	}
	var header struct{ Alg, Kid string }
	must(t, json.Unmarshal(decode(part[0]), &header))
	found, err := keys.Keys(t.Context(), header.Kid)
	if err != nil {
		return false // a set without a single key that can be used
	}
	for _, k := range found {
		if k.Verify(header.Alg, []byte(part[0]+"."+part[1]), decode(part[2])) {
			return true
		}
	}
	return false
}

// accepted are the algorithms that an API server signs with.
var accepted = map[string]bool{"RS256": true, "PS256": true, "ES256": true, "ES384": true, "ES512": true}

// Signed objects are taken as Wycheproof has it, but for those of algorithms that
// are not accepted here: these are all refused.
func TestV58_T13_JWS(t *testing.T) {
	const roca = "the primes of a flawed smartcard are known by a fingerprint; an API server's key is made by software, and the operator names the set that is believed"
	const es521 = `RFC 7518 knows no algorithm "ES521", and a key that is for one that is not known is left out`
	c := newTally(map[string]string{
		"json_web_crypto_test.json/46":     roca,
		"json_web_key_test.json/7":         roca,
		"json_web_signature_test.json/347": es521,
		"json_web_signature_test.json/351": es521,
	})
	for _, file := range []string{"json_web_signature_test.json", "json_web_key_test.json", "json_web_crypto_test.json"} {
		var f joseFile
		read(t, file, &f)
		for _, g := range f.TestGroups {
			keys := published(t, set(t, g.Public, g.Private))
			v := newVerifier(t, keys)
			for _, test := range g.Tests {
				if test.JWS == nil {
					continue
				}
				raw := text(test.JWS)
				want := test.Result == "valid" && accepted[algorithm(raw)]
				c.judge(t, fmt.Sprintf("%s/%d", file, test.TcID), test.Comment, takes(t, v, keys, raw), want)
			}
		}
	}
	c.atLeast(t, 401+26+49, 21)
}

// algorithm is what the header of a signed object names.
func algorithm(raw string) string {
	first, _, _ := strings.Cut(raw, ".")
	var header struct{ Alg string }
	b, err := base64.RawURLEncoding.DecodeString(first)
	if err != nil || json.Unmarshal(b, &header) != nil {
		return ""
	}
	return header.Alg
}

// No encrypted object is a token, however valid it is.
func TestV58_T13_JWE(t *testing.T) {
	c := newTally(nil)
	for _, file := range []string{"json_web_encryption_test.json", "json_web_crypto_test.json"} {
		var f joseFile
		read(t, file, &f)
		for _, g := range f.TestGroups {
			keys := published(t, set(t, g.Public, g.Private))
			v := newVerifier(t, keys)
			for _, test := range g.Tests {
				if test.JWE == nil {
					continue
				}
				c.judge(t, fmt.Sprintf("%s/%d", file, test.TcID), test.Comment, takes(t, v, keys, text(test.JWE)), false)
			}
		}
	}
	c.atLeast(t, 139+34, 0)
}
