package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/meshca/meshca/cmd/internal/logs"
)

// lineWidth is what every line of a command fits into.
const lineWidth = 100

// coloured adds colour, on a terminal only; it says nothing that the marks do not.
func (m marks) coloured(out io.Writer) marks {
	if logs.IsTerminal(out) && os.Getenv("NO_COLOR") == "" {
		colour := func(s *string, code int) { *s = fmt.Sprintf("\x1b[%dm%s\x1b[0m", code, *s) }
		colour(&m.holds, 32)
		colour(&m.attention, 33)
		colour(&m.fails, 31)
		colour(&m.unknown, 35)
	}
	return m
}

// wrapped breaks text into lines that fit beside first and, from the second on, rest.
// A word that fits nowhere is never cut: it may be what somebody wants to copy.
func wrapped(first, rest, text string) string {
	var s strings.Builder
	line, used := first, len([]rune(stripColour(first)))
	empty := true
	for word := range strings.FieldsSeq(text) {
		n := len([]rune(word))
		if !empty && used+1+n > lineWidth {
			s.WriteString(line + "\n")
			line, used, empty = rest, len(rest), true
		}
		if !empty {
			line += " "
			used++
		}
		line += word
		used += n
		empty = false
	}
	return s.String() + line + "\n"
}

func stripColour(s string) string {
	for {
		i := strings.Index(s, "\x1b[")
		if i < 0 {
			return s
		}
		end := strings.IndexByte(s[i:], 'm')
		if end < 0 {
			return s
		}
		s = s[:i] + s[i+end+1:]
	}
}
