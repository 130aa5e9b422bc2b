package csr

import (
	"encoding/asn1"
	"math/bits"
)

var (
	oidRSA     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1} // RFC 3279 §2.3.1
	oidEC      = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}     // RFC 5480 §2.1.1
	oidEd25519 = asn1.ObjectIdentifier{1, 3, 101, 112}             // RFC 8410 §3

	oidP256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	oidP384 = asn1.ObjectIdentifier{1, 3, 132, 0, 34}
)

const (
	minRSABits = 2048
	maxRSABits = 4096
)

// checkKey judges a SubjectPublicKeyInfo by type and size, from its bytes alone:
// no arithmetic is done on a key that is not acceptable.
func checkKey(spki []byte) error {
	r, err := inside("its public key", spki)
	if err != nil {
		return err
	}
	alg, err := r.sequence()
	if err != nil {
		return err
	}
	key, err := r.primitive(asn1.TagBitString)
	if err != nil {
		return err
	}
	if err := r.end(); err != nil {
		return err
	}
	if len(key) < 2 || key[0] != 0 {
		return fault("its public key is no whole number of bytes")
	}
	key = key[1:]
	params := reader{of: "its public key's algorithm", rest: alg.Bytes}
	oid, err := params.oid()
	if err != nil {
		return err
	}
	switch {
	case oid.Equal(oidRSA):
		return checkRSA(key)
	case oid.Equal(oidEC):
		return checkEC(&params, key)
	case oid.Equal(oidEd25519):
		if err := params.end(); err != nil { // RFC 8410 §3: no parameters
			return err
		}
		return checkEd25519(key)
	}
	return faultf("its key is of type %s; P-256, P-384, Ed25519 and RSA are accepted", oidName(oid))
}

// checkRSA reads an RSAPublicKey (RFC 8017 §A.1.1).
func checkRSA(key []byte) error {
	r, err := inside("its RSA key", key)
	if err != nil {
		return err
	}
	modulus, err := r.primitive(asn1.TagInteger)
	if err != nil {
		return err
	}
	exponent, err := r.primitive(asn1.TagInteger)
	if err != nil {
		return err
	}
	if err := r.end(); err != nil {
		return err
	}
	if len(modulus) == 0 || modulus[0]&0x80 != 0 {
		return fault("its RSA modulus is not positive")
	}
	for len(modulus) > 1 && modulus[0] == 0 {
		modulus = modulus[1:]
	}
	if n := (len(modulus)-1)*8 + bits.Len8(modulus[0]); n < minRSABits || n > maxRSABits {
		return faultf("its RSA key has %d bits; %d to %d are accepted", n, minRSABits, maxRSABits)
	}
	if modulus[len(modulus)-1]&1 == 0 {
		return fault("its RSA modulus is even")
	}
	// 65537 in DER. A huge exponent makes each verification by every peer slow,
	// a tiny one has broken paddings before.
	if string(exponent) != "\x01\x00\x01" {
		return faultf("its RSA exponent is 0x%.16x; only 65537 is accepted", exponent)
	}
	return nil
}

// checkEC wants a named curve and an uncompressed point of that curve's size
// (RFC 5480 §2.1.1, §2.2). That the point lies on the curve is checked by
// crypto/x509, cheaply for these two.
func checkEC(params *reader, point []byte) error {
	curve, err := params.oid()
	if err != nil {
		return err
	}
	if err := params.end(); err != nil {
		return err
	}
	var size int
	switch {
	case curve.Equal(oidP256):
		size = 32
	case curve.Equal(oidP384):
		size = 48
	default:
		return faultf("its key is on curve %s; P-256 and P-384 are accepted", oidName(curve))
	}
	if len(point) != 1+2*size || point[0] != 4 {
		return faultf("its EC point has %d bytes and form %d; %d bytes, uncompressed, are expected", len(point), point[0], 1+2*size)
	}
	return nil
}
