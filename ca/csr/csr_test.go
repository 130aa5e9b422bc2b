package csr

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/csr/csrtest"
	"github.com/meshca/meshca/identity"
)

const own = csrtest.Own

func parseID(t testing.TB, s string) identity.ID {
	t.Helper()
	id, err := identity.ParseID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// refused parses and demands a refusal whose reason has the text.
func refused(t *testing.T, text []byte, want string) {
	t.Helper()
	key, err := Parse(text, parseID(t, own))
	var refusal *RefusedError
	if !errors.As(err, &refusal) {
		t.Fatalf("Parse = %v, %v; want a refusal with %q", key, err, want)
	}
	if key != nil {
		t.Error("a key came with the refusal")
	}
	if !strings.Contains(refusal.Reason, want) {
		t.Errorf("reason %q; want %q in it", refusal.Reason, want)
	}
	if refusal.Caller.String() != own || !strings.Contains(err.Error(), own) {
		t.Errorf("%q does not say whose CSR it was", err)
	}
	if len(refusal.Reason) > 1400 {
		t.Errorf("the reason has %d bytes", len(refusal.Reason))
	}
}

func accepted(t *testing.T, text []byte, want crypto.PublicKey) {
	t.Helper()
	key, err := Parse(text, parseID(t, own))
	if err != nil {
		t.Fatal(err)
	}
	if !want.(interface{ Equal(crypto.PublicKey) bool }).Equal(key) {
		t.Error("another key came out than went in")
	}
}

// What the clients of Istio's CA send, made the way they make it.
func TestV37_PilotAgentAndZtunnelPass(t *testing.T) {
	id, err := url.Parse(own)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("pilot-agent", func(t *testing.T) {
		// RSA 2048, a subject of one empty organization, a critical SAN.
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
			Subject:         pkix.Name{Organization: []string{""}},
			ExtraExtensions: []pkix.Extension{csrtest.SAN(t, true, csrtest.URI(t, own))},
		}, csrtest.RSAKey())
		if err != nil {
			t.Fatal(err)
		}
		accepted(t, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), csrtest.RSAKey().Public())
	})
	t.Run("ztunnel", func(t *testing.T) {
		accepted(t, csrtest.Draft{Attributes: csrtest.ExtensionRequest(t, csrtest.SAN(t, true, csrtest.URI(t, own)))}.PEM(t), csrtest.ECKey().Public())
	})
	t.Run("standard library", func(t *testing.T) {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id}}, csrtest.ECKey())
		if err != nil {
			t.Fatal(err)
		}
		accepted(t, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), csrtest.ECKey().Public())
	})
	t.Run("nothing asked for", func(t *testing.T) {
		accepted(t, csrtest.Draft{}.PEM(t), csrtest.ECKey().Public())
	})
	t.Run("without the last newline", func(t *testing.T) {
		accepted(t, bytes.TrimRight(csrtest.Draft{}.PEM(t), "\n"), csrtest.ECKey().Public())
	})
}

func TestT16_EveryAcceptedKeyType(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"P-256": csrtest.ECKey(), "P-384": p384, "Ed25519": ed, "RSA 2048": csrtest.RSAKey()} {
		t.Run(name, func(t *testing.T) { accepted(t, csrtest.Draft{Key: key}.PEM(t), key.Public()) })
	}
	for _, bits := range []int{2048, 2049, 3072, 4096} {
		if err := checkKey(csrtest.RSASPKI(t, csrtest.Modulus(t, bits), big.NewInt(65537))); err != nil {
			t.Errorf("RSA %d: %v", bits, err)
		}
	}
}

// judged refuses every row of a table, each for its own reason.
func judged(t *testing.T, rows map[string]csrtest.Vector) {
	t.Helper()
	for name, v := range rows {
		t.Run(name, func(t *testing.T) { refused(t, v.PEM, v.Reason) })
	}
}

// The signature in these requests is always by another key. A reason that
// names the key shows that it was judged before any signature was verified.
func TestT16_V41_KeysAreJudgedBeforeAnySignature(t *testing.T) { judged(t, csrtest.Keys(t)) }

// The rows of V41: whatever a CSR asks for beyond the caller's ID is a reason
// to refuse it, and the reason names the thing.
func TestV41_T1_V37_NothingButTheOwnIDMayBeAsked(t *testing.T) {
	judged(t, csrtest.Wishes(t))
	_, err := Parse(csrtest.Wishes(t)["challenge password"].PEM, parseID(t, own))
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("the password is in the reason: %v", err)
	}
}

func TestV53_Encoding(t *testing.T) { judged(t, csrtest.Encodings(t)) }

func TestV41_T1_ProofOfPossession(t *testing.T) { judged(t, csrtest.Proofs(t)) }

// The caller holds these keys, as anybody does.
func TestT16_WeakKeys(t *testing.T) { judged(t, csrtest.WeakKeys(t)) }

// fastest is what a CSR costs; noise only ever adds.
func fastest(text []byte, id identity.ID, times int) time.Duration {
	best := time.Hour
	for range times {
		began := time.Now()
		_, _ = Parse(text, id)
		best = min(best, time.Since(began))
	}
	return best
}

// dear is how many good CSRs a refusal may cost. It is 1 in truth; what must not
// happen costs hundreds, and the race detector counts reading dearer than it is.
const dear = 10

// The key whose signature would take longest to check, a thousand times as long as
// a good one's, is refused without checking it.
func TestV10_T16_TheWorstKeyCostsNoSignature(t *testing.T) {
	id := parseID(t, own)
	worst := csrtest.Costly(t)
	if len(worst) > MaxPEM || len(worst) < MaxPEM*3/4 {
		t.Fatalf("the worst CSR has %d bytes; it should be the largest that is read", len(worst))
	}
	refused(t, worst, "has 40000 bits; 2048 to 4096 are accepted")
	if bad, good := fastest(worst, id, 20), fastest(csrtest.Draft{Key: csrtest.RSAKey()}.PEM(t), id, 20); bad > dear*good {
		t.Errorf("refusing the worst key takes %v, accepting a good one %v", bad, good)
	}
}

// No encoding, key or wish costs much more to refuse than a good CSR costs to
// accept: nothing in them is read in a time that grows with its square.
func TestV53_V10_EveryRefusalIsCheap(t *testing.T) {
	id := parseID(t, own)
	good := fastest(csrtest.Draft{Key: csrtest.RSAKey()}.PEM(t), id, 20)
	for _, rows := range []map[string]csrtest.Vector{csrtest.Encodings(t), csrtest.Keys(t), csrtest.Wishes(t)} {
		for name, v := range rows {
			if bad := fastest(v.PEM, id, 5); bad > dear*good {
				t.Errorf("%s: refused in %v, a good one is accepted in %v", name, bad, good)
			}
		}
	}
}

// Whatever becomes of a good CSR's bytes, it is refused or yields the key that
// it had, and nothing panics.
func TestV65_V15_BrokenBytes(t *testing.T) {
	id := parseID(t, own)
	for name, draft := range map[string]csrtest.Draft{
		"P-256":    {Attributes: csrtest.ExtensionRequest(t, csrtest.SAN(t, true, csrtest.URI(t, own)))},
		"RSA 2048": {Key: csrtest.RSAKey(), Subject: csrtest.Sequence(t, csrtest.RDN(t, "", 2, 5, 4, 10))},
	} {
		good := draft.DER(t)
		want, err := Parse(armor(good), id)
		if err != nil {
			t.Fatal(err)
		}
		try := func(der []byte) {
			key, err := Parse(armor(der), id)
			if err == nil && !want.(interface{ Equal(crypto.PublicKey) bool }).Equal(key) {
				t.Errorf("%s: another key came out of %x", name, der)
			}
		}
		for i := range good {
			try(good[:i])
			try(good[i:])
			for _, b := range []byte{0, 1, 0x7f, 0x80, 0xff, good[i] ^ 1, good[i] ^ 0x20, good[i] ^ 0x80} {
				other := bytes.Clone(good)
				other[i] = b
				try(other)
			}
		}
	}
	// Lengths of zero, where a careless reader takes the first byte.
	for table, names := range map[string][]string{
		"key":  {"RSA modulus of no bytes", "RSA exponent of no bytes", "RSA zero", "no key bits", "no type", "point at infinity"},
		"wish": {"name of unknown kind", "name with a long tag", "SAN of no bytes", "EKU of no bytes", "O without a value", "empty RDN"},
	} {
		rows := map[string]map[string]csrtest.Vector{"key": csrtest.Keys(t), "wish": csrtest.Wishes(t)}[table]
		for _, name := range names {
			refused(t, rows[name].PEM, rows[name].Reason)
		}
	}
}

func armor(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}) }

// The same key and the same request again: a CSR is not a secret, so replaying
// one yields what it yielded before, for its own caller only.
func TestV41_ReplayedForAnother(t *testing.T) {
	text := csrtest.Draft{Attributes: csrtest.ExtensionRequest(t, csrtest.SAN(t, true, csrtest.URI(t, own)))}.PEM(t)
	for range 1000 {
		accepted(t, text, csrtest.ECKey().Public())
	}
	other, err := identity.ParseID("spiffe://cluster.local/ns/shop/sa/other")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(text, other); err == nil {
		t.Error("a CSR that names cart was accepted from other")
	}
	// A CSR that names nobody is good for both: it yields a key, and the names are
	// the callers'. Whoever has another's CSR certified gets a certificate for
	// himself and for a key that he does not hold.
	nameless := csrtest.Draft{}.PEM(t)
	accepted(t, nameless, csrtest.ECKey().Public())
	if key, err := Parse(nameless, other); err != nil || !csrtest.ECKey().PublicKey.Equal(key) {
		t.Errorf("the same key for other: %v, %v", key, err)
	}
}
