package agent

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
)

// KeyType is a kind of private key. The zero value means P-256.
type KeyType string

// The kinds of keys that a certificate can be asked for with.
const (
	P256    KeyType = "P-256"
	P384    KeyType = "P-384"
	Ed25519 KeyType = "Ed25519"
	RSA2048 KeyType = "RSA-2048"
)

// KeyTypes returns all kinds of keys, the default first.
func KeyTypes() []KeyType { return []KeyType{P256, P384, Ed25519, RSA2048} }

// ParseKeyType reads the name of a kind of key, as the constants spell it.
func ParseKeyType(name string) (KeyType, error) {
	for _, k := range KeyTypes() {
		if name == string(k) {
			return k, nil
		}
	}
	return "", fmt.Errorf("key type %q is not one of %q", name, KeyTypes())
}

// generate makes a key.
func (k KeyType) generate() (crypto.Signer, error) {
	switch k {
	case P256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case P384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case Ed25519:
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return nil, fmt.Errorf("key type %q is not one of %q", k, KeyTypes())
}
