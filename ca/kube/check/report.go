package check

import (
	"errors"
	"fmt"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Status is how a check came out.
type Status string

// The statuses.
const (
	Holds     Status = "holds"
	Attention Status = "attention" // will need attention, and breaks nothing now
	Broken    Status = "broken"
	Unknown   Status = "unknown" // could not be told
)

// Phase is what there is to judge.
type Phase string

// The phases. Part of an installation counts as one.
const (
	Before Phase = "before"
	After  Phase = "after"
)

// Report is all that was found.
type Report struct {
	Version    int      `json:"version"` // of this form
	Namespace  string   `json:"namespace"`
	Phase      Phase    `json:"phase"`
	Kubernetes string   `json:"kubernetes"`
	Checks     []Result `json:"checks"`
	Summary    Summary  `json:"summary"`
}

// Summary counts results.
type Summary struct {
	Holds     int `json:"holds"`
	Attention int `json:"attention"`
	Broken    int `json:"broken"`
	Unknown   int `json:"unknown"`
}

// Result is how one check came out.
type Result struct {
	Code   string `json:"code"`
	Title  string `json:"title"`
	Status Status `json:"status"`
	Found  string `json:"found"`
	// Objects are what it is about, at most 10, and More how many more there are.
	Objects []string `json:"objects,omitempty"`
	More    int      `json:"more,omitempty"`
	Next    string   `json:"next,omitempty"` // what to do
}

// most is how many objects a result names: what is longer is read by nobody.
const most = 10

// about names objects, as many as are read.
func (r Result) about(objects []string) Result {
	r.Objects = objects[:min(len(objects), most)]
	r.More = len(objects) - len(r.Objects)
	return r
}

func holds(format string, args ...any) Result {
	return Result{Status: Holds, Found: fmt.Sprintf(format, args...)}
}

func attention(next, format string, args ...any) Result {
	return Result{Status: Attention, Found: fmt.Sprintf(format, args...), Next: next}
}

func broken(next, format string, args ...any) Result {
	return Result{Status: Broken, Found: fmt.Sprintf(format, args...), Next: next}
}

// unknown is the result where something could not be read.
func unknown(err error) Result {
	next := "try again; if it stays, see whether kubectl gets the same answer"
	if denied(err) {
		next = "ask as somebody who may read it (--context), or have the permission given to you"
	}
	return Result{Status: Unknown, Found: "could not be told: " + plain(err), Next: next}
}

func denied(err error) bool { return apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) }

// plain is an error's text on one line.
func plain(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// UnreachableError says that the API server gave no answer at all.
type UnreachableError struct {
	Host string
	Err  error
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("asking the API server %s for its version: %v", e.Host, e.Err)
}

func (e *UnreachableError) Unwrap() error { return e.Err }

// missing reports whether an object is not there, or has no kind there.
func missing(err error) bool {
	return apierrors.IsNotFound(err) || errors.As(err, new(*noKindError))
}

// noKindError says that the API server does not serve a kind.
type noKindError struct{ kind string }

func (e *noKindError) Error() string { return "the API server does not serve " + e.kind }
