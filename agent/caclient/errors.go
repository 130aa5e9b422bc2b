package caclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Attempt is one address and why it did not help.
type Attempt struct {
	Address string
	Err     error
}

// UnreachableError says that no CA gave an answer that could be used. The
// fault may pass: asking again later makes sense.
type UnreachableError struct {
	Doing    string    // what was asked for, with %s in the place of the address
	Attempts []Attempt // in the order in which they were made; at least one
}

// First describes the first attempt, such as
// "asking 10.96.0.7:15012 for a certificate: no answer in 5 s".
func (e *UnreachableError) First() string {
	a := e.Attempts[0]
	return fmt.Sprintf(e.Doing, a.Address) + ": " + a.Err.Error()
}

func (e *UnreachableError) Error() string {
	if len(e.Attempts) == 1 {
		return e.First()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s (tried %d CAs", e.First(), len(e.Attempts))
	for _, a := range e.Attempts[1:] {
		fmt.Fprintf(&b, "; %s: %v", a.Address, a.Err)
	}
	b.WriteByte(')')
	return b.String()
}

// Unwrap returns the errors of all attempts.
func (e *UnreachableError) Unwrap() []error {
	errs := make([]error, len(e.Attempts))
	for i, a := range e.Attempts {
		errs[i] = a.Err
	}
	return errs
}

// RefusedError is a CA's answer that asking another CA would not change.
type RefusedError struct {
	Doing   string // as in [UnreachableError]
	Address string
	Code    codes.Code // Unauthenticated, PermissionDenied, InvalidArgument or ResourceExhausted
	Message string     // the CA's words, at most 256 bytes; quote it
	// RetryAfter is when a CA that has too much to do wants to be asked again, counted
	// from its answer; zero if it did not say. It is a stranger's number: bound it.
	RetryAfter time.Duration
	// Token says what stands in the token that was refused, for the log; empty
	// where that is not the question. It holds no part of the token that could
	// be used.
	Token string
}

// Definite reports whether the CA knows the caller, or the request, and will
// not have it: the same request need not be made again.
func (e *RefusedError) Definite() bool {
	return e.Code == codes.PermissionDenied || e.Code == codes.InvalidArgument
}

func (e *RefusedError) Error() string {
	s := fmt.Sprintf(e.Doing, e.Address) + fmt.Sprintf(": refused (%v): %q", e.Code, e.Message)
	if e.Token != "" {
		s += "; " + e.Token
	}
	if strings.Contains(e.Message, "(ref ") {
		s += "; the CA's log has the reason under this ref"
	}
	return s
}

// NoAnswerError says that an address did not answer in time.
type NoAnswerError struct {
	After time.Duration
	Stage string // what was waited for, such as "TLS handshake"; may be empty
}

func (e *NoAnswerError) Error() string {
	s := "no answer in " + seconds(e.After)
	if e.Stage != "" {
		s = e.Stage + ": " + s
	}
	return s
}

// Timeout reports true; the error is a timeout.
func (e *NoAnswerError) Timeout() bool { return true }

// AnchorError says that the trust anchor file cannot be used. No CA is asked
// for anything without one.
type AnchorError struct {
	File string
	Err  error
}

func (e *AnchorError) Error() string {
	return fmt.Sprintf("trust anchor file %q: %v", e.File, e.Err)
}

func (e *AnchorError) Unwrap() error { return e.Err }

// TokenError says that there is no token to show.
type TokenError struct{ Err error }

func (e *TokenError) Error() string { return e.Err.Error() }

func (e *TokenError) Unwrap() error { return e.Err }

// AnswerError says that a CA answered with something that cannot be used.
type AnswerError struct{ Err error }

func (e *AnswerError) Error() string { return "its answer is of no use: " + e.Err.Error() }

func (e *AnswerError) Unwrap() error { return e.Err }

var (
	errClosed = errors.New("the CA client has been closed")
	errBroken = errors.New("the connection broke")

	// errUnavailable marks the gRPC code of that name.
	errUnavailable = errors.New("unavailable")
)

// brokenError marks an error on a connection that is there no more.
type brokenError struct{ error }

func (e brokenError) Unwrap() []error { return []error{e.error, errBroken} }

// unavailableError marks the gRPC code of that name.
type unavailableError struct{ error }

func (e unavailableError) Is(target error) bool { return target == errUnavailable }

// stageError remembers what was waited for.
type stageError struct {
	stage string
	err   error
}

func staged(stage string, err error) error { return &stageError{stage, err} }

func (e *stageError) Error() string { return e.stage + ": " + e.err.Error() }

func (e *stageError) Unwrap() error { return e.err }

func stageOf(err error) string {
	var s *stageError
	if errors.As(err, &s) {
		return s.stage
	}
	return ""
}

// isTimeout reports whether time ran out, whoever noticed it first: a context,
// or the deadline that package net made of it.
func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// withoutAddress drops the "dial tcp 10.0.0.1:15012" that net puts before its
// errors: the address stands in the sentence already.
func withoutAddress(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		return op.Err
	}
	return err
}

// callError judges the error of a call: nil, an errStop with a [*RefusedError],
// or an error after which the next address is tried.
func (c *Client) callError(doing string, l *link, err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	switch s.Code() {
	case codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument, codes.ResourceExhausted:
		return errStop{&RefusedError{
			Doing: doing, Address: c.conf.Addresses[l.n], Code: s.Code(), Message: cut(s.Message()), RetryAfter: retryAfter(s),
		}}
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	}
	text := fmt.Errorf("%v: %q", s.Code(), cut(s.Message()))
	if s.Code() == codes.Unavailable {
		return unavailableError{text}
	}
	return text
}

// retryAfter is what a CA's answer says about coming back; zero if nothing.
func retryAfter(s *status.Status) time.Duration {
	if s.Code() != codes.ResourceExhausted {
		return 0
	}
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok && info.GetRetryDelay().IsValid() {
			return max(0, info.GetRetryDelay().AsDuration())
		}
	}
	return 0
}

// foreignError is an error in whose text there may be words of a server that
// nobody has verified, such as the names in its certificate: they end up in logs
// and in /readyz, and a certificate message may hold 256 KiB of them.
type foreignError struct {
	err    error
	always bool // quote the text even where it looks harmless
}

func (e *foreignError) Error() string {
	text := e.err.Error()
	harmless := !strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' })
	if short := cut(text); short != text {
		return fmt.Sprintf("%q…", short)
	}
	if harmless && !e.always {
		return text
	}
	return strconv.Quote(text)
}

func (e *foreignError) Unwrap() error { return e.err }

// cut bounds text from the other side.
func cut(s string) string {
	const longest = 256
	if len(s) > longest {
		return s[:longest]
	}
	return s
}

func seconds(d time.Duration) string {
	return strconv.FormatFloat(d.Seconds(), 'g', 3, 64) + " s"
}
