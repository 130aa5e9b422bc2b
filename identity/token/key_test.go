package token_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"math/big"
	"slices"
	"testing"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokentest"
)

func TestV58_AlgorithmsFollowFromTheKey(t *testing.T) {
	modulus := func(bits uint, e int) *rsa.PublicKey {
		n := new(big.Int).Lsh(big.NewInt(1), bits-1)
		return &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: e}
	}
	for _, test := range []struct {
		name string
		key  any
		want []string
	}{
		{"RSA 2048", modulus(2048, 65537), []string{"RS256", "PS256"}},
		{"RSA 8192", modulus(8192, 3), []string{"RS256", "PS256"}},
		{"RSA 2047", modulus(2047, 65537), nil},
		{"RSA 8193", modulus(8193, 65537), nil},
		{"RSA e=1", modulus(2048, 1), nil},
		{"RSA e even", modulus(2048, 4), nil},
		{"RSA without a modulus", &rsa.PublicKey{}, nil},
		{"RSA nil", (*rsa.PublicKey)(nil), nil},
		{"P-224", tokentest.NewKey(t, elliptic.P224()).Public(), nil},
		{"P-256", tokentest.NewKey(t, elliptic.P256()).Public(), []string{"ES256"}},
		{"P-384", tokentest.NewKey(t, elliptic.P384()).Public(), []string{"ES384"}},
		{"P-521", tokentest.NewKey(t, elliptic.P521()).Public(), []string{"ES512"}},
		{"ECDSA nil", (*ecdsa.PublicKey)(nil), nil},
		{"bytes", []byte("secret"), nil},
		{"nothing", nil, nil},
	} {
		if got := token.AlgorithmsFor(test.key); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, expected %q", test.name, got, test.want)
		}
	}
}
