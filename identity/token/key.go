package token

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"slices"

	"github.com/go-jose/go-jose/v4"
)

// Bounds on RSA keys. Below the lower one signatures can be forged; above the
// upper one checking them is work that an attacker hands to us.
const (
	MinRSABits = 2048
	MaxRSABits = 8192
)

// KeySource yields an issuer's public keys.
type KeySource interface {
	// Keys returns the keys that the issuer publishes under a key ID: usually
	// one, none if it publishes no such key. An error means that this could not be
	// found out. The result is the callee's and must not be changed. Keys is
	// called concurrently.
	Keys(ctx context.Context, kid string) ([]Key, error)
}

// Key is a public key of an issuer.
type Key struct {
	ID string
	// Algorithms are the JWS algorithms for which the key may be used. A name
	// that does not fit the key (see [AlgorithmsFor]) has no effect.
	Algorithms []string
	Public     crypto.PublicKey
}

// AlgorithmsFor returns the JWS algorithms that can be used with a public key
// and that an API server can sign with; none for a key that must not be used.
func AlgorithmsFor(pub crypto.PublicKey) []string {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if k == nil || k.N == nil || k.N.BitLen() < MinRSABits || k.N.BitLen() > MaxRSABits || k.E < 3 || k.E%2 == 0 {
			return nil
		}
		return rsaAlgorithms
	case *ecdsa.PublicKey:
		if k == nil {
			return nil
		}
		switch k.Curve {
		case elliptic.P256():
			return p256Algorithms
		case elliptic.P384():
			return p384Algorithms
		case elliptic.P521():
			return p521Algorithms
		}
	}
	return nil
}

var (
	rsaAlgorithms  = []string{"RS256", "PS256"}
	p256Algorithms = []string{"ES256"}
	p384Algorithms = []string{"ES384"}
	p521Algorithms = []string{"ES512"}

	// allAlgorithms is what the parser lets through; which of them counts is the
	// key's to say.
	allAlgorithms = []jose.SignatureAlgorithm{jose.RS256, jose.PS256, jose.ES256, jose.ES384, jose.ES512}
)

// allows reports whether the key may check a signature of an algorithm. Both
// the source's word and the key's own kind count.
func (k Key) allows(alg string) bool {
	return slices.Contains(k.Algorithms, alg) && slices.Contains(AlgorithmsFor(k.Public), alg)
}
