package csr

import (
	"crypto"
	"crypto/rsa"
	"encoding/hex"
	"math/big"
	"slices"
	"sync"
)

// smallOrder holds the points of edwards25519 whose order divides 8, as the y of
// RFC 8032 §5.1.2 without the sign; two of them have a second spelling, which
// decoders take. Under such a key anybody can sign.
var smallOrder = []string{
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0100000000000000000000000000000000000000000000000000000000000000",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}

// checkEd25519 judges an Ed25519 key (RFC 8410 §4) by its bytes.
func checkEd25519(key []byte) error {
	if len(key) != 32 {
		return faultf("its Ed25519 key has %d bytes, not 32", len(key))
	}
	y := [32]byte(key)
	y[31] &= 0x7f
	if slices.Contains(smallOrder, hex.EncodeToString(y[:])) {
		return fault("its Ed25519 key is a point of small order, under which anybody can sign; the key's generator is broken")
	}
	return nil
}

// smallPrimes is the product of the odd primes below 752, made when the first RSA
// key comes: it costs 2 ms and most of a megabyte, and a mesh may never see one.
var smallPrimes = sync.OnceValue(func() *big.Int {
	product := big.NewInt(1)
	for p := int64(3); p < 752; p += 2 {
		if big.NewInt(p).ProbablyPrime(0) {
			product.Mul(product, big.NewInt(p))
		}
	}
	return product
})

// fermatRounds is how far apart the factors of an RSA key are looked for. Broken
// generators have taken two primes that follow each other, which the first round
// finds.
const fermatRounds = 100

// checkFactors refuses RSA keys that fall to what can be tried in the time of a
// few signature checks. Whoever holds one harms mostly himself, and does not know
// it: keys like these come from generators without randomness. It comes last,
// since it costs more than the signature.
func checkFactors(pub crypto.PublicKey) error {
	k, ok := pub.(*rsa.PublicKey)
	if !ok {
		return nil
	}
	primes := smallPrimes()
	if g := new(big.Int).GCD(nil, nil, new(big.Int).Mod(k.N, primes), primes); g.BitLen() > 1 {
		return fault("its RSA modulus is divisible by a small number; the key's generator is broken")
	}
	if closeFactors(k.N) {
		return fault("the factors of its RSA modulus lie too close together; the key's generator is broken")
	}
	return nil
}

var one = big.NewInt(1)

// sieve has remainders by which most numbers are told to be no squares:
// squares modulo n are rare for each of the n.
var sieve = []uint64{63, 65, 11}

var (
	sieveProduct = big.NewInt(63 * 65 * 11)
	squares      = func() (all [][]bool) {
		for _, n := range sieve {
			is := make([]bool, n)
			for i := range n {
				is[i*i%n] = true
			}
			all = append(all, is)
		}
		return all
	}()
)

// mayBeSquare is false for most numbers that are no squares; scratch is changed.
func mayBeSquare(x, scratch *big.Int) bool {
	r := scratch.Mod(x, sieveProduct).Uint64()
	for i, n := range sieve {
		if !squares[i][r%n] {
			return false
		}
	}
	return true
}

// closeFactors is Fermat's method: n = a² − b², looked for from the smallest a on.
func closeFactors(n *big.Int) bool {
	a := new(big.Int).Sqrt(n)
	square := new(big.Int).Mul(a, a)
	if square.Cmp(n) == 0 {
		return true
	}
	b2, root, rest := new(big.Int), new(big.Int), new(big.Int)
	for range fermatRounds {
		// (a+1)² = a² + 2a + 1
		square.Add(square, a).Add(square, a).Add(square, one)
		a.Add(a, one)
		b2.Sub(square, n)
		if !mayBeSquare(b2, rest) {
			continue
		}
		if root.Sqrt(b2); rest.Mul(root, root).Cmp(b2) == 0 {
			return true
		}
	}
	return false
}
