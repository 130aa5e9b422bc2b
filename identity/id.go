package identity

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of SPIFFE-ID §2.3: implementations must accept IDs of up to 2048
// bytes and should not make longer ones; trust domain names end at 255 bytes.
// go-spiffe enforces neither, and an unbounded ID ends up in logs, in metrics
// and in certificates.
const (
	MaxIDLength          = 2048
	MaxTrustDomainLength = 255
)

// TrustDomain is the name of a trust domain, such as "cluster.local". The zero
// value is no trust domain and equals no parsed one. Values compare with ==.
type TrustDomain struct {
	td spiffeid.TrustDomain
}

// ParseTrustDomain reads a bare trust domain name: lower-case letters, digits,
// dots, dashes and underscores, at most [MaxTrustDomainLength] bytes (SPIFFE-ID
// §2.1). Unlike go-spiffe it takes no full ID in its place: a setting that
// holds "spiffe://x/ns/y" is a mistake to report, not to repair. Nor does it
// take names such as "a..b" or "a.", which the standard's alphabet allows and
// crypto/x509 refuses to read in a certificate.
func ParseTrustDomain(name string) (TrustDomain, error) {
	if len(name) > MaxTrustDomainLength {
		return TrustDomain{}, fmt.Errorf("trust domain %s has %d bytes; at most %d are allowed", quote(name), len(name), MaxTrustDomainLength)
	}
	if strings.ContainsAny(name, ":/") {
		return TrustDomain{}, fmt.Errorf("trust domain %q: give the bare name, without scheme or path", name)
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return TrustDomain{}, fmt.Errorf("trust domain %q: %w", name, err)
	}
	if slices.Contains(strings.Split(name, "."), "") {
		return TrustDomain{}, fmt.Errorf("trust domain %q has an empty part between dots; no certificate for it could be read", name)
	}
	return TrustDomain{td}, nil
}

// String returns the bare name.
func (t TrustDomain) String() string { return t.td.Name() }

// IsZero reports whether t is the zero value, which names no trust domain.
func (t TrustDomain) IsZero() bool { return t.td.IsZero() }

// ID returns the SPIFFE ID of the trust domain itself, which has no path. It is
// the identity of the domain's authority (SPIFFE-ID §2.3) and never a
// workload's.
func (t TrustDomain) ID() ID { return ID{t.td.ID()} }

// SPIFFE returns the same trust domain in go-spiffe's type.
func (t TrustDomain) SPIFFE() spiffeid.TrustDomain { return t.td }

// ID is a SPIFFE ID. The zero value is no ID and equals no parsed one. Values
// compare with ==, which is the byte-for-byte comparison that identity needs.
type ID struct {
	id spiffeid.ID
}

// ParseID reads a SPIFFE ID by SPIFFE-ID §2, with or without a path.
//
// §2.1 wants lower-case trust domains while §2.4 compares them without regard
// to case. We read it the strict way, as go-spiffe does: upper case in the
// scheme or the trust domain is refused, so that equality stays equality of
// bytes.
func ParseID(s string) (ID, error) {
	if len(s) > MaxIDLength {
		return ID{}, fmt.Errorf("SPIFFE ID %s has %d bytes; at most %d are allowed", quote(s), len(s), MaxIDLength)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return ID{}, fmt.Errorf("SPIFFE ID %s: %w", quote(s), err)
	}
	if n := len(id.TrustDomain().Name()); n > MaxTrustDomainLength {
		return ID{}, fmt.Errorf("SPIFFE ID %s: its trust domain has %d bytes; at most %d are allowed", quote(s), n, MaxTrustDomainLength)
	}
	return ID{id}, nil
}

// WorkloadID returns spiffe://<td>/ns/<namespace>/sa/<serviceAccount>.
//
// Namespace must be a DNS label and serviceAccount a DNS subdomain, as the API
// server requires of both. They are checked here, not escaped or cleaned:
// nothing that could change the shape of the path ever reaches it.
func WorkloadID(td TrustDomain, namespace, serviceAccount string) (ID, error) {
	if td.IsZero() {
		return ID{}, errors.New("workload ID without a trust domain")
	}
	if !isDNSLabel(namespace) {
		return ID{}, fmt.Errorf("namespace %s is not a DNS label", quote(namespace))
	}
	if !isDNSSubdomain(serviceAccount) {
		return ID{}, fmt.Errorf("service account %s is not a DNS subdomain", quote(serviceAccount))
	}
	id, err := spiffeid.FromSegments(td.td, "ns", namespace, "sa", serviceAccount)
	if err != nil {
		return ID{}, fmt.Errorf("workload ID for %s/%s: %w", namespace, serviceAccount, err)
	}
	return ID{id}, nil
}

// Workload takes apart an ID of the form that [WorkloadID] makes; ok is false
// for any other.
func (i ID) Workload() (namespace, serviceAccount string, ok bool) {
	rest, found := strings.CutPrefix(i.id.Path(), "/ns/")
	if !found {
		return "", "", false
	}
	namespace, serviceAccount, found = strings.Cut(rest, "/sa/")
	if !found || !isDNSLabel(namespace) || !isDNSSubdomain(serviceAccount) {
		return "", "", false
	}
	return namespace, serviceAccount, true
}

// String returns the ID as a URI.
func (i ID) String() string { return i.id.String() }

// TrustDomain returns the ID's trust domain.
func (i ID) TrustDomain() TrustDomain { return TrustDomain{i.id.TrustDomain()} }

// Path returns the part after the trust domain, with its leading slash; empty
// for the ID of a trust domain itself.
func (i ID) Path() string { return i.id.Path() }

// IsZero reports whether i is the zero value, which identifies nobody.
func (i ID) IsZero() bool { return i.id.IsZero() }

// SPIFFE returns the same ID in go-spiffe's type.
func (i ID) SPIFFE() spiffeid.ID { return i.id }

// isDNSLabel is RFC 1123's label as Kubernetes reads it.
func isDNSLabel(s string) bool {
	if len(s) == 0 || len(s) > 63 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		alnum := 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
		if !alnum && (c != '-' || i == 0 || i == len(s)-1) {
			return false
		}
	}
	return true
}

// isDNSSubdomain is a dotted series of labels, 253 bytes at most. Kubernetes
// bounds the whole and not each label, so neither do we.
func isDNSSubdomain(s string) bool {
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	alnum := func(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || !alnum(label[0]) || !alnum(label[len(label)-1]) {
			return false
		}
		for i := range len(label) {
			if !alnum(label[i]) && label[i] != '-' {
				return false
			}
		}
	}
	return true
}
