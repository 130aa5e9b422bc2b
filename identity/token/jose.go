package token

import (
	"crypto"
	"encoding/base64"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4/json"
)

// Bounds on what is looked at before a signature has been checked.
const (
	maxToken  = 8 << 10 // bytes of the token
	maxHeader = 1 << 10 // bytes of the header, decoded
	maxKeyID  = 256
)

// rawToken is a token taken apart, with nothing in it verified.
type rawToken struct {
	signed    string // what the signature is over: header and claims as they were sent
	header    header
	payload   []byte // unverified: good for choosing the issuer only
	signature []byte
}

// header is what a token's header says.
type header struct {
	text string // as it was sent
	alg  string
	kid  string
}

// strict refuses what RFC 7515 §2 does not allow: padding, and bits that decode
// to nothing, by which one signature could be written in several ways.
var strict = base64.RawURLEncoding.Strict()

// split takes apart a compact JWS. The cheap bounds come first. A header that is last,
// byte for byte, says the same again: an issuer's tokens differ in their claims.
func split(compact string, last *header) (*rawToken, *InvalidError) {
	if compact == "" {
		return nil, invalidf("there is none")
	}
	if len(compact) > maxToken {
		return nil, invalidf("it has %d bytes; at most %d are read", len(compact), maxToken)
	}
	dots := 0
	for i := range len(compact) {
		c := compact[i]
		switch {
		case c == '.':
			dots++
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		default:
			// Go's decoder skips line breaks, so they are caught here.
			return nil, invalidf("byte %d is %q, which does not occur in a compact JWS", i, c)
		}
	}
	if dots != 2 {
		return nil, invalidf("it has %d dots; a signed token has 2", dots)
	}
	h, rest, _ := strings.Cut(compact, ".")
	p, s, _ := strings.Cut(rest, ".")
	t := &rawToken{signed: compact[:len(h)+1+len(p)]}
	if last != nil && last.text == h {
		t.header = *last
	} else if bad := t.header.read(h); bad != nil {
		return nil, bad
	}
	var err error
	if t.payload, err = strict.DecodeString(p); err != nil {
		return nil, invalidf("its claims are not base64url")
	}
	if t.signature, err = strict.DecodeString(s); err != nil || s == "" {
		return nil, invalidf("its signature is missing or not base64url")
	}
	return t, nil
}

// read takes "alg" and "kid" from a header that holds nothing else of consequence.
func (h *header) read(encoded string) *InvalidError {
	if n := strict.DecodedLen(len(encoded)); n > maxHeader {
		return invalidf("its header has %d bytes; at most %d are read", n, maxHeader)
	}
	decoded, err := strict.DecodeString(encoded)
	if err != nil {
		return invalidf("its header is not base64url")
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(decoded, &members); err != nil || members == nil {
		return invalidf("its header is not a JSON object with unique members")
	}
	var alg, kid, typ text
	known := map[string]*text{"alg": &alg, "kid": &kid, "typ": &typ}
	for name, value := range members {
		t := known[name]
		if t == nil {
			return invalidf("its header holds %s; only alg, kid and typ are accepted", quote(name))
		}
		if err := t.UnmarshalJSON(value); err != nil || t.wrong != "" {
			return invalidf("its header's %q is %s, not a string", name, t.wrong)
		}
	}
	if typ.s != "" && !strings.EqualFold(typ.s, "JWT") {
		return invalidf("its type is %s, not \"JWT\"", quote(typ.s))
	}
	if !slices.Contains(allAlgorithms, alg.s) {
		return invalidf("its algorithm is %s; accepted are %s", quote(alg.s), strings.Join(allAlgorithms, ", "))
	}
	if kid.s == "" || len(kid.s) > maxKeyID {
		return invalidf("its key ID has %d bytes; 1 to %d are expected", len(kid.s), maxKeyID)
	}
	// A copy, since what is remembered must not hold a whole token.
	*h = header{text: strings.Clone(encoded), alg: alg.s, kid: kid.s}
	return nil
}

// verify checks the signature with each key that allows the header's algorithm, and
// returns the one that it is by.
// Several keys under one ID are all tried: whoever published them vouched for each.
func (t *rawToken) verify(keys []Key) (crypto.PublicKey, *InvalidError) {
	usable := false
	for _, k := range keys {
		if k.ID != t.header.kid || !k.allows(t.header.alg) {
			continue
		}
		usable = true
		if k.Verify(t.header.alg, []byte(t.signed), t.signature) {
			return k.Public, nil
		}
	}
	switch {
	case len(keys) == 0:
		return nil, invalidf("it is signed with key %s, which its issuer does not publish; the issuer's keys were replaced, or somebody else signed it", quote(t.header.kid))
	case !usable:
		return nil, invalidf("it says that it is signed by %s, for which key %s is not to be used", t.header.alg, quote(t.header.kid))
	}
	return nil, invalidf("its signature does not match key %s", quote(t.header.kid))
}

// text is a JSON string; empty if there is none.
type text struct {
	s     string
	wrong string // what was there instead
}

func (t *text) UnmarshalJSON(b []byte) error {
	if kind := kindOf(b); kind != "a string" {
		*t = text{wrong: kind}
		return nil
	}
	// Nearly all are plain, and need no decoder of their own.
	if plain := b[1 : len(b)-1]; isPlain(plain) {
		t.s = string(plain)
		return nil
	}
	return json.Unmarshal(b, &t.s)
}

// isPlain reports whether what is between a JSON string's quotes stands for itself.
func isPlain(b []byte) bool {
	for _, c := range b {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// kindOf names a JSON value without repeating it.
func kindOf(b []byte) string {
	if len(b) == 0 {
		return "nothing"
	}
	switch b[0] {
	case '"':
		return "a string"
	case '{':
		return "an object"
	case '[':
		return "an array"
	case 't', 'f':
		return "a boolean"
	case 'n':
		return "null"
	}
	return "a number"
}
