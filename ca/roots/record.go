package roots

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshca/meshca/identity"
)

// Store is where the record is. It knows nothing of what stands in it.
type Store interface {
	// Load returns the record, and the version of it that Save wants; an empty
	// version says that there is none.
	Load(ctx context.Context) (data []byte, version string, err error)
	// Save puts data in the place of that version. It returns an error that wraps
	// [ErrConflict], and writes nothing, if there is another by now. Any other error
	// may come after it was written.
	Save(ctx context.Context, data []byte, version string) error
}

// ErrConflict says that somebody else has changed the record.
var ErrConflict = errors.New("the record was changed by another replica")

// recordVersion is the version that this program writes, and the highest it reads.
const recordVersion = 1

// maxRecord bounds what is parsed: as many roots as a bundle may have.
const maxRecord = 1 << 20

// record is what is kept.
type record struct {
	Version     int     `json:"version"`
	TrustDomain string  `json:"trust_domain"`
	Sequence    uint64  `json:"sequence"`
	Roots       []entry `json:"roots"` // in the bundle's order
}

// entry is one root.
type entry struct {
	Certificate string `json:"certificate"` // PEM
	// Added is when it came into a bundle that others were in already; zero for the
	// roots of the first bundle.
	Added time.Time `json:"added,omitzero"`
	// Signed is when certificates under it were last being issued; zero if never.
	Signed time.Time `json:"signed,omitzero"`
}

// snapshot is a record with its roots parsed. It is immutable.
type snapshot struct {
	sequence uint64
	roots    []root
	bundle   *identity.Bundle
}

type root struct {
	cert          *x509.Certificate
	added, signed time.Time
}

// newSnapshot makes the bundle of roots.
func newSnapshot(td identity.TrustDomain, sequence uint64, roots []root) (*snapshot, error) {
	s := &snapshot{sequence: sequence, roots: roots}
	b, err := identity.NewBundle(td, identity.BundleConfig{Sequence: sequence, Authorities: s.certs()})
	if err != nil {
		return nil, err
	}
	s.bundle = b
	return s, nil
}

func (s *snapshot) certs() []*x509.Certificate {
	certs := make([]*x509.Certificate, 0, len(s.roots))
	for _, r := range s.roots {
		certs = append(certs, r.cert)
	}
	return certs
}

// find returns the place of a root, -1 if it is not there.
func (s *snapshot) find(c *x509.Certificate) int {
	return slices.IndexFunc(s.roots, func(r root) bool { return r.cert.Equal(c) })
}

// sameRoots reports whether both have the same roots in the same order.
func (s *snapshot) sameRoots(o *snapshot) bool {
	return slices.EqualFunc(s.certs(), o.certs(), (*x509.Certificate).Equal)
}

// encode returns the only form in which a record is written, and read.
func (s *snapshot) encode() []byte {
	r := record{Version: recordVersion, TrustDomain: s.bundle.TrustDomain().String(), Sequence: s.sequence}
	for _, e := range s.roots {
		r.Roots = append(r.Roots, entry{Certificate: string(identity.EncodePEM(e.cert)), Added: e.added, Signed: e.signed})
	}
	// Numbers, strings and times of this century always have a form.
	data, _ := json.MarshalIndent(r, "", "  ")
	return append(data, '\n')
}

// parse reads what encode wrote and nothing else.
func parse(td identity.TrustDomain, data []byte) (*snapshot, error) {
	if len(data) > maxRecord {
		return nil, &CorruptError{Reason: fmt.Sprintf("it has more than %d bytes", maxRecord)}
	}
	// Version and domain first: a newer form may look quite different.
	var head struct {
		Version     int    `json:"version"`
		TrustDomain string `json:"trust_domain"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, &CorruptError{Reason: err.Error()}
	}
	if head.Version < 1 || head.TrustDomain == "" {
		return nil, &CorruptError{Reason: "it does not say which version it has and which trust domain it is of"}
	}
	if head.Version > recordVersion {
		return nil, fmt.Errorf("the record of the roots has version %d, and this program reads up to %d; run the newer program that wrote it", head.Version, recordVersion)
	}
	if head.TrustDomain != td.String() {
		return nil, fmt.Errorf("the record of the roots is of trust domain %.128q, the configuration says %q; a trust domain cannot be renamed", head.TrustDomain, td)
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, &CorruptError{Reason: err.Error()}
	}
	roots := make([]root, 0, len(r.Roots))
	for i, e := range r.Roots {
		certs, err := identity.ParsePEM([]byte(e.Certificate))
		if err != nil || len(certs) != 1 {
			return nil, &CorruptError{Reason: fmt.Sprintf("root %d of %d is not one certificate", i+1, len(r.Roots))}
		}
		roots = append(roots, root{certs[0], e.Added, e.Signed})
	}
	s, err := newSnapshot(td, r.Sequence, roots)
	switch {
	case err != nil:
		return nil, &CorruptError{Reason: err.Error()}
	case len(roots) == 0 || r.Sequence == 0:
		return nil, &CorruptError{Reason: "it has no root, or no sequence"}
	case !bytes.Equal(s.encode(), data):
		return nil, &CorruptError{Reason: "it is not in the form in which it was written"}
	}
	return s, nil
}

// ReadBundle returns the bundle of a record, for who only looks. Errors are
// [*CorruptError], or say that the record is a newer program's.
func ReadBundle(data []byte) (*identity.Bundle, error) {
	var head struct {
		TrustDomain string `json:"trust_domain"`
	}
	if err := json.Unmarshal(data[:min(len(data), maxRecord)], &head); err != nil {
		return nil, &CorruptError{Reason: err.Error()}
	}
	td, err := identity.ParseTrustDomain(head.TrustDomain)
	if err != nil {
		return nil, &CorruptError{Reason: err.Error()}
	}
	s, err := parse(td, data)
	if err != nil {
		return nil, err
	}
	return s.bundle, nil
}
