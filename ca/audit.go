package ca

import (
	"context"
	"time"

	"github.com/meshca/meshca/ca/caller"
)

// Auditor keeps the audit trail. It is called twice around each signature: with
// [Intent] before, and with [Done] or [Failed] after. Record returns when the
// record has been written; what an error withholds is said at [AuditError].
// Implementations are safe for concurrent use and bound the time they take.
type Auditor interface {
	Record(ctx context.Context, e Event) error
}

// Stage says on which side of the signature a record was written.
type Stage string

// The stages. An Intent without a Done or Failed of the same serial number
// means that the process ended in between, or that the second record could not
// be written; in either case the certificate was given to nobody.
const (
	Intent Stage = "intent"
	Done   Stage = "done"
	Failed Stage = "failed"
)

// Kind says what is signed.
type Kind string

// The kinds of what is signed.
const (
	KindSVID         Kind = "svid"         // for a caller
	KindServing      Kind = "serving"      // the CA's own TLS certificate
	KindProof        Kind = "proof"        // a throwaway SVID that never leaves the process
	KindIntermediate Kind = "intermediate" // by the upstream, for this authority
)

// Event is one record of the audit trail.
type Event struct {
	Time      time.Time
	Stage     Stage
	Kind      Kind
	SPIFFEID  string         // the certificate's; empty for a serving certificate
	Names     []string       // a serving certificate's DNS names and addresses
	Caller    *caller.Caller // who asked; nil unless Kind is KindSVID
	Serial    string         // lower-case hex; for KindIntermediate known only when done
	Authority string         // key ID of the signing authority, hex; empty for KindIntermediate
	Key       string         // SHA-256 of the SubjectPublicKeyInfo, hex
	Lifetime  time.Duration  // from the time of issue to NotAfter
	NotAfter  time.Time      // zero for the intent of KindIntermediate
	Err       error          // why, for Failed
}
