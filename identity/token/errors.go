package token

import (
	"fmt"
	"strconv"
	"strings"
)

// InvalidError says that a token proves nothing here and never will, or no
// longer: its bearer needs another one.
type InvalidError struct {
	// Reason is one line for the log. What it quotes from the token is quoted
	// and cut; the token itself is never in it.
	Reason string
	// Subject is the token's "sub" if its signature was good, so that a log line
	// can name whose token was refused. It is empty as long as anybody could
	// have written it.
	Subject string
}

func (e *InvalidError) Error() string {
	if e.Subject != "" {
		return "token of " + quote(e.Subject) + ": " + e.Reason
	}
	return "token: " + e.Reason
}

// UnavailableError says that the issuer's keys, or its own word, cannot be had: nothing is
// known about the token, and the same one may be good in a moment.
type UnavailableError struct {
	Issuer string
	Asked  bool // the issuer was to judge itself
	Err    error
}

func (e *UnavailableError) Error() string {
	if e.Asked {
		return fmt.Sprintf("token: issuer %s cannot be asked: %v", quote(e.Issuer), e.Err)
	}
	return fmt.Sprintf("token: keys of issuer %s are out of reach: %v", quote(e.Issuer), e.Err)
}

// Unwrap returns what kept the keys away.
func (e *UnavailableError) Unwrap() error { return e.Err }

func invalidf(format string, args ...any) *InvalidError {
	return &InvalidError{Reason: fmt.Sprintf(format, args...)}
}

// quote makes text of unknown origin fit for a log line.
func quote(s string) string {
	const most = 256
	if len(s) > most {
		return strconv.Quote(strings.ToValidUTF8(s[:most], "")) + "…"
	}
	return strconv.Quote(s)
}

// quoteList is quote for lists, bounded as a whole.
func quoteList(list []string) string {
	var b strings.Builder
	b.WriteByte('[')
	for i, s := range list {
		if i > 0 {
			b.WriteByte(' ')
		}
		if b.Len() > 256 {
			fmt.Fprintf(&b, "and %d more", len(list)-i)
			break
		}
		b.WriteString(quote(s))
	}
	b.WriteByte(']')
	return b.String()
}
