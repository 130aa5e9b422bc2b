package demo

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/meshca/meshca/cmd/internal/logs"
)

// Step is one numbered thing that the demo shows.
type Step struct {
	Title  string  `json:"title"`
	Checks []Check `json:"checks"`
}

// Check is one line of a step, with its verdict.
type Check struct {
	What string `json:"what"`           // what was done: "token → spiffe://…"
	Saw  string `json:"saw"`            // what came of it
	Why  string `json:"why,omitempty"`  // the reason, where somebody had one
	Held bool   `json:"held"`           // whether that is as it should be
	Fact bool   `json:"fact,omitempty"` // a plain statement that has no verdict of its own
}

// Held reports whether every check of the step held.
func (s Step) Held() bool {
	for _, c := range s.Checks {
		if !c.Held {
			return false
		}
	}
	return true
}

// Report is the whole run.
type Report struct {
	Steps   []Step  `json:"steps"`
	Held    bool    `json:"held"`
	Seconds float64 `json:"seconds"`
}

// printer writes steps as they come and keeps them for the report.
type printer struct {
	out, err io.Writer
	ok, bad  string
	terminal bool // err is one, so that progress may be rewritten in place
	progress bool // a progress line stands there now
	last     time.Time
	report   Report
}

func newPrinter(out, err io.Writer) *printer {
	p := &printer{out: out, err: err, ok: "ok", bad: "xx", terminal: logs.IsTerminal(err)}
	if utf8Locale() {
		p.ok, p.bad = "✓", "✗"
	}
	if logs.IsTerminal(out) && os.Getenv("NO_COLOR") == "" {
		p.ok, p.bad = "\x1b[32m"+p.ok+"\x1b[0m", "\x1b[31m"+p.bad+"\x1b[0m"
	}
	return p
}

// utf8Locale follows the order in which the C library looks.
func utf8Locale() bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := os.Getenv(name); v != "" {
			v = strings.ToUpper(v)
			return strings.Contains(v, "UTF-8") || strings.Contains(v, "UTF8")
		}
	}
	return false
}

// Widths: number and title, then what was done, and the whole line.
const (
	titleWidth    = 25
	whatWidth     = 33
	longWhatWidth = 51 // holds "token → " and a SPIFFE ID of the demo
	lineWidth     = 100
)

// step prints one finished step.
func (p *printer) step(title string, checks ...Check) {
	p.clear()
	s := Step{Title: title, Checks: checks}
	p.report.Steps = append(p.report.Steps, s)
	head := fmt.Sprintf("%d  %s", len(p.report.Steps), title)
	for _, c := range checks {
		mark := p.ok + " "
		switch {
		case !c.Held:
			mark = p.bad + " "
		case c.Fact:
			mark = ""
		}
		width := whatWidth
		if len([]rune(c.What)) > width {
			width = longWhatWidth
		}
		fmt.Fprintf(p.out, "%s %s %s%s\n", pad(head, titleWidth), pad(c.What, width), mark, c.Saw)
		for _, line := range wrap(c.Why, lineWidth-titleWidth-3) {
			fmt.Fprintf(p.out, "%s   %s\n", pad("", titleWidth), line)
		}
		head = ""
	}
}

// waiting shows on the error stream what is being waited for: rewritten in
// place on a terminal, one line every five seconds elsewhere.
func (p *printer) waiting(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if p.terminal {
		fmt.Fprintf(p.err, "\r\x1b[K   %s", text)
		p.progress = true
		return
	}
	if time.Since(p.last) >= 5*time.Second {
		fmt.Fprintf(p.err, "   %s\n", text)
		p.last = time.Now()
	}
}

func (p *printer) clear() {
	if p.progress {
		fmt.Fprint(p.err, "\r\x1b[K")
		p.progress = false
	}
}

// finish prints the verdict over all steps.
func (p *printer) finish(took time.Duration) Report {
	p.clear()
	held := 0
	for _, s := range p.report.Steps {
		if s.Held() {
			held++
		}
	}
	p.report.Held = held == len(p.report.Steps)
	p.report.Seconds = took.Seconds()
	fmt.Fprintf(p.out, "\n%d of %d held in %.1f s.", held, len(p.report.Steps), took.Seconds())
	return p.report
}

// wrap breaks text between words into lines of at most width characters; a
// longer word stays whole, since half a SPIFFE ID helps nobody.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len([]rune(line))+1+len([]rune(word)) > width {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	if line != "" {
		lines = append(lines, line)
	}
	return lines
}

// pad fills s with spaces to a width counted in characters, not bytes.
func pad(s string, width int) string {
	if n := width - len([]rune(s)); n > 0 {
		return s + strings.Repeat(" ", n)
	}
	return s
}
