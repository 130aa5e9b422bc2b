package csr

import (
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"testing"
)

func asOID(oid []int) asn1.ObjectIdentifier { return oid }

func asBits(b []byte) asn1.BitString { return asn1.BitString{Bytes: b, BitLength: len(b) * 8} }

// deep is a sequence in a sequence, and so on.
func deep(t testing.TB, levels int) []byte {
	t.Helper()
	var b []byte
	for range levels {
		if len(b) > 8<<10 {
			break
		}
		b = seq(t, b)
	}
	return b
}

// FuzzParse looks for panics, and for a request that passes although a second
// reader of the same bytes, crypto/x509, sees more in it than the caller's ID.
func FuzzParse(f *testing.F) {
	f.Add(draft{}.pem(f))
	f.Add(draft{key: rsaKey(), subject: seq(f, rdn(f, "", 2, 5, 4, 10)), attributes: extensionRequest(f, san(f, true, uri(f, own)))}.pem(f))
	f.Add(draft{attributes: extensionRequest(f, san(f, false, uri(f, own), name(f, 2, "pay.shop")))}.pem(f))
	f.Add(draft{attributes: seq(f, der(f, oidChallenge), set(f, der(f, "x")))}.pem(f))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n"))
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
		if len(req.DNSNames)+len(req.IPAddresses)+len(req.EmailAddresses) != 0 || len(req.URIs) > 1 || len(req.Extensions) > 1 {
			t.Errorf("accepted although it asks for %v %v %v %v", req.DNSNames, req.IPAddresses, req.EmailAddresses, req.Extensions)
		}
		if len(req.URIs) == 1 && req.URIs[0].String() != own {
			t.Errorf("accepted although it asks for %v", req.URIs)
		}
		if s := req.Subject.String(); s != "" && s != "O=" {
			t.Errorf("accepted with subject %q", s)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	text := draft{attributes: extensionRequest(b, san(b, true, uri(b, own)))}.pem(b)
	id := parseID(b, own)
	for b.Loop() {
		if _, err := Parse(text, id); err != nil {
			b.Fatal(err)
		}
	}
}
