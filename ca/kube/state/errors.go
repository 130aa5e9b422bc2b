package state

import (
	"fmt"
	"strings"
	"time"

	"github.com/meshca/meshca/identity"
)

// LostError says that an object is missing that proves itself to have been there.
type LostError struct {
	Namespace string
	Object    string // what is missing, such as "Secret meshca-root-1"
	Proof     string // what tells of it
	// Forget is what to do where the mesh is gone on purpose: only for a proof that
	// outlives the namespace.
	Forget string
}

func (e *LostError) Error() string {
	s := fmt.Sprintf("%s in namespace %q is lost: it is not there, and %s tells of it; bring it back from a backup: meshca restore --namespace %s --file FILE (a new root would not be trusted by any workload, so none is made)",
		e.Object, e.Namespace, e.Proof, e.Namespace)
	if e.Forget != "" {
		s += "; only if that mesh is gone for good, remove what tells of it, and a new root is made: " + e.Forget
	}
	return s
}

// PlantedError says that the first root is not as a CA makes one, so that somebody
// else has put it there.
type PlantedError struct {
	Object string
	Flaws  []string
}

func (e *PlantedError) Error() string {
	return fmt.Sprintf("%s was not made by a CA: %s; whoever made it has its key, so it is not used; delete it and a new one is made, or bring the right one back: meshca restore",
		e.Object, strings.Join(e.Flaws, ", "))
}

// CorruptError says that an object is not what was written.
type CorruptError struct {
	Object string
	Reason string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s is damaged: %s; delete it and bring it back from a backup: meshca restore", e.Object, e.Reason)
}

// ReplacedError says that an object tells of another root than the one that was
// made under its number.
type ReplacedError struct {
	Object     string
	Number     int
	Held, Want string // SHA-256 of the certificates, hex
}

func (e *ReplacedError) Error() string {
	return fmt.Sprintf("%s holds another root than root %d: its certificate's SHA-256 is %.16s…, must be %.16s…; delete it: a replica that runs puts the right one back, and so does meshca restore",
		e.Object, e.Number, e.Held, e.Want)
}

// VersionError says that an object was written by a newer program.
type VersionError struct {
	Object    string
	Have, Can int
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("%s has version %d, and this program reads up to %d; run the newer program that wrote it", e.Object, e.Have, e.Can)
}

// TrustDomainError says that an object is another trust domain's. A domain cannot
// be renamed: every SVID and every policy names it.
type TrustDomainError struct {
	Object string
	Held   string // the object's
	Want   identity.TrustDomain
}

func (e *TrustDomainError) Error() string {
	return fmt.Sprintf("%s is of trust domain %q, the configuration says %q; correct the configuration, or install in another namespace", e.Object, e.Held, e.Want)
}

// RollbackError says that an object is an older one than there has been.
type RollbackError struct {
	Object        string
	What          string // "sequence" or "epoch"
	Have, Highest uint64
}

func (e *RollbackError) Error() string {
	return fmt.Sprintf("%s is an older one: its %s is %d, and the marker %q has seen %d; agents refuse what is older, so restore the newest backup, or an older one as the newest version: meshca restore --as-newest --file FILE",
		e.Object, e.What, e.Have, MarkerName, e.Highest)
}

// EpochError says that the state has moved on since the decision to change it.
type EpochError struct {
	Based, Found uint64 // Found is 0 where it could not be read again
}

func (e *EpochError) Error() string {
	return fmt.Sprintf("changing the shared state: it was judged at epoch %d, and has been written since (epoch %d); another replica was faster", e.Based, e.Found)
}

// StaleError says that the shared state could not be read for too long.
type StaleError struct {
	Age  time.Duration
	Step Step // at which the rotation stood when it was last read
	Err  error
}

func (e *StaleError) Error() string {
	return fmt.Sprintf("the shared state could not be read for %v, while a rotation was at step %q: another issuer may be in force by now; last: %v",
		e.Age.Round(time.Second), e.Step, e.Err)
}

func (e *StaleError) Unwrap() error { return e.Err }
