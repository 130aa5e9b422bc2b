package csr

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"sync"
	"testing"

	"github.com/meshca/meshca/identity"
)

var (
	oidSHA256WithRSA   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}
	oidSHA1WithRSA     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 5}
	oidECDSAWithSHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	oidECDSAWithSHA1   = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}
	oidChallenge       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}
)

func parseID(t testing.TB, s string) identity.ID {
	t.Helper()
	id, err := identity.ParseID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

var ecKey = sync.OnceValue(func() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
})

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
})

// draft is a CSR to be made by hand, so that each part can be wrong.
type draft struct {
	version    int
	subject    []byte // a Name; nil = the empty one
	spki       []byte // nil = the key's
	attributes []byte // contents of the [0] SET
	sigAlg     asn1.ObjectIdentifier
	hash       crypto.Hash // what is really signed over; 0 = SHA-256
	key        crypto.Signer
	after      []byte // appended inside the outer sequence
}

func der(t testing.TB, v any) []byte {
	t.Helper()
	b, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wrap encloses parts in one element.
func wrap(t testing.TB, class, tag int, parts ...[]byte) []byte {
	t.Helper()
	v := asn1.RawValue{Class: class, Tag: tag, IsCompound: true}
	for _, p := range parts {
		v.Bytes = append(v.Bytes, p...)
	}
	return der(t, v)
}

func seq(t testing.TB, parts ...[]byte) []byte { return wrap(t, 0, asn1.TagSequence, parts...) }
func set(t testing.TB, parts ...[]byte) []byte { return wrap(t, 0, asn1.TagSet, parts...) }

func (d draft) der(t testing.TB) []byte {
	t.Helper()
	if d.key == nil {
		d.key = ecKey()
	}
	if d.subject == nil {
		d.subject = seq(t)
	}
	if d.spki == nil {
		spki, err := x509.MarshalPKIXPublicKey(d.key.Public())
		if err != nil {
			t.Fatal(err)
		}
		d.spki = spki
	}
	if d.sigAlg == nil {
		d.sigAlg = oidECDSAWithSHA256
		switch d.key.(type) {
		case *rsa.PrivateKey:
			d.sigAlg = oidSHA256WithRSA
		case ed25519.PrivateKey:
			d.sigAlg = oidEd25519
		}
	}
	body := seq(t, der(t, d.version), d.subject, d.spki, wrap(t, asn1.ClassContextSpecific, 0, d.attributes))
	if d.hash == 0 {
		d.hash = crypto.SHA256
	}
	digest, opts := []byte(nil), crypto.SignerOpts(d.hash)
	if _, ok := d.key.(ed25519.PrivateKey); ok {
		digest, opts = body, crypto.Hash(0)
	} else if d.hash == crypto.SHA256 {
		h := sha256.Sum256(body)
		digest = h[:]
	} else {
		h := d.hash.New()
		h.Write(body)
		digest = h.Sum(nil)
	}
	sig, err := d.key.Sign(rand.Reader, digest, opts)
	if err != nil {
		t.Fatal(err)
	}
	alg := seq(t, der(t, d.sigAlg))
	if _, ok := d.key.(*rsa.PrivateKey); ok {
		alg = seq(t, der(t, d.sigAlg), asn1.NullBytes)
	}
	return seq(t, body, alg, der(t, asn1.BitString{Bytes: sig, BitLength: len(sig) * 8}), d.after)
}

func (d draft) pem(t testing.TB) []byte {
	t.Helper()
	return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: d.der(t)})
}

// extensionRequest is the attribute that carries extensions.
func extensionRequest(t testing.TB, exts ...pkix.Extension) []byte {
	t.Helper()
	return seq(t, der(t, oidExtensionRequest), set(t, der(t, exts)))
}

// ext is an extension of any content.
func ext(value []byte, critical bool, oid ...int) pkix.Extension {
	return pkix.Extension{Id: oid, Critical: critical, Value: value}
}

func san(t testing.TB, critical bool, names ...[]byte) pkix.Extension {
	t.Helper()
	return ext(seq(t, names...), critical, oidSubjectAltName...)
}

// name is a GeneralName.
func name(t testing.TB, tag int, value string) []byte {
	t.Helper()
	return der(t, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(value)})
}

func uri(t testing.TB, s string) []byte { return name(t, tagURI, s) }

// rdn is a relative distinguished name with one UTF8String.
func rdn(t testing.TB, value string, oid ...int) []byte {
	t.Helper()
	return set(t, seq(t, der(t, asn1.ObjectIdentifier(oid)), der(t, asn1.RawValue{Tag: asn1.TagUTF8String, Bytes: []byte(value)})))
}

// rsaSPKI is an RSA public key of any shape; nobody holds its private half.
func rsaSPKI(t testing.TB, modulus, exponent *big.Int) []byte {
	t.Helper()
	key := seq(t, der(t, modulus), der(t, exponent))
	return seq(t, seq(t, der(t, oidRSA), asn1.NullBytes), der(t, asn1.BitString{Bytes: key, BitLength: len(key) * 8}))
}

// modulus is an odd number of exactly the given number of bits.
func modulus(t testing.TB, n int) *big.Int {
	t.Helper()
	m, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(n-1)))
	if err != nil {
		t.Fatal(err)
	}
	return m.SetBit(m.SetBit(m, n-1, 1), 0, 1)
}

func rawSPKI(t testing.TB, alg []byte, key []byte) []byte {
	t.Helper()
	return seq(t, alg, der(t, asn1.BitString{Bytes: key, BitLength: len(key) * 8}))
}
