package files

import (
	"fmt"
	"time"

	"github.com/meshca/meshca/ca"
)

// Error says why a set of files is not used.
type Error struct {
	File   string // the file that is at fault, or the directory
	Reason string
	Do     string // what to do; may be empty
	Err    error  // the cause; may be nil
}

func (e *Error) Error() string {
	text := fmt.Sprintf("CA file %q: %s", e.File, e.Reason)
	if e.Do != "" {
		text += "; " + e.Do
	}
	return text
}

func (e *Error) Unwrap() error { return e.Err }

// ExpiredError says that the authority in the files has ended: nothing can be signed
// with it any more.
type ExpiredError struct {
	File string
	End  time.Time
}

func (e *ExpiredError) Error() string {
	return fmt.Sprintf("CA file %q: its path to the root ended at %s; put a new certificate there, which may be of the same key", e.File, stamp(e.End))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

var (
	_ ca.Upstream = (*Upstream)(nil)
	_ ca.Changer  = (*Upstream)(nil)
	_ ca.Reporter = (*Upstream)(nil)
)
