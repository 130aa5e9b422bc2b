package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"

	"github.com/meshca/meshca/identity"
)

// The RSA keys that are accepted. Larger ones cost the verifier more than the
// signer: RSA-16384 takes milliseconds for each check.
const (
	minRSABits  = 2048
	maxRSABits  = 4096
	rsaExponent = 65537
)

// CheckKey returns nil for a public key that may stand in a certificate, and a
// [*KeyError] for any other. It looks at type and size only and verifies
// nothing.
func CheckKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return checkECDSA(k)
	case ed25519.PublicKey:
		if len(k) != ed25519.PublicKeySize {
			return &KeyError{Kind: "Ed25519", Detail: fmt.Sprintf("it has %d bytes", len(k))}
		}
		return nil
	case *rsa.PublicKey:
		return checkRSA(k)
	}
	return &KeyError{Kind: fmt.Sprintf("%T", pub)}
}

func checkECDSA(k *ecdsa.PublicKey) error {
	if k == nil || k.Curve == nil {
		return &KeyError{Kind: "ECDSA", Detail: "it is empty"}
	}
	if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
		return &KeyError{Kind: "ECDSA " + k.Curve.Params().Name}
	}
	// A point that was not parsed from an encoding may lie off the curve.
	if _, err := k.ECDH(); err != nil {
		return &KeyError{Kind: "ECDSA " + k.Curve.Params().Name, Detail: "its point is not on the curve"}
	}
	return nil
}

func checkRSA(k *rsa.PublicKey) error {
	if k == nil || k.N == nil {
		return &KeyError{Kind: "RSA", Detail: "it is empty"}
	}
	bits := k.N.BitLen()
	kind := fmt.Sprintf("RSA %d", bits)
	switch {
	case bits < minRSABits || bits > maxRSABits:
		return &KeyError{Kind: kind}
	case k.E != rsaExponent:
		return &KeyError{Kind: kind, Detail: fmt.Sprintf("its exponent is %d", k.E)}
	case k.N.Bit(0) == 0:
		return &KeyError{Kind: kind, Detail: "its modulus is even"}
	}
	return nil
}

// publicKey is a public key with what certificates and records derive from it.
type publicKey struct {
	key         crypto.PublicKey
	id          []byte // key identifier: RFC 7093 §2, method 1
	fingerprint string // SHA-256 of the SubjectPublicKeyInfo, hex
}

func newPublicKey(pub crypto.PublicKey) (publicKey, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return publicKey{}, fmt.Errorf("encoding the public key: %w", err)
	}
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &info); err != nil {
		return publicKey{}, fmt.Errorf("reading back the public key: %w", err)
	}
	id, sum := sha256.Sum256(info.Key.RightAlign()), sha256.Sum256(der)
	return publicKey{key: pub, id: id[:20], fingerprint: hex.EncodeToString(sum[:])}, nil
}

// Roles of authorities in the names of their certificates.
const (
	RoleRoot         = "root"
	RoleIntermediate = "intermediate"
)

// AuthorityName returns the subject of a CA certificate of ours and its key
// identifier. The name holds a part of the key identifier, so that no two keys
// ever share a name: path building by name alone then finds one certificate.
func AuthorityName(td identity.TrustDomain, role string, pub crypto.PublicKey) (name pkix.Name, keyID []byte, err error) {
	k, err := newPublicKey(pub)
	if err != nil {
		return pkix.Name{}, nil, err
	}
	return pkix.Name{
		Organization: []string{td.String()},
		CommonName:   "meshca " + role,
		SerialNumber: hex.EncodeToString(k.id[:8]),
	}, k.id, nil
}
