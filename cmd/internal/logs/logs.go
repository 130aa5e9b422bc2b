// Package logs makes the one logger that a program hands to everything below.
//
// Writing a line never waits for whoever reads the log, and no kind of line can
// flood it: what a stranger does to a port must neither stop the program nor
// fill the disk that the audit log is on.
package logs

import (
	"fmt"
	"io"
	"log/slog"
	"os"

	"golang.org/x/term"
)

// Formats and levels as the flags spell them.
const (
	Auto = "auto"
	Text = "text"
	JSON = "json"
)

// New returns a logger that writes to w, and a function that writes out what is
// still waiting, to be called at the end. Format auto means text where a person
// reads, which is when w is a terminal, and JSON otherwise.
func New(w io.Writer, format, level string) (log *slog.Logger, flush func(), err error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, nil, fmt.Errorf("--log-level %q: choose debug, info, warn or error", level)
	}
	if format == Auto {
		format = JSON
		if IsTerminal(w) {
			format = Text
		}
	}
	if format != Text && format != JSON {
		return nil, nil, fmt.Errorf("--log-format %q: choose auto, text or json", format)
	}
	q := newQueue(w)
	options := &slog.HandlerOptions{Level: l}
	var h slog.Handler = slog.NewJSONHandler(q, options)
	if format == Text {
		h = slog.NewTextHandler(q, options)
	}
	return slog.New(newLimited(h)), q.close, nil
}

// IsTerminal reports whether a person is likely to be reading w.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
