package token

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"math/big"
	"slices"
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
	allAlgorithms = []string{"RS256", "PS256", "ES256", "ES384", "ES512"}
)

// allows reports whether the key may check a signature of an algorithm. Both
// the source's word and the key's own kind count.
func (k Key) allows(alg string) bool {
	return slices.Contains(k.Algorithms, alg) && slices.Contains(AlgorithmsFor(k.Public), alg)
}

// Verify reports whether a signature over some bytes is by the key, in the form
// that RFC 7518 §3 gives it for an algorithm. It is not if the key does not allow
// the algorithm.
func (k Key) Verify(alg string, signed, signature []byte) bool {
	if !k.allows(alg) {
		return false
	}
	switch pub := k.Public.(type) {
	case *rsa.PublicKey:
		digest := sha256.Sum256(signed)
		if alg == "PS256" {
			// RFC 7518 §3.5 has a salt as long as the hash. Left to itself, crypto/rsa
			// takes any length, none among them.
			return rsa.VerifyPSS(pub, crypto.SHA256, digest[:], signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], signature) == nil
	case *ecdsa.PublicKey:
		// RFC 7518 §3.4: two numbers of the curve's size, and not a byte more, or one
		// signature could be written in several ways.
		size := (pub.Curve.Params().BitSize + 7) / 8
		if len(signature) != 2*size {
			return false
		}
		r, s := new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])
		return ecdsa.Verify(pub, digestFor(alg, signed), r, s)
	}
	return false
}

// digestFor hashes as the ES algorithms have it.
func digestFor(alg string, signed []byte) []byte {
	switch alg {
	case "ES384":
		d := sha512.Sum384(signed)
		return d[:]
	case "ES512":
		d := sha512.Sum512(signed)
		return d[:]
	}
	d := sha256.Sum256(signed)
	return d[:]
}
