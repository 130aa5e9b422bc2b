package csr

import (
	"encoding/asn1"
	"slices"

	"github.com/meshca/meshca/identity"
)

var (
	oidOrganization     = asn1.ObjectIdentifier{2, 5, 4, 10}
	oidExtensionRequest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14} // RFC 2985 §5.4.2
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// tagURI is GeneralName's tag for a URI (RFC 5280 §4.2.1.6).
const tagURI = 6

// nameKinds are the other tags of GeneralName.
var nameKinds = [9]string{"otherName", "e-mail address", "DNS name", "X.400 address", "directory name", "EDI party name", "URI", "IP address", "registered ID"}

// stringTags are the types that an organization's name can have (RFC 5280 §4.1.2.4,
// DirectoryString): UTF8String, PrintableString, TeletexString, UniversalString and BMPString.
var stringTags = []int{asn1.TagUTF8String, asn1.TagPrintableString, asn1.TagT61String, 28, asn1.TagBMPString}

// checkSubject accepts the empty Name, and the one that pilot-agent sends: a
// single organization of no characters.
func checkSubject(contents []byte) error {
	if len(contents) == 0 {
		return nil
	}
	names := reader{of: "its subject", rest: contents}
	rdn, err := names.next(asn1.ClassUniversal, asn1.TagSet, true)
	if err != nil {
		return err
	}
	attr := reader{of: "its subject", rest: rdn.Bytes}
	pair, err := attr.sequence()
	if err != nil {
		return err
	}
	value := reader{of: "its subject", rest: pair.Bytes}
	oid, err := value.oid()
	if err != nil {
		return err
	}
	var text asn1.RawValue
	rest, err := asn1.Unmarshal(value.rest, &text)
	if err != nil || len(rest) != 0 || text.Class != asn1.ClassUniversal || text.IsCompound || !slices.Contains(stringTags, text.Tag) {
		return fault("its subject is malformed")
	}
	if !oid.Equal(oidOrganization) {
		return faultf("its subject has a %s, %.256q; leave the subject empty, the CA decides the name", oidName(oid), text.Bytes)
	}
	if len(text.Bytes) != 0 {
		return faultf("its subject asks for organization %.256q; leave the subject empty", text.Bytes)
	}
	if len(attr.rest) != 0 || len(names.rest) != 0 {
		return fault("its subject has more than one empty organization; leave the subject empty")
	}
	return nil
}

// checkAttributes accepts none, or one extension request that asks for the
// caller's own ID.
func checkAttributes(contents []byte, caller identity.ID) error {
	if len(contents) == 0 {
		return nil
	}
	attrs := reader{of: "its attributes", rest: contents}
	attr, err := attrs.sequence()
	if err != nil {
		return err
	}
	r := reader{of: "its attributes", rest: attr.Bytes}
	oid, err := r.oid()
	if err != nil {
		return err
	}
	if !oid.Equal(oidExtensionRequest) {
		return faultf("it carries the attribute %s; remove it", oidName(oid))
	}
	values, err := r.next(asn1.ClassUniversal, asn1.TagSet, true)
	if err != nil {
		return err
	}
	if err := r.end(); err != nil {
		return err
	}
	if len(attrs.rest) != 0 {
		return nextAttribute(&attrs)
	}
	exts, err := inside("its extension request", values.Bytes)
	if err != nil {
		return err
	}
	return checkExtensions(exts, caller)
}

// nextAttribute names the attribute that follows the extension request.
func nextAttribute(attrs *reader) error {
	attr, err := attrs.sequence()
	if err != nil {
		return err
	}
	r := reader{of: "its attributes", rest: attr.Bytes}
	oid, err := r.oid()
	if err != nil {
		return err
	}
	return faultf("it carries a second attribute, %s; remove it", oidName(oid))
}

// checkExtensions walks the extensions asked for, at most one of which can be
// right (RFC 5280 §4.1.2.9).
func checkExtensions(exts *reader, caller identity.ID) error {
	for n := 0; len(exts.rest) > 0; n++ {
		ext, err := exts.sequence()
		if err != nil {
			return err
		}
		r := reader{of: exts.of, rest: ext.Bytes}
		oid, err := r.oid()
		if err != nil {
			return err
		}
		if !oid.Equal(oidSubjectAltName) {
			return faultf("it asks for the extension %s; SVIDs carry only the attested SPIFFE ID, remove it", oidName(oid))
		}
		if n > 0 {
			return fault("it asks for a second subjectAltName")
		}
		value, err := extensionValue(&r)
		if err != nil {
			return err
		}
		if err := checkSAN(value, caller); err != nil {
			return err
		}
	}
	return nil
}

// extensionValue reads what follows an extension's OID. Whether it is marked
// critical makes no difference: it is not copied.
func extensionValue(r *reader) ([]byte, error) {
	if len(r.rest) > 0 && r.rest[0] == asn1.TagBoolean {
		if _, err := r.primitive(asn1.TagBoolean); err != nil {
			return nil, err
		}
	}
	value, err := r.primitive(asn1.TagOctetString)
	if err != nil {
		return nil, err
	}
	return value, r.end()
}

// checkSAN accepts exactly one name: the caller's own ID, byte for byte.
func checkSAN(der []byte, caller identity.ID) error {
	names, err := inside("its subjectAltName", der)
	if err != nil {
		return err
	}
	count := 0
	for ; len(names.rest) > 0; count++ {
		var name asn1.RawValue
		rest, err := asn1.Unmarshal(names.rest, &name)
		// A URI is a string: one made of parts holds its own tags and lengths, and
		// another reader would see another name, or none.
		if err != nil || name.Class != asn1.ClassContextSpecific || name.Tag >= len(nameKinds) || name.Tag == tagURI && name.IsCompound {
			return faultf("name %d of its subjectAltName is malformed", count+1)
		}
		names.rest = rest
		switch {
		case name.Tag != tagURI:
			return faultf("it asks for the %s %.256q; SVIDs carry only the attested SPIFFE ID, remove it", nameKinds[name.Tag], name.Bytes)
		case string(name.Bytes) != caller.String():
			return faultf("it asks for the identity %.256q, which is not the caller's", name.Bytes)
		case count > 0:
			return fault("it asks for the caller's identity more than once")
		}
	}
	if count == 0 {
		return fault("its subjectAltName is empty; ask for the caller's own SPIFFE ID or for none")
	}
	return nil
}
