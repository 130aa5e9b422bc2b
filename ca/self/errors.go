package self

import (
	"fmt"

	"github.com/meshca/meshca/identity"
)

// NotInitializedError says that no root has ever been made in a directory.
type NotInitializedError struct{ Dir string }

func (e *NotInitializedError) Error() string {
	return fmt.Sprintf("state directory %q holds no root", e.Dir)
}

// ExistsError says that a directory holds a root already. Init never replaces one.
type ExistsError struct{ Dir string }

func (e *ExistsError) Error() string {
	return fmt.Sprintf("state directory %q holds a root already, which is never replaced; use it, or choose another directory", e.Dir)
}

// LostError says that a root was made in a directory and is there no more.
type LostError struct {
	Dir  string
	File string // what is missing
}

func (e *LostError) Error() string {
	return fmt.Sprintf("the root of state directory %q is lost: %q is missing; restore the directory from a backup (a new root would not be trusted by any workload)", e.Dir, e.File)
}

// CorruptError says that a file of the state is not what Init has written.
type CorruptError struct {
	File   string
	Reason string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("state file %q is damaged: %s; restore the directory from a backup", e.File, e.Reason)
}

// VersionError says that the state was written by a newer program.
type VersionError struct {
	File      string
	Have, Can int
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("state file %q has version %d, and this program reads up to %d; run the newer program that wrote it", e.File, e.Have, e.Can)
}

// TrustDomainError says that the state is another trust domain's. A domain
// cannot be renamed: every SVID and every policy names it.
type TrustDomainError struct {
	Dir  string
	Held string // the state's
	Want identity.TrustDomain
}

func (e *TrustDomainError) Error() string {
	return fmt.Sprintf("state directory %q is of trust domain %q, the configuration says %q; correct the configuration, or use another directory", e.Dir, e.Held, e.Want)
}

// PermissionError says that others than the owner could read or change a file.
type PermissionError struct {
	File  string
	Hint  string // what to do, such as a chmod command
	Found string
}

func (e *PermissionError) Error() string {
	return fmt.Sprintf("%q is not for its owner alone (%s); %s", e.File, e.Found, e.Hint)
}
