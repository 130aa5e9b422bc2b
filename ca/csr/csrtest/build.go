package csrtest

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
)

const pemType = "CERTIFICATE REQUEST"

var (
	oidRSA              = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidEC               = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
	oidEd25519          = asn1.ObjectIdentifier{1, 3, 101, 112}
	oidP256             = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	oidP384             = asn1.ObjectIdentifier{1, 3, 132, 0, 34}
	oidExtensionRequest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidMD5WithRSA       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 4}
	oidSHA256WithRSA    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}
	oidSHA1WithRSA      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 5}
	oidECDSAWithSHA256  = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	oidECDSAWithSHA1    = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}
	oidChallenge        = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}
)

// ECKey returns a P-256 key, always the same within a test binary.
var ECKey = sync.OnceValue(func() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
})

// RSAKey returns an RSA key of 2048 bits, always the same within a test binary.
var RSAKey = sync.OnceValue(func() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
})

// Draft is a CSR to be made by hand, so that each part can be wrong. The zero
// Draft is a good one, signed by [ECKey], that asks for nothing.
type Draft struct {
	Version    int
	Subject    []byte                // a Name; nil means the empty one
	SPKI       []byte                // nil means the key's
	Attributes []byte                // contents of the [0] SET
	SigAlg     asn1.ObjectIdentifier // nil means what fits the key
	Hash       crypto.Hash           // what is really signed over; 0 means SHA-256
	Key        crypto.Signer         // nil means ECKey
	After      []byte                // appended inside the outer sequence
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

// Sequence is a SEQUENCE of parts.
func Sequence(t testing.TB, parts ...[]byte) []byte { return wrap(t, 0, asn1.TagSequence, parts...) }

// Set is a SET of parts.
func Set(t testing.TB, parts ...[]byte) []byte { return wrap(t, 0, asn1.TagSet, parts...) }

// DER signs the draft.
func (d Draft) DER(t testing.TB) []byte {
	t.Helper()
	if d.Key == nil {
		d.Key = ECKey()
	}
	if d.Subject == nil {
		d.Subject = Sequence(t)
	}
	if d.SPKI == nil {
		spki, err := x509.MarshalPKIXPublicKey(d.Key.Public())
		if err != nil {
			t.Fatal(err)
		}
		d.SPKI = spki
	}
	if d.SigAlg == nil {
		d.SigAlg = oidECDSAWithSHA256
		switch d.Key.Public().(type) {
		case *rsa.PublicKey:
			d.SigAlg = oidSHA256WithRSA
		case ed25519.PublicKey:
			d.SigAlg = oidEd25519
		}
	}
	body := Sequence(t, der(t, d.Version), d.Subject, d.SPKI, wrap(t, asn1.ClassContextSpecific, 0, d.Attributes))
	if d.Hash == 0 {
		d.Hash = crypto.SHA256
	}
	digest, opts := []byte(nil), crypto.SignerOpts(d.Hash)
	if _, ok := d.Key.Public().(ed25519.PublicKey); ok {
		digest, opts = body, crypto.Hash(0)
	} else if d.Hash == crypto.SHA256 {
		h := sha256.Sum256(body)
		digest = h[:]
	} else {
		h := d.Hash.New()
		h.Write(body)
		digest = h.Sum(nil)
	}
	sig, err := d.Key.Sign(rand.Reader, digest, opts)
	if err != nil {
		t.Fatal(err)
	}
	alg := Sequence(t, der(t, d.SigAlg))
	if _, ok := d.Key.Public().(*rsa.PublicKey); ok {
		alg = Sequence(t, der(t, d.SigAlg), asn1.NullBytes)
	}
	return Sequence(t, body, alg, der(t, asn1.BitString{Bytes: sig, BitLength: len(sig) * 8}), d.After)
}

// PEM signs the draft and armors it.
func (d Draft) PEM(t testing.TB) []byte {
	t.Helper()
	return armor(d.DER(t))
}

func armor(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}) }

// ExtensionRequest is the attribute that carries extensions.
func ExtensionRequest(t testing.TB, exts ...pkix.Extension) []byte {
	t.Helper()
	return Sequence(t, der(t, oidExtensionRequest), Set(t, der(t, exts)))
}

// ext is an extension of any content.
func ext(value []byte, critical bool, oid ...int) pkix.Extension {
	return pkix.Extension{Id: oid, Critical: critical, Value: value}
}

// SAN is a subjectAltName with the names given.
func SAN(t testing.TB, critical bool, names ...[]byte) pkix.Extension {
	t.Helper()
	return ext(Sequence(t, names...), critical, oidSubjectAltName...)
}

// Name is a GeneralName.
func Name(t testing.TB, tag int, value string) []byte {
	t.Helper()
	return der(t, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(value)})
}

// URI is the GeneralName of a URI.
func URI(t testing.TB, s string) []byte { return Name(t, 6, s) }

// RDN is a relative distinguished name with one UTF8String.
func RDN(t testing.TB, value string, oid ...int) []byte {
	t.Helper()
	return Set(t, Sequence(t, der(t, asn1.ObjectIdentifier(oid)), der(t, asn1.RawValue{Tag: asn1.TagUTF8String, Bytes: []byte(value)})))
}

// RSASPKI is an RSA public key of any shape; nobody holds its private half.
func RSASPKI(t testing.TB, modulus, exponent *big.Int) []byte {
	t.Helper()
	key := Sequence(t, der(t, modulus), der(t, exponent))
	return Sequence(t, Sequence(t, der(t, oidRSA), asn1.NullBytes), der(t, asn1.BitString{Bytes: key, BitLength: len(key) * 8}))
}

// Modulus is an odd number of exactly the given number of bits.
func Modulus(t testing.TB, n int) *big.Int {
	t.Helper()
	m, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(n-1)))
	if err != nil {
		t.Fatal(err)
	}
	return m.SetBit(m.SetBit(m, n-1, 1), 0, 1)
}

func rawSPKI(t testing.TB, alg []byte, key []byte) []byte {
	t.Helper()
	return Sequence(t, alg, der(t, asn1.BitString{Bytes: key, BitLength: len(key) * 8}))
}
