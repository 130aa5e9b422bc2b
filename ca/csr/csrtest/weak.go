package csrtest

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math/big"
	"slices"
	"sync"
	"testing"
)

// WeakKeys are CSRs that are right in every way, their signature included, for
// keys whose private half anybody can find.
func WeakKeys(t testing.TB) map[string]Vector {
	t.Helper()
	p, q := primes()[0], primes()[1]
	small := big.NewInt
	const tooClose, divisible = "lie too close together", "divisible by a small number"
	vectors := make(map[string]Vector)
	for name, row := range map[string]struct {
		factors []*big.Int
		want    string
	}{
		"RSA with the factor 3":         {[]*big.Int{small(3), p, q}, divisible},
		"RSA with the factor 751":       {[]*big.Int{small(751), p, q}, divisible},
		"RSA with the factors 65521, 5": {[]*big.Int{small(65521), small(5), p, q}, divisible},
		"RSA of neighbours":             {[]*big.Int{p, after(p, 2)}, tooClose},
		"RSA of near primes":            {[]*big.Int{p, after(p, 1<<40)}, tooClose},
		"RSA of close primes":           {[]*big.Int{p, after(p, 1<<62)}, tooClose},
		"RSA that is a square":          {[]*big.Int{p, p}, tooClose},
	} {
		vectors[name] = Vector{Draft{Key: newFactored(t, row.factors...)}.PEM(t), row.want}
	}
	for _, point := range SmallOrderPoints(t) {
		vectors["Ed25519 "+hex.EncodeToString(point[:2])+"…"+hex.EncodeToString(point[30:])] = Vector{Draft{Key: &smallOrder{point}}.PEM(t), "of small order"}
	}
	return vectors
}

// primes are two primes of 1024 bits, made once for a test binary.
var primes = sync.OnceValue(func() (all [2]*big.Int) {
	for i := range all {
		p, err := rand.Prime(rand.Reader, 1024)
		if err != nil {
			panic(err)
		}
		all[i] = p
	}
	return all
})

// after returns the first prime that is larger by at least a distance.
func after(p *big.Int, distance int64) *big.Int {
	q := new(big.Int).Add(p, big.NewInt(distance&^1))
	for !q.ProbablyPrime(0) {
		q.Add(q, big.NewInt(2))
	}
	return q
}

// factored signs with an RSA key made of any factors. Package rsa would not hold
// such a key.
type factored struct {
	rsa.PublicKey
	d *big.Int
}

func newFactored(t testing.TB, factors ...*big.Int) *factored {
	t.Helper()
	one := big.NewInt(1)
	n, phi := big.NewInt(1), big.NewInt(1)
	for _, p := range factors {
		if new(big.Int).Mod(n, p).Sign() == 0 { // a power
			phi.Mul(phi, p)
		} else {
			phi.Mul(phi, new(big.Int).Sub(p, one))
		}
		n.Mul(n, p)
	}
	d := new(big.Int).ModInverse(big.NewInt(65537), phi)
	if d == nil {
		t.Fatal("65537 has no inverse")
	}
	return &factored{rsa.PublicKey{N: n, E: 65537}, d}
}

func (f *factored) Public() crypto.PublicKey { return &f.PublicKey }

// Sign is RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 §8.2.1).
func (f *factored) Sign(_ io.Reader, digest []byte, _ crypto.SignerOpts) ([]byte, error) {
	info, err := hex.DecodeString("3031300d060960864801650304020105000420")
	if err != nil {
		return nil, err
	}
	size := f.Size()
	em := slices.Concat([]byte{0, 1}, bytes.Repeat([]byte{0xff}, size-3-len(info)-len(digest)), []byte{0}, info, digest)
	return new(big.Int).Exp(new(big.Int).SetBytes(em), f.d, f.N).FillBytes(make([]byte, size)), nil
}

// SmallOrderPoints are all encodings of points on edwards25519 whose order
// divides 8, those included that RFC 8032 §5.1.3 would not write.
func SmallOrderPoints(t testing.TB) (points [][]byte) {
	t.Helper()
	for _, y := range []string{
		"0000000000000000000000000000000000000000000000000000000000000000", // order 4
		"0100000000000000000000000000000000000000000000000000000000000000", // the neutral element
		"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05", // order 8
		"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a", // order 8
		"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", // order 2
		"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", // 0, written as p
		"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", // 1, written as p+1
	} {
		b, err := hex.DecodeString(y)
		if err != nil {
			t.Fatal(err)
		}
		minus := bytes.Clone(b)
		minus[31] |= 0x80
		points = append(points, b, minus)
	}
	return points
}

// smallOrder signs for a public key of small order, which needs no private one:
// a multiple of such a point is soon the neutral one, and then anybody's
// signature is right.
type smallOrder struct{ point []byte }

func (s *smallOrder) Public() crypto.PublicKey { return ed25519.PublicKey(s.point) }

func (s *smallOrder) Sign(_ io.Reader, message []byte, _ crypto.SignerOpts) ([]byte, error) {
	order, _ := new(big.Int).SetString("27742317777372353535851937790883648493", 10)
	order.SetBit(order, 252, 1)
	for i := range uint64(1000) {
		// A pair of s and R = sB: an honest key is just that.
		seed := binary.BigEndian.AppendUint64(make([]byte, 24), i)
		r := ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey)
		h := sha512.Sum512(seed)
		h[0] &= 248
		h[31] = h[31]&127 | 64
		scalar := h[:32]
		slices.Reverse(scalar)
		sum := new(big.Int).SetBytes(scalar)
		sig := sum.Mod(sum, order).FillBytes(make([]byte, 32))
		slices.Reverse(sig)
		sig = slices.Concat(r, sig)
		if ed25519.Verify(s.point, message, sig) {
			return sig, nil
		}
	}
	return nil, errors.New("no signature was found")
}

// Costly is a CSR for the RSA key whose signature takes longest to check among
// those that fit. The signature is of the right size, and wrong.
func Costly(t testing.TB) []byte {
	t.Helper()
	return Draft{Key: costly{rsa.PublicKey{N: Modulus(t, 40_000), E: 1<<31 - 1}}}.PEM(t)
}

type costly struct{ rsa.PublicKey }

func (c costly) Public() crypto.PublicKey { return &c.PublicKey }

func (c costly) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return new(big.Int).Rsh(c.N, 1).FillBytes(make([]byte, c.Size())), nil
}
