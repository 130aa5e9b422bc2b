package csr

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"testing"

	"github.com/meshca/meshca/ca/csr/csrtest"
)

// FuzzParse looks for panics, and for a request that passes although a second
// reader of the same bytes, crypto/x509, sees more in it than the caller's ID.
func FuzzParse(f *testing.F) {
	f.Add(csrtest.Draft{}.PEM(f))
	f.Add(csrtest.Draft{
		Key: csrtest.RSAKey(), Subject: csrtest.Sequence(f, csrtest.RDN(f, "", 2, 5, 4, 10)),
		Attributes: csrtest.ExtensionRequest(f, csrtest.SAN(f, true, csrtest.URI(f, own))),
	}.PEM(f))
	for _, v := range csrtest.All(f) {
		if len(v.PEM) <= MaxPEM {
			f.Add(v.PEM)
		}
	}
	id := parseID(f, own)
	f.Fuzz(func(t *testing.T, text []byte) {
		key, err := Parse(text, id)
		if err != nil {
			var refusal *RefusedError
			if !errors.As(err, &refusal) || key != nil {
				t.Fatalf("Parse = %v, %v", key, err)
			}
			return
		}
		block, _ := pem.Decode(text)
		req, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		asksForNothingElse(t, req)
	})
}

// asksForNothingElse is the policy once more, in the terms of crypto/x509.
func asksForNothingElse(t *testing.T, req *x509.CertificateRequest) {
	t.Helper()
	if len(req.DNSNames)+len(req.IPAddresses)+len(req.EmailAddresses) != 0 || len(req.URIs) > 1 || len(req.Extensions) > 1 {
		t.Errorf("accepted although it asks for %v %v %v %v", req.DNSNames, req.IPAddresses, req.EmailAddresses, req.Extensions)
	}
	if len(req.URIs) == 1 && req.URIs[0].String() != own {
		t.Errorf("accepted although it asks for %v", req.URIs)
	}
	if s := req.Subject.String(); s != "" && s != "O=" {
		t.Errorf("accepted with subject %q", s)
	}
}

// FuzzSAN holds what is accepted as a subjectAltName to the one encoding that it
// can have.
func FuzzSAN(f *testing.F) {
	id := parseID(f, own)
	only := csrtest.Sequence(f, csrtest.URI(f, own))
	f.Add(only)
	for _, names := range [][][]byte{
		{}, {csrtest.URI(f, own), csrtest.URI(f, own)}, {csrtest.Name(f, 2, "pay.shop")}, {csrtest.Name(f, 7, "1234")}, {csrtest.Name(f, 9, own)},
		{csrtest.URI(f, own+"\x00")}, {csrtest.Name(f, 0, "")}, {csrtest.Sequence(f, csrtest.URI(f, own))},
	} {
		f.Add(csrtest.Sequence(f, names...))
	}
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, der []byte) {
		if err := checkSAN(der, id); (err == nil) != bytes.Equal(der, only) {
			t.Errorf("checkSAN(%x) = %v", der, err)
		}
	})
}

// FuzzWishes holds what is accepted as subject and attributes to what
// crypto/x509 reads in them.
func FuzzWishes(f *testing.F) {
	id := parseID(f, own)
	sans := csrtest.ExtensionRequest(f, csrtest.SAN(f, true, csrtest.URI(f, own)))
	f.Add([]byte{0x30, 0}, []byte(nil))
	f.Add(csrtest.Sequence(f, csrtest.RDN(f, "", 2, 5, 4, 10)), sans)
	f.Add(csrtest.Sequence(f, csrtest.RDN(f, "admin", 2, 5, 4, 3)), append(sans, sans...))
	f.Add([]byte{0x31, 0}, csrtest.ExtensionRequest(f, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Value: []byte{0x30, 0}}))
	f.Fuzz(func(t *testing.T, subject, attributes []byte) {
		if len(subject)+len(attributes) > MaxPEM {
			return
		}
		text := csrtest.Draft{Subject: subject, Attributes: attributes}.PEM(t)
		if _, err := Parse(text, id); err != nil {
			return
		}
		block, _ := pem.Decode(text)
		req, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		asksForNothingElse(t, req)
	})
}

// FuzzKey holds the keys that pass to what crypto/x509 takes them for.
func FuzzKey(f *testing.F) {
	for _, key := range []any{csrtest.ECKey().Public(), csrtest.RSAKey().Public(), ed25519.NewKeyFromSeed(make([]byte, 32)).Public()} {
		spki, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(spki)
	}
	f.Add([]byte{0x30, 0})
	f.Add([]byte{0x30, 4, 0x30, 0, 3, 0})
	for _, v := range csrtest.Keys(f) {
		block, _ := pem.Decode(v.PEM)
		if r, err := split(block.Bytes); err == nil {
			f.Add(r.spki)
		}
	}
	f.Fuzz(func(t *testing.T, spki []byte) {
		if checkKey(spki) != nil {
			return
		}
		key, err := x509.ParsePKIXPublicKey(spki)
		if err != nil {
			return // a point off the curve
		}
		switch k := key.(type) {
		case *ecdsa.PublicKey:
			if size := k.Params().BitSize; size != 256 && size != 384 {
				t.Errorf("accepted a curve of %d bits", size)
			}
		case *rsa.PublicKey:
			if n := k.N.BitLen(); n < minRSABits || n > maxRSABits || k.E != 65537 || k.N.Bit(0) == 0 {
				t.Errorf("accepted an RSA key of %d bits with exponent %d", n, k.E)
			}
		case ed25519.PublicKey:
		default:
			t.Errorf("accepted a %T", key)
		}
		if err := checkFactors(key); err != nil && !errors.As(err, new(fault)) {
			t.Error(err)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	id := parseID(b, own)
	for name, draft := range map[string]csrtest.Draft{
		"P-256":    {Attributes: csrtest.ExtensionRequest(b, csrtest.SAN(b, true, csrtest.URI(b, own)))},
		"RSA 2048": {Key: csrtest.RSAKey()},
	} {
		text := draft.PEM(b)
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := Parse(text, id); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkFactors is what the search for factors adds to an RSA key's signature.
func BenchmarkFactors(b *testing.B) {
	key := csrtest.RSAKey().Public()
	for b.Loop() {
		if err := checkFactors(key); err != nil {
			b.Fatal(err)
		}
	}
}
