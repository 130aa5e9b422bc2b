package ca

import (
	"fmt"
	"time"
)

// NotReadyError says that nothing can be signed now. It passes by itself, or
// with what Reason names.
type NotReadyError struct {
	Reason string
	Err    error // the cause, nil if there is none beside Reason
}

func (e *NotReadyError) Error() string {
	if e.Err == nil {
		return "the authority cannot sign: " + e.Reason
	}
	return fmt.Sprintf("the authority cannot sign: %s: %v", e.Reason, e.Err)
}

func (e *NotReadyError) Unwrap() error { return e.Err }

// KeyError says that no certificate is made for a public key of this kind.
type KeyError struct {
	Kind   string // what the key is, such as "ECDSA P-224" or "RSA 1024"
	Detail string // what is wrong with it; empty if the kind alone is
}

func (e *KeyError) Error() string {
	s := "public key " + e.Kind + " is not accepted"
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s + "; use ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits with exponent 65537"
}

// LifetimeError says that a certificate would be too short to be of use,
// because its issuer ends. The authority renews its issuer at half of its
// life, so this comes only when the upstream has been away for a long time.
type LifetimeError struct {
	For       string        // SPIFFE ID, or the first name of a serving certificate
	Asked     time.Duration // the lifetime after defaults and limits
	Left      time.Duration // what the issuer has left
	Least     time.Duration // what must be left for this lifetime
	IssuerEnd time.Time
}

func (e *LifetimeError) Error() string {
	return fmt.Sprintf("issuing for %q: lifetime %v does not fit: the issuer ends at %s, in %v, and at least %v must be left; the upstream authority must sign a new intermediate",
		e.For, e.Asked, e.IssuerEnd.UTC().Format(time.RFC3339), e.Left, e.Least)
}

// MismatchError says that an upstream's answer is not what was asked for. The
// answer is thrown away and the current intermediate stays.
type MismatchError struct {
	Field string // what differs, such as "public key" or "path length"
	Want  string
	Got   string
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("the upstream's answer is refused: %s is %.256q, must be %.256q", e.Field, e.Got, e.Want)
}

// AuditError says that a signature could not be recorded. What it was to make,
// or had made, has not left the authority.
type AuditError struct {
	Stage Stage
	Err   error
}

func (e *AuditError) Error() string {
	return fmt.Sprintf("writing the audit record %q: %v; nothing is signed without it", string(e.Stage), e.Err)
}

func (e *AuditError) Unwrap() error { return e.Err }
