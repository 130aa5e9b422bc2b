package canary

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"testing"
)

// secret is something that may be written nowhere, in the forms in which it
// could be.
type secret struct {
	what  string
	forms []form
}

type form struct {
	name string
	text []byte
}

// tokenSecret looks for the payload and for the signature; their beginnings
// are enough, since a log may cut what it quotes. What is no JWT is looked for
// as it is.
func tokenSecret(what, token string) secret {
	s := secret{what: what}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		s.forms = append(s.forms, form{"beginning", []byte(token[:min(len(token), 20)])})
		return s
	}
	for i, name := range []string{"payload", "signature"} {
		if part := parts[i+1]; len(part) >= 20 {
			s.forms = append(s.forms, form{name, []byte(part[:20])}, form{"end of the " + name, []byte(part[len(part)-20:])})
		}
	}
	return s
}

// keySecret takes an ECDSA key as PKCS#8 DER. The scalar is what is secret: it
// is in every encoding of the key.
func keySecret(t testing.TB, what string, pkcs8 []byte) secret {
	t.Helper()
	parsed, err := x509.ParsePKCS8PrivateKey(pkcs8)
	must(t, err)
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("%s is a %T; only ECDSA keys are looked for", what, parsed)
	}
	scalar, err := key.Bytes()
	must(t, err)
	s := secret{what: what, forms: []form{
		{"raw", scalar},
		{"hex", []byte(hex.EncodeToString(scalar))},
		{"Go bytes", []byte(strings.Trim(fmt.Sprint(scalar), "[]"))},
		{"Go hex bytes", []byte(strings.Trim(fmt.Sprintf("%#v", scalar), "[]byte{}"))},
		{"decimal", []byte(new(big.Int).SetBytes(scalar).String())},
	}}
	// Base64 of the scalar looks different by where it begins within the key.
	for shift := range 3 {
		for name, e := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
			text := e.EncodeToString(append(make([]byte, shift), scalar...))
			s.forms = append(s.forms, form{fmt.Sprintf("%s at %d", name, shift), []byte(text[4 : len(text)-4])})
		}
	}
	return s
}

// vault keeps the secrets of a run.
type vault struct {
	mu      sync.Mutex
	secrets []secret
	keys    int
}

// token remembers a token and returns it.
func (v *vault) token(what, token string) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.secrets = append(v.secrets, tokenSecret(what, token))
	return token
}

// key remembers a key once.
func (v *vault) key(t testing.TB, what string, pkcs8 []byte) {
	t.Helper()
	s := keySecret(t, what, pkcs8)
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, known := range v.secrets {
		if bytes.Equal(known.forms[0].text, s.forms[0].text) {
			return
		}
	}
	v.secrets = append(v.secrets, s)
	v.keys++
}

// findings are the secrets in a text.
func (v *vault) findings(text []byte) []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	// A PEM body is broken into lines, and a log quotes the breaks, once or twice.
	joined := []byte(strings.NewReplacer("\n", "", "\r", "", `\\n`, "", `\n`, "", `\r`, "").Replace(string(text)))
	lower := bytes.ToLower(joined)
	var found []string
	for _, s := range v.secrets {
		for _, f := range s.forms {
			in := joined
			switch f.name {
			case "raw":
				in = text
			case "hex":
				in = lower
			}
			if bytes.Contains(in, f.text) {
				found = append(found, s.what+" ("+f.name+")")
				break
			}
		}
	}
	return found
}

// privateKeys finds private keys that the vault does not know, by how their
// encodings begin.
func privateKeys(text []byte) []string {
	var found []string
	for name, pattern := range map[string]string{
		"PEM":           "PRIVATE KEY-----",
		"EC scalar":     "\x02\x01\x01\x04\x20", // SEC 1: version 1, then 32 bytes
		"P-384 scalar":  "\x02\x01\x01\x04\x30",
		"PKCS#8 EC":     "\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x04", // then an octet string, not a bit string
		"PKCS#8 base64": "MIGHAgEAMBMGByqGSM49",
		"SEC 1 base64":  "MHcCAQEEI",
		"JWK":           `"d":"`,
	} {
		if bytes.Contains(text, []byte(pattern)) {
			found = append(found, name)
		}
	}
	return found
}

// What looks for canaries must find them.
func TestVaultFindsEveryForm(t *testing.T) {
	der := newKeyDER(t)
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	must(t, err)
	key := parsed.(*ecdsa.PrivateKey)
	scalar, err := key.Bytes()
	must(t, err)
	sec1, err := x509.MarshalECPrivateKey(key)
	must(t, err)
	const token = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQifQ.c2lnbmF0dXJlLXNpZ25hdHVyZS1zaWduYXR1cmU"
	v := &vault{}
	v.token("a token", token)
	v.key(t, "a key", der)
	for name, text := range map[string]string{
		"DER":           string(der),
		"SEC 1":         "x" + string(sec1),
		"PEM":           string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"PEM of SEC 1":  string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})),
		"quoted PEM":    fmt.Sprintf("%q", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"twice quoted":  fmt.Sprintf("%q", fmt.Sprintf("%q", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))),
		"hex":           fmt.Sprintf("%X", der),
		"bytes":         fmt.Sprintf("%v", der),
		"Go bytes":      fmt.Sprintf("%#v", scalar),
		"base64":        base64.StdEncoding.EncodeToString(scalar),
		"base64url":     base64.RawURLEncoding.EncodeToString(append([]byte("xy"), der...)),
		"a Go value":    fmt.Sprintf("%+v", key),
		"token":         "Bearer " + token,
		"cut token":     token[:70],
		"its signature": token[strings.LastIndex(token, "."):],
	} {
		if len(v.findings([]byte("before "+text+" after"))) == 0 {
			t.Errorf("%s: nothing found in %q", name, text)
		}
	}
	if found := v.findings([]byte(`{"msg":"certificate obtained","serial":"7f00"}`)); len(found) > 0 {
		t.Errorf("found %q where nothing is", found)
	}
	for _, text := range []string{string(der), string(sec1), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))} {
		if len(privateKeys([]byte(text))) == 0 {
			t.Errorf("no private key found in %q", text)
		}
	}
}
