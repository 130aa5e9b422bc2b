package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"math/big"
	mathrand "math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLeafLimits(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   LeafConfig
		want LeafConfig
		err  string
	}{
		{"defaults", LeafConfig{}, LeafConfig{Lifetime: time.Hour, Floor: 5 * time.Minute, Ceiling: 24 * time.Hour}, ""},
		{"test lifetimes", LeafConfig{TestLifetimes: true, Lifetime: 12 * time.Second, Ceiling: time.Minute},
			LeafConfig{TestLifetimes: true, Lifetime: 12 * time.Second, Floor: 10 * time.Second, Ceiling: time.Minute}, ""},
		{"a ceiling below the default lifetime lowers it", LeafConfig{Ceiling: 30 * time.Minute},
			LeafConfig{Lifetime: 30 * time.Minute, Floor: 5 * time.Minute, Ceiling: 30 * time.Minute}, ""},
		{"floor below 5 min", LeafConfig{Floor: time.Minute}, LeafConfig{}, "floor 1m0s is below 5m0s"},
		{"floor below 10 s", LeafConfig{Floor: 9 * time.Second, TestLifetimes: true}, LeafConfig{}, "floor 9s is below 10s"},
		{"ceiling above 24 h", LeafConfig{Ceiling: 25 * time.Hour}, LeafConfig{}, "above 24h"},
		{"floor above ceiling", LeafConfig{Floor: time.Hour, Ceiling: 10 * time.Minute}, LeafConfig{}, "above the ceiling"},
		{"lifetime above ceiling", LeafConfig{Lifetime: 2 * time.Hour, Ceiling: time.Hour}, LeafConfig{}, "is not between"},
		{"negative", LeafConfig{Lifetime: -1}, LeafConfig{}, "is not between"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.in
			err := got.complete()
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil || got != tt.want {
				t.Fatalf("got %+v, %v; want %+v", got, err, tt.want)
			}
		})
	}
}

func TestAskedLifetimeIsBounded(t *testing.T) {
	c := LeafConfig{}
	if err := c.complete(); err != nil {
		t.Fatal(err)
	}
	for asked, want := range map[time.Duration]time.Duration{
		0: time.Hour, -time.Hour: time.Hour, 1: 5 * time.Minute, time.Minute: 5 * time.Minute,
		2 * time.Hour: 2 * time.Hour, 90*time.Minute + 500*time.Millisecond: 90 * time.Minute,
		24 * time.Hour: 24 * time.Hour, 1 << 62: 24 * time.Hour,
	} {
		if got := c.clamp(asked); got != want {
			t.Errorf("asked for %v: given %v, want %v", asked, got, want)
		}
	}
}

// Whatever is asked under whatever issuer: never before or beyond the issuer,
// never longer than asked, and refused exactly when too little is left.
func TestV5_T6_LeafNeverOutlivesIssuer(t *testing.T) {
	seed := mathrand.Uint64()
	t.Logf("seed %d", seed)
	r := mathrand.New(mathrand.NewPCG(seed, 0))
	refused := 0
	for range 10_000 {
		now := time.Unix(r.Int64N(1<<33), r.Int64N(1e9))
		ttl := time.Duration(10+r.Int64N(24*3600-10)) * time.Second
		begin := time.Unix(now.Unix()-r.Int64N(600), 0)
		end := time.Unix(now.Unix()-1000+r.Int64N(26*3600), 0)
		v, ok := validityAt(now, ttl, begin, end)
		issue := now.Truncate(time.Second)
		left := min(ttl, end.Sub(issue))
		if want := left >= min(5*time.Minute, ttl/4); ok != want {
			t.Fatalf("ttl %v, %v left: accepted %v, want %v", ttl, left, ok, want)
		}
		if !ok {
			refused++
			continue
		}
		switch {
		case v.notAfter.After(end):
			t.Fatalf("leaf ends %v after its issuer", v.notAfter.Sub(end))
		case v.notBefore.Before(begin):
			t.Fatalf("leaf begins %v before its issuer", begin.Sub(v.notBefore))
		case v.lifetime != left || v.notAfter.Sub(issue) != left:
			t.Fatalf("lifetime %v, notAfter − issue %v, want %v", v.lifetime, v.notAfter.Sub(issue), left)
		case issue.Sub(v.notBefore) != min(2*time.Minute, issue.Sub(begin)):
			t.Fatalf("leaf begins %v before its issue", issue.Sub(v.notBefore))
		case v.notAfter.Before(now):
			t.Fatal("leaf has ended when it is issued")
		}
	}
	if refused == 0 || refused == 10_000 {
		t.Fatalf("%d of 10,000 refused: the pairs do not cover both sides", refused)
	}
}

// 200,000 draws stand in for the 10^7 of the goal: with 127 random bits neither
// number would ever repeat unless the random source were not one, which shows
// at once.
func TestT7_SerialsNeverRepeat(t *testing.T) {
	const draws = 200_000
	seen := make(map[[16]byte]struct{}, draws)
	var high int
	for range draws {
		n, err := newSerial(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if n.Sign() <= 0 || n.BitLen() > 127 {
			t.Fatalf("serial %x: must be above 0 and have its top bit clear", n)
		}
		if n.BitLen() > 120 {
			high++
		}
		var b [16]byte
		n.FillBytes(b[:])
		if _, again := seen[b]; again {
			t.Fatalf("serial %x drawn twice", n)
		}
		seen[b] = struct{}{}
	}
	if high < draws*9/10 {
		t.Fatalf("only %d of %d serials use their upper bits", high, draws)
	}
}

func TestT7_SerialIsNeverZero(t *testing.T) {
	one := append(make([]byte, 16), 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
	n, err := newSerial(bytes.NewReader(one))
	if err != nil || n.Cmp(big.NewInt(1)) != 0 {
		t.Fatalf("after a zero: serial %v, %v; want 1", n, err)
	}
	if n, err := newSerial(bytes.NewReader(make([]byte, 64))); err == nil {
		t.Fatalf("from zeros only: serial %v", n)
	}
	if n, err := newSerial(strings.NewReader("short")); err == nil {
		t.Fatalf("from a source that ends: serial %v", n)
	}
}

func TestT16_KeysByTypeAndSize(t *testing.T) {
	ec := func(c elliptic.Curve) crypto.PublicKey {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return &k.PublicKey
	}
	// A modulus of the size is enough: nothing is to be computed with it.
	rsaOf := func(bits, e int) *rsa.PublicKey {
		n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
		return &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: e}
	}
	p256 := ec(elliptic.P256()).(*ecdsa.PublicKey)
	even := rsaOf(2048, 65537)
	even.N.SetBit(even.N, 0, 0)
	for _, tt := range []struct {
		name string
		key  crypto.PublicKey
		kind string // refused as; empty means accepted
	}{
		{"P-256", p256, ""},
		{"P-384", ec(elliptic.P384()), ""},
		{"Ed25519", make(ed25519.PublicKey, 32), ""},
		{"RSA 2048", rsaOf(2048, 65537), ""},
		{"RSA 3072", rsaOf(3072, 65537), ""},
		{"RSA 4096", rsaOf(4096, 65537), ""},
		{"P-224", ec(elliptic.P224()), "ECDSA P-224"},
		{"P-521", ec(elliptic.P521()), "ECDSA P-521"},
		//lint:ignore SA1019 only raw coordinates make a point that is not on the curve
		{"off the curve", &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}, "ECDSA P-256"},
		//lint:ignore SA1019 as above
		{"identity point", &ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int), Y: new(big.Int)}, "ECDSA P-256"},
		{"empty ECDSA", &ecdsa.PublicKey{}, "ECDSA"},
		{"nil ECDSA", (*ecdsa.PublicKey)(nil), "ECDSA"},
		{"RSA 512", rsaOf(512, 65537), "RSA 512"},
		{"RSA 1024", rsaOf(1024, 65537), "RSA 1024"},
		{"RSA 2047", rsaOf(2047, 65537), "RSA 2047"},
		{"RSA 4097", rsaOf(4097, 65537), "RSA 4097"},
		{"RSA 16384", rsaOf(16384, 65537), "RSA 16384"},
		{"RSA e=1", rsaOf(2048, 1), "RSA 2048"},
		{"RSA e=3", rsaOf(2048, 3), "RSA 2048"},
		{"RSA e=65536", rsaOf(2048, 65536), "RSA 2048"},
		{"RSA e=2^31-1", rsaOf(2048, 1<<31-1), "RSA 2048"},
		{"RSA even", even, "RSA 2048"},
		{"empty RSA", &rsa.PublicKey{}, "RSA"},
		{"short Ed25519", make(ed25519.PublicKey, 31), "Ed25519"},
		{"by value", *p256, "ecdsa.PublicKey"},
		{"nil", nil, "<nil>"},
		{"text", "key", "string"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := CheckKey(tt.key)
			if tt.kind == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var refused *KeyError
			if !errors.As(err, &refused) || refused.Kind != tt.kind {
				t.Fatalf("error %v, want a KeyError about %q", err, tt.kind)
			}
		})
	}
}

func TestServingNames(t *testing.T) {
	long := strings.Repeat("a", 64)
	for _, name := range []string{
		"", ".", "a.", "UPPER.test", "*.test", "a b", "a\x00b", "a\n", "-a", "a-", "127.0.0.1", "::1", long, strings.Repeat("a.", 130) + "a", "ä.test", "a_b",
	} {
		if err := (&ServingNames{DNS: []string{name}}).Validate(); err == nil {
			t.Errorf("DNS name %q is accepted", name)
		}
	}
	if err := (&ServingNames{DNS: []string{"localhost", "a-1.test", "1.test"}}).Validate(); err != nil {
		t.Error(err)
	}
	if err := (&ServingNames{}).Validate(); err == nil {
		t.Error("no name at all is accepted")
	}
	if err := (&ServingNames{DNS: make([]string, 101)}).Validate(); err == nil {
		t.Error("101 names are accepted")
	}
	if err := (&ServingNames{IPs: append(ServingNames{}.IPs, []byte{1, 2, 3})}).Validate(); err == nil {
		t.Error("an address of three bytes is accepted")
	}
}

func TestBackoffIsJitteredAndBounded(t *testing.T) {
	for failures, bound := range map[int]time.Duration{
		1: 5 * time.Second, 2: 10 * time.Second, 6: 160 * time.Second, 7: 5 * time.Minute, 1000: 5 * time.Minute,
	} {
		var low, high bool
		for range 1000 {
			d := backoff(failures)
			if d < shortestWait || d > bound {
				t.Fatalf("after %d failures: %v, bound %v", failures, d, bound)
			}
			low, high = low || d < bound/3, high || d > bound*2/3
		}
		if !low || !high {
			t.Errorf("after %d failures: pauses are not spread over %v", failures, bound)
		}
	}
}

// The template is the whole profile; a field that is not listed here has got
// into it without anybody having thought about it.
func TestV41_LeafTemplateIsFixed(t *testing.T) {
	key, err := newP256()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := newPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	got := *leafTemplate(pub, big.NewInt(7), validity{})
	got.SerialNumber, got.SubjectKeyId, got.KeyUsage, got.BasicConstraintsValid = nil, nil, 0, false
	if want := (x509.Certificate{}); !reflect.DeepEqual(got, want) {
		t.Errorf("the leaf template has more fields than the profile: %+v", got)
	}
}
