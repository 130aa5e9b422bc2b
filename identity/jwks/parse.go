package jwks

import (
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"

	"github.com/meshca/meshca/identity/token"
)

// Bounds on a document. An API server publishes a handful of keys.
const (
	maxDocument = 1 << 20
	maxKeys     = 100
	maxKeyID    = 256
)

// ignored is a key that was left out of a set.
type ignored struct {
	kid    string
	reason string
}

// parse reads a JWK Set. Keys that are not for us are left out, as RFC 7517 §5
// wants; a document without a single usable key is an error, because believing
// it would lock everybody out.
func parse(document []byte) (map[string][]token.Key, []ignored, error) {
	if len(document) > maxDocument {
		return nil, nil, fmt.Errorf("the key set has more than %d bytes", maxDocument)
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(document, &set); err != nil {
		return nil, nil, fmt.Errorf("the key set is not JSON as RFC 7517 has it: %.256q", err.Error())
	}
	if len(set.Keys) > maxKeys {
		return nil, nil, fmt.Errorf("the key set has %d keys; at most %d are read", len(set.Keys), maxKeys)
	}
	keys := make(map[string][]token.Key)
	var left []ignored
	for _, raw := range set.Keys {
		key, kid, err := parseKey(raw)
		switch {
		case err != nil:
			left = append(left, ignored{kid, err.Error()})
		case !slices.ContainsFunc(keys[kid], func(k token.Key) bool { return equal(k.Public, key.Public) }):
			keys[kid] = append(keys[kid], key)
		}
	}
	if len(keys) == 0 {
		var why strings.Builder
		for _, i := range left[:min(len(left), 3)] {
			fmt.Fprintf(&why, "; key %.80q: %s", i.kid, i.reason)
		}
		return nil, left, fmt.Errorf("none of the %d keys in the set can be used%s", len(set.Keys), why.String())
	}
	return keys, left, nil
}

// parseKey reads one key. The ID comes back even if the key is of no use.
func parseKey(raw []byte) (key token.Key, kid string, err error) {
	var m struct {
		ID         string   `json:"kid"`
		Type       string   `json:"kty"`
		Use        string   `json:"use"`
		Operations []string `json:"key_ops"`
		Algorithm  string   `json:"alg"`

		D any `json:"d"`
		P any `json:"p"`
		Q any `json:"q"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return key, "", fmt.Errorf("it is not a JWK: %.256q", err.Error())
	}
	kid = m.ID[:min(len(m.ID), maxKeyID)]
	switch {
	case m.Type != "RSA" && m.Type != "EC":
		return key, kid, fmt.Errorf("its type is %.80q, not RSA or EC", m.Type)
	case m.D != nil || m.P != nil || m.Q != nil:
		return key, kid, errors.New("its private half was published with it; replace the key")
	case m.Use != "" && m.Use != "sig":
		return key, kid, fmt.Errorf("its use is %.80q, not \"sig\"", m.Use)
	case m.Operations != nil && !slices.Contains(m.Operations, "verify"):
		return key, kid, fmt.Errorf("its operations are %.80q, without \"verify\"", m.Operations)
	case kid == "":
		return key, kid, errors.New("it has no ID")
	case len(m.ID) > maxKeyID:
		return key, kid, fmt.Errorf("its ID has %d bytes; at most %d are expected", len(m.ID), maxKeyID)
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(raw); err != nil {
		return key, kid, fmt.Errorf("it is not a JWK: %.256q", err.Error())
	}
	algorithms := token.AlgorithmsFor(jwk.Key)
	if len(algorithms) == 0 {
		return key, kid, fmt.Errorf("a key of its kind and size is not used (RSA of %d to %d bits, P-256, P-384 and P-521 are)", token.MinRSABits, token.MaxRSABits)
	}
	if m.Algorithm != "" {
		if !slices.Contains(algorithms, m.Algorithm) {
			return key, kid, fmt.Errorf("its algorithm is %.80q; a key of its kind is used with %s", m.Algorithm, strings.Join(algorithms, " or "))
		}
		algorithms = []string{m.Algorithm}
	}
	return token.Key{ID: kid, Algorithms: algorithms, Public: jwk.Key}, kid, nil
}

// equal compares public keys by value.
func equal(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
