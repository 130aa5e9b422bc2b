package roots

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"time"
)

// UntrustedError says that a chain ends in a root that not everybody trusts yet.
type UntrustedError struct {
	Root *x509.Certificate
	// Ready is when the root may be used; zero if it is not in the bundle at all.
	Ready time.Time
}

func (e *UntrustedError) Error() string {
	if e.Ready.IsZero() {
		return fmt.Sprintf("the chain ends in root %s, which is not in the mesh's bundle; first show it beside the roots in use, with the issuer as it is, and change the issuer when it is in the bundle", describe(e.Root))
	}
	return fmt.Sprintf("the chain ends in root %s, which has come into the mesh's bundle only now and has not reached everybody; it can be used from %s on", describe(e.Root), stamp(e.Ready))
}

// OrphanError says that a root was left out under which certificates can be alive.
type OrphanError struct {
	Root  *x509.Certificate
	Until time.Time // when the last of them ends
}

func (e *OrphanError) Error() string {
	return fmt.Sprintf("root %s is left out, and certificates under it can be alive until %s; their holders would be cut off: show it beside the others until then", describe(e.Root), stamp(e.Until))
}

// CorruptError says that the record is not what was written.
type CorruptError struct{ Reason string }

func (e *CorruptError) Error() string {
	return "the record of the roots is damaged: " + e.Reason + "; delete it, and a new one is made from the roots that the upstream shows"
}

// describe names a root so that it can be found by other programs.
func describe(c *x509.Certificate) string {
	return fmt.Sprintf("%.256q (SHA-256 %.16x…)", c.Subject.String(), sha256.Sum256(c.Raw))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
