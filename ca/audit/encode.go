package audit

import (
	"encoding/json"
	"strconv"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
)

// encode makes one line: a JSON object whose members are always in this order. Those
// that are empty are left out, all but the first few. Times are UTC with fractions of
// seconds, the lifetime is in seconds. It is written by hand, since two of them are in
// the way of each certificate and reflection takes four times as long; a test compares
// it with encoding/json.
//
// JSON is the quoting: no text from outside can end the line or the string that it
// stands in.
func encode(e *ca.Event) []byte {
	b := make([]byte, 0, 1024)
	b = append(b, `{"time":"`...)
	b = e.Time.UTC().AppendFormat(b, time.RFC3339Nano)
	b = appendText(append(b, `","stage":`...), string(e.Stage))
	b = appendText(append(b, `,"kind":`...), string(e.Kind))
	b = appendMember(b, "spiffe_id", e.SPIFFEID)
	if len(e.Names) > 0 {
		b = append(b, `,"names":[`...)
		for i, n := range e.Names {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendText(b, cut(n))
		}
		b = append(b, ']')
	}
	if e.Caller != nil {
		b = appendCaller(b, e.Caller, e.SPIFFEID)
	}
	b = appendMember(b, "serial", e.Serial)
	b = appendMember(b, "authority", e.Authority)
	b = appendText(append(b, `,"key_sha256":`...), e.Key)
	b = strconv.AppendFloat(append(b, `,"lifetime_seconds":`...), e.Lifetime.Seconds(), 'f', -1, 64)
	if !e.NotAfter.IsZero() {
		b = e.NotAfter.UTC().AppendFormat(append(b, `,"not_after":"`...), time.RFC3339Nano)
		b = append(b, '"')
	}
	if e.Err != nil {
		b = appendMember(b, "error", cut(e.Err.Error()))
	}
	return append(b, '}', '\n')
}

// appendCaller is who asked, without the SPIFFE ID where that is the certificate's.
func appendCaller(b []byte, who *caller.Caller, id string) []byte {
	b = append(b, `,"caller":{`...)
	begin := len(b)
	who.Each(func(name, value string) {
		if name == "spiffe_id" && value == id {
			return
		}
		if len(b) > begin {
			b = append(b, ',')
		}
		b = appendText(append(appendText(b, name), ':'), cut(value))
	})
	return append(b, '}')
}

// appendMember leaves out what is empty.
func appendMember(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	b = append(b, ',', '"')
	b = append(b, name...)
	return appendText(append(b, '"', ':'), value)
}

// appendText quotes a string. Nearly all are plain.
func appendText(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			quoted, err := json.Marshal(s)
			if err != nil { // not of a string
				return append(b, `""`...)
			}
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
