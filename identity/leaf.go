package identity

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strconv"
)

// Object identifiers of the extensions whose raw form is judged here.
var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage       = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidExtKeyUsage    = asn1.ObjectIdentifier{2, 5, 29, 37}
)

// maxSANs bounds the names of one certificate before they are looked at one by
// one; Go's own verifier is quadratic in places (CVE-2025-58187 and its kin).
const maxSANs = 100

// LeafError says which rule of the X509-SVID standard a leaf certificate
// breaks. It is about the document alone, not about who signed it.
type LeafError struct {
	Section string // of X509-SVID.md, such as "§4.3"
	Detail  string // what was found, with the values in question
}

func (e *LeafError) Error() string {
	return fmt.Sprintf("certificate is no X509-SVID (%s): %s", e.Section, e.Detail)
}

func leafErrorf(section, format string, args ...any) error {
	return &LeafError{Section: section, Detail: fmt.Sprintf(format, args...)}
}

// leafID checks everything that X509-SVID demands of a leaf and can be read off
// the certificate alone, and returns the ID that it carries.
//
// The ID is taken from the raw extension, not from x509.Certificate.URIs: a
// url.URL has been parsed and prints differently from the bytes that were
// signed (escapes, empty queries), and identity is equality of bytes.
func leafID(c *x509.Certificate) (ID, error) {
	if c.IsCA {
		return ID{}, leafErrorf("§4.1", "it is a CA certificate (cA=true)")
	}
	if err := checkLeafKeyUsage(c); err != nil {
		return ID{}, err
	}
	uri, err := soleURI(c)
	if err != nil {
		return ID{}, err
	}
	id, err := ParseID(uri)
	if err != nil {
		return ID{}, leafErrorf("§2", "%v", err)
	}
	if id.Path() == "" {
		return ID{}, leafErrorf("§5.2", "%s is a trust domain's own ID; a leaf needs a path", id)
	}
	return id, nil
}

// checkLeafKeyUsage holds X509-SVID §4.3: key usage present and critical,
// digitalSignature set, the two CA bits clear.
func checkLeafKeyUsage(c *x509.Certificate) error {
	ext := extension(c, oidKeyUsage)
	switch {
	case ext == nil:
		return leafErrorf("§4.3", "it has no key usage")
	case !ext.Critical:
		return leafErrorf("§4.3", "its key usage is not critical")
	case c.KeyUsage&x509.KeyUsageCertSign != 0:
		return leafErrorf("§4.3", "its key usage has keyCertSign, which only an authority may have")
	case c.KeyUsage&x509.KeyUsageCRLSign != 0:
		return leafErrorf("§4.3", "its key usage has cRLSign, which only an authority may have")
	case c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return leafErrorf("§4.3", "its key usage lacks digitalSignature")
	}
	return nil
}

// soleURI returns the one URI of the subject alternative name, as signed.
// Other kinds of names may stand beside it (X509-SVID §2), but none may hold
// bytes that print as something else: NUL and control bytes have been used to
// make two readers of one certificate see two names (CVE-2025-66220).
func soleURI(c *x509.Certificate) (string, error) {
	ext := extension(c, oidSubjectAltName)
	if ext == nil {
		return "", leafErrorf("§2", "it has no subject alternative name, so no SPIFFE ID")
	}
	if !ext.Critical && emptyName(c.RawSubject) {
		return "", leafErrorf("§2", "its subject is empty but its subject alternative name is not critical")
	}
	uris, err := sanURIs(ext.Value)
	if err != nil {
		return "", leafErrorf("§2", "%v", err)
	}
	if len(uris) != 1 {
		return "", leafErrorf("§2", "it has %d URI names; exactly one is allowed", len(uris))
	}
	return uris[0], nil
}

// extension returns the certificate's extension of one kind, or nil. There is at
// most one: crypto/x509 parses no certificate that holds two of a kind.
func extension(c *x509.Certificate, id asn1.ObjectIdentifier) *pkix.Extension {
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(id) })
	if i < 0 {
		return nil
	}
	return &c.Extensions[i]
}

// Tags of GeneralName (RFC 5280 §4.2.1.6).
const (
	tagOtherName    = 0
	tagEmail        = 1
	tagDNS          = 2
	tagX400         = 3
	tagDirectory    = 4
	tagEDIParty     = 5
	tagURI          = 6
	tagIP           = 7
	tagRegisteredID = 8
)

// sanURIs walks the raw GeneralNames and returns the URIs among them.
func sanURIs(der []byte) ([]string, error) {
	var names asn1.RawValue
	rest, err := asn1.Unmarshal(der, &names)
	if err != nil || len(rest) != 0 || !names.IsCompound || names.Class != asn1.ClassUniversal || names.Tag != asn1.TagSequence {
		return nil, errors.New("its subject alternative name is not a sequence of names")
	}
	var uris []string
	for n, rest := 0, names.Bytes; len(rest) > 0; n++ {
		if n == maxSANs {
			return nil, fmt.Errorf("it has more than %d names", maxSANs)
		}
		var name asn1.RawValue
		if rest, err = asn1.Unmarshal(rest, &name); err != nil || name.Class != asn1.ClassContextSpecific {
			return nil, fmt.Errorf("name %d of its subject alternative name is malformed", n+1)
		}
		if err := checkName(name); err != nil {
			return nil, fmt.Errorf("name %d of its subject alternative name %w", n+1, err)
		}
		if name.Tag == tagURI {
			uris = append(uris, string(name.Bytes))
		}
	}
	return uris, nil
}

// checkName demands the one encoding that DER allows for each kind of name. A
// URI in BER's constructed form, for one, is a URI to some readers and nothing
// to crypto/x509.
func checkName(name asn1.RawValue) error {
	compound := false
	switch name.Tag {
	case tagEmail, tagDNS, tagURI, tagIP, tagRegisteredID:
	case tagOtherName, tagX400, tagDirectory, tagEDIParty:
		compound = true
	default:
		return fmt.Errorf("is of the unknown kind %d", name.Tag)
	}
	switch {
	case name.IsCompound != compound:
		return errors.New("is malformed")
	case compound:
		return checkNestedText(name.Bytes, 0)
	case name.Tag != tagIP && name.Tag != tagRegisteredID:
		return checkText(name.Bytes)
	}
	return nil
}

// maxNameDepth bounds the nesting inside one name; a directory name needs four.
const maxNameDepth = 10

// checkNestedText holds [checkText] for every string within a structured name:
// the NUL of CVE-2025-66220 stood in an otherName.
func checkNestedText(der []byte, depth int) error {
	if depth == maxNameDepth {
		return errors.New("is nested too deeply")
	}
	for len(der) > 0 {
		var v asn1.RawValue
		var err error
		if der, err = asn1.Unmarshal(der, &v); err != nil {
			return errors.New("is malformed")
		}
		switch {
		case v.IsCompound:
			err = checkNestedText(v.Bytes, depth+1)
		case v.Class == asn1.ClassUniversal && isStringTag(v.Tag):
			err = checkText(v.Bytes)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// isStringTag reports whether a universal tag is one of ASN.1's character
// strings (X.680 §8.6), the forgotten ones included.
func isStringTag(tag int) bool {
	return tag == asn1.TagUTF8String || asn1.TagNumericString <= tag && tag <= asn1.TagIA5String ||
		25 <= tag && tag <= asn1.TagBMPString
}

func checkText(b []byte) error {
	if bytes.ContainsFunc(b, func(r rune) bool { return r < 0x20 || r > 0x7e }) {
		return fmt.Errorf("holds bytes that are not printable ASCII: %s", quote(string(b)))
	}
	return nil
}

// emptyName reports whether a DER-encoded Name has no part.
func emptyName(raw []byte) bool { return bytes.Equal(raw, []byte{0x30, 0x00}) }

// maxQuoted bounds what an error repeats of somebody else's text.
const maxQuoted = 256

// quote makes foreign text fit to be logged: quoted, and cut at [maxQuoted] bytes.
func quote(s string) string {
	if len(s) > maxQuoted {
		return strconv.Quote(s[:maxQuoted]) + "…"
	}
	return strconv.Quote(s)
}
