package csr

import (
	"encoding/asn1"
	"fmt"
)

// request is a CertificationRequest taken apart (RFC 2986 §4), each part in its
// raw encoding.
type request struct {
	subject    []byte // contents of the Name
	spki       []byte // SubjectPublicKeyInfo, header included
	attributes []byte // contents of the [0] SET
}

// reader walks the elements of one level of DER. It looks at no level below, so
// depth costs it nothing.
type reader struct {
	of   string // what is being read, for the error
	rest []byte
}

// next returns the next element, which must be of the class, tag and form
// given.
func (r *reader) next(class, tag int, compound bool) (asn1.RawValue, error) {
	var v asn1.RawValue
	rest, err := asn1.Unmarshal(r.rest, &v)
	if err != nil {
		return v, faultf("%s is malformed: %.256q", r.of, err.Error())
	}
	if v.Class != class || v.Tag != tag || v.IsCompound != compound {
		return v, faultf("%s is malformed: found tag %d of class %d where tag %d of class %d belongs", r.of, v.Tag, v.Class, tag, class)
	}
	r.rest = rest
	return v, nil
}

func (r *reader) sequence() (asn1.RawValue, error) {
	return r.next(asn1.ClassUniversal, asn1.TagSequence, true)
}

// primitive reads an element of a universal type that has no inner elements.
func (r *reader) primitive(tag int) ([]byte, error) {
	v, err := r.next(asn1.ClassUniversal, tag, false)
	return v.Bytes, err
}

func (r *reader) oid() (asn1.ObjectIdentifier, error) {
	v, err := r.next(asn1.ClassUniversal, asn1.TagOID, false)
	if err != nil {
		return nil, err
	}
	var oid asn1.ObjectIdentifier
	if _, err := asn1.Unmarshal(v.FullBytes, &oid); err != nil {
		return nil, faultf("%s is malformed: %.256q", r.of, err.Error())
	}
	return oid, nil
}

// end makes sure that nothing follows.
func (r *reader) end() error {
	if len(r.rest) != 0 {
		return faultf("there are %d bytes too many at the end of %s", len(r.rest), r.of)
	}
	return nil
}

// inside opens the element that encloses the whole of der.
func inside(of string, der []byte) (*reader, error) {
	outer := reader{of: of, rest: der}
	v, err := outer.sequence()
	if err != nil {
		return nil, err
	}
	if err := outer.end(); err != nil {
		return nil, err
	}
	return &reader{of: of, rest: v.Bytes}, nil
}

// split takes a CertificationRequest apart. The signature and its algorithm are
// left to crypto/x509, which reads the same bytes by the same rules.
func split(der []byte) (*request, error) {
	outer, err := inside("the request", der)
	if err != nil {
		return nil, err
	}
	info, err := outer.sequence()
	if err != nil {
		return nil, err
	}
	if _, err := outer.sequence(); err != nil { // signatureAlgorithm
		return nil, err
	}
	if _, err := outer.primitive(asn1.TagBitString); err != nil { // signature
		return nil, err
	}
	if err := outer.end(); err != nil {
		return nil, err
	}

	body := reader{of: "the request's body", rest: info.Bytes}
	version, err := body.primitive(asn1.TagInteger)
	if err != nil {
		return nil, err
	}
	if len(version) != 1 || version[0] != 0 {
		return nil, faultf("its version is %.16x; only 0 is defined", version)
	}
	subject, err := body.sequence()
	if err != nil {
		return nil, err
	}
	spki, err := body.sequence()
	if err != nil {
		return nil, err
	}
	attributes, err := body.next(asn1.ClassContextSpecific, 0, true)
	if err != nil {
		return nil, err
	}
	if err := body.end(); err != nil {
		return nil, err
	}
	return &request{subject: subject.Bytes, spki: spki.FullBytes, attributes: attributes.Bytes}, nil
}

// oidName shows an object identifier with the name that people know it by.
func oidName(oid asn1.ObjectIdentifier) string {
	if name, ok := oidNames[oid.String()]; ok {
		return fmt.Sprintf("%s (%s)", name, oid)
	}
	return fmt.Sprintf("%.256s", oid.String())
}

// oidNames holds what turns up in CSRs and is refused; knowing the name spares
// the reader of the log a search.
var oidNames = map[string]string{
	"1.2.840.10040.4.1":       "DSA",
	"1.2.840.10045.2.1":       "EC",
	"1.2.840.113549.1.1.1":    "RSA",
	"1.2.840.113549.1.1.10":   "RSASSA-PSS",
	"1.2.840.113549.1.9.1":    "emailAddress",
	"1.2.840.113549.1.9.7":    "challengePassword",
	"1.2.840.113549.1.9.14":   "extensionRequest",
	"1.3.101.110":             "X25519",
	"1.3.101.111":             "X448",
	"1.3.101.113":             "Ed448",
	"1.3.132.0.33":            "P-224",
	"1.3.132.0.35":            "P-521",
	"1.3.132.0.10":            "secp256k1",
	"1.3.6.1.4.1.11129.2.4.2": "signed certificate timestamps",
	"2.5.4.3":                 "commonName",
	"2.5.4.5":                 "serialNumber",
	"2.5.4.6":                 "country",
	"2.5.4.10":                "organization",
	"2.5.4.11":                "organizationalUnit",
	"2.5.29.14":               "subjectKeyIdentifier",
	"2.5.29.15":               "keyUsage",
	"2.5.29.17":               "subjectAltName",
	"2.5.29.19":               "basicConstraints",
	"2.5.29.30":               "nameConstraints",
	"2.5.29.32":               "certificatePolicies",
	"2.5.29.37":               "extendedKeyUsage",
}
