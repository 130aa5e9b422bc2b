package identity

import (
	"errors"
	"fmt"
)

// SVIDSource yields the X509-SVID to present now. Implementations are safe for
// concurrent use, answer at once from memory, and return an error that says
// why there is none yet.
type SVIDSource interface {
	SVID() (*SVID, error)
}

// BundleSource yields the trust bundle of one trust domain, or
// [*NoBundleError] when that domain is not trusted. Implementations are safe
// for concurrent use and answer at once from memory. They never return the
// bundle of another domain than the one asked for: domains are not pooled
// (SPIFFE-Federation §5.3).
type BundleSource interface {
	Bundle(TrustDomain) (*Bundle, error)
}

// NoBundleError says that a trust domain is not trusted here.
type NoBundleError struct {
	TrustDomain TrustDomain   // the one asked for
	Held        []TrustDomain // those that are trusted
}

func (e *NoBundleError) Error() string {
	return fmt.Sprintf("no trust bundle for trust domain %q; held: %q", e.TrustDomain, e.Held)
}

// Bundle makes a single bundle a [BundleSource] that trusts its own domain only.
func (b *Bundle) Bundle(td TrustDomain) (*Bundle, error) {
	if b == nil {
		return nil, &NoBundleError{TrustDomain: td}
	}
	if td != b.td {
		return nil, &NoBundleError{TrustDomain: td, Held: []TrustDomain{b.td}}
	}
	return b, nil
}

// SVID makes a single SVID an [SVIDSource].
func (s *SVID) SVID() (*SVID, error) {
	if s == nil {
		return nil, errors.New("no SVID yet")
	}
	return s, nil
}
