package main

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/meshca/meshca/ca/kube/overview"
	"github.com/meshca/meshca/ca/kube/report"
)

const (
	columns   = 100
	firstRows = 20 // without --all
)

// statusView is a picture as text.
type statusView struct {
	*overview.Picture
	namespace string
	all       bool
	marks     marks
}

func (v statusView) text(w io.Writer) error {
	var b strings.Builder
	v.header(&b)
	rows := v.Workloads
	if !v.all && len(rows) > firstRows {
		rows = rows[:firstRows]
	}
	if len(rows) > 0 {
		v.table(&b, rows)
	}
	v.footer(&b, len(rows))
	_, err := io.WriteString(w, b.String())
	return err
}

func (v statusView) header(b *strings.Builder) {
	signing := 0
	for _, r := range v.Replicas {
		if r.Signs {
			signing++
		}
	}
	nodes := "on " + plural(v.Counts.Nodes, "node")
	if v.namespace != "" {
		nodes += ", of namespace " + v.namespace
	}
	line := fmt.Sprintf("trust domain %s · %d of %s can sign · bundle %d (%s) · %s %s",
		v.TrustDomain, signing, plural(len(v.Replicas), "CA"), v.Bundle, plural(v.Roots, "root"), plural(v.Counts.Workloads, "workload"), nodes)
	if v.marks.holds != "✓" {
		line = strings.ReplaceAll(line, "·", "-")
	}
	wrap(b, line, "", "")
	if text := v.upstream(); text != "" {
		wrap(b, text, "", "")
	}
	for _, n := range v.Notes {
		wrap(b, "note: "+n, "", "  ")
	}
	for _, f := range v.Findings {
		wrap(b, f, v.marks.attention+" ", "  ")
	}
}

// upstream says, where the root is not the CA's own, whose it is, until when all can
// sign without it, and whether a restart would be safe.
func (v statusView) upstream() string {
	var until time.Time
	var kind, state string
	var next *report.Source
	lose := 0
	for _, r := range v.Replicas {
		s := r.Upstream
		if s == nil {
			continue
		}
		if until.IsZero() || r.SignsUntil.Before(until) {
			until = r.SignsUntil
		}
		if kind = s.Kind; state == "" || s.State != "ok" {
			state = s.State
		}
		if s.Next != "" && (next == nil || s.NextAt.Before(next.NextAt)) {
			next = s
		}
		if s.RestartLoses {
			lose++
		}
	}
	if kind == "" {
		return ""
	}
	parts := []string{fmt.Sprintf("upstream %s %s", kind, state)}
	if !until.IsZero() {
		parts = append(parts, fmt.Sprintf("all sign until %s without it", v.at(until)))
	}
	if next != nil {
		parts = append(parts, fmt.Sprintf("next: %s %s", next.Next, v.at(next.NextAt)))
	}
	if lose > 0 {
		parts = append(parts, fmt.Sprintf("a restart now loses signing on %s", plural(lose, "CA")))
	} else {
		parts = append(parts, "a restart now loses nothing")
	}
	separator := " · "
	if v.marks.holds != "✓" {
		separator = " - "
	}
	return strings.Join(parts, separator)
}

// at is a time as people want it: how far off, and when.
func (v statusView) at(t time.Time) string {
	left := t.Sub(v.At)
	if left < 0 {
		return t.UTC().Format("15:04:05Z")
	}
	return fmt.Sprintf("%s (in %s)", t.UTC().Format("2006-01-02 15:04Z"), overview.Span(left))
}

// table has one line for each workload, and below it what there is to say.
func (v statusView) table(b *strings.Builder, rows []overview.Workload) {
	lines := [][]string{{"WORKLOAD", "SERVICE ACCOUNT", "CERTIFICATE ENDS", "BUNDLE", "POLICY", "STATE"}}
	for _, w := range rows {
		lines = append(lines, []string{
			w.Name(), account(w.ID), v.ends(w.Ends), v.acknowledged(w, w.Bundle, report.BundleBehind),
			v.acknowledged(w, w.Policy, report.PolicyBehind), v.mark(w.State),
		})
	}
	widths := fit(lines)
	fmt.Fprintln(b)
	for i, line := range lines {
		writeColumns(b, line, widths)
		if i == 0 {
			continue
		}
		for _, f := range rows[i-1].Findings {
			text := f.Reason
			if utf8.RuneCountInString(line[0]) > widths[0] {
				text = line[0] + ": " + text
			}
			if !f.Since.IsZero() {
				text = "for " + overview.Span(v.At.Sub(f.Since)) + ": " + text
			}
			wrap(b, text, "  "+v.mark(rows[i-1].State)+" ", "    ")
		}
	}
}

// footer says how many there are, and what to do next.
func (v statusView) footer(b *strings.Builder, shown int) {
	fmt.Fprintln(b)
	if more := len(v.Workloads) - shown; more > 0 {
		fmt.Fprintf(b, "%s more (--all)\n", plural(more, "workload"))
	}
	if v.Unlisted > 0 {
		wrap(b, plural(v.Unlisted, "workload")+" in order that the CA vouches for without details", "", "")
	}
	if text := v.certificates(); text != "" {
		wrap(b, text, "", "")
	}
	states := v.Counts.States
	need := states[overview.Failing] + states[overview.Attention]
	var parts []string
	for _, p := range []struct {
		n    int
		text string
	}{{need, "need attention"}, {states[overview.Unknown], "cannot be told"}, {states[overview.Starting], "starting"}} {
		if p.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", p.n, p.text))
		}
	}
	switch {
	case need > 0 && v.Workloads[0].Pod != "":
		fmt.Fprintf(b, "%s. meshca explain pod %s\n", strings.Join(parts, ", "), v.Workloads[0].Name())
	case len(parts) > 0:
		fmt.Fprintln(b, strings.Join(parts, ", "))
	case len(v.Findings) > 0:
		fmt.Fprintf(b, "%s in order; the CA itself needs attention, see above\n", plural(v.Counts.Workloads, "workload"))
	case v.Counts.Workloads == 0:
		fmt.Fprintln(b, "no pod mounts the volume (driver csi.meshca.dev) yet")
	default:
		fmt.Fprintf(b, "%s, all in order\n", plural(v.Counts.Workloads, "workload"))
	}
}

// certificates is when all of them end, in one line.
func (v statusView) certificates() string {
	var parts []string
	for _, e := range v.Counts.Ends {
		switch {
		case e.Count == 0:
		case e.Minutes == 0:
			parts = append(parts, fmt.Sprintf("%d ended", e.Count))
		default:
			parts = append(parts, fmt.Sprintf("%d within %s", e.Count, overview.Span(time.Duration(e.Minutes)*time.Minute)))
		}
	}
	if parts == nil || v.namespace != "" {
		return ""
	}
	return "certificates that end: " + strings.Join(parts, ", ")
}

func (v statusView) mark(s overview.State) string {
	switch s {
	case overview.Failing:
		return v.marks.fails
	case overview.Attention:
		return v.marks.attention
	case overview.Unknown, overview.Starting:
		return v.marks.unknown
	}
	return v.marks.holds
}

func (v statusView) ends(t time.Time) string {
	switch {
	case t.IsZero():
		return "not known"
	case t.Before(v.At):
		return overview.Span(v.At.Sub(t)) + " ago (" + t.UTC().Format("15:04:05") + ")"
	}
	return "in " + overview.Span(t.Sub(v.At)) + " (" + t.UTC().Format("15:04:05") + ")"
}

func (v statusView) acknowledged(w overview.Workload, version uint64, behind string) string {
	if version == 0 {
		return "-"
	}
	for _, f := range w.Findings {
		if f.What == behind {
			return fmt.Sprintf("%d %s", version, v.marks.attention)
		}
	}
	return fmt.Sprintf("%d %s", version, v.marks.holds)
}

// account is the part of a SPIFFE ID that the table's other columns do not show.
func account(id string) string {
	if _, name, ok := strings.Cut(id, "/sa/"); ok {
		return name
	}
	return "-"
}

// fit says how wide columns are so that all lines fit, cutting the widest of the first
// two.
func fit(lines [][]string) []int {
	widths := make([]int, len(lines[0]))
	total := 0
	for i := range widths {
		for _, line := range lines {
			widths[i] = max(widths[i], utf8.RuneCountInString(line[i]))
		}
		total += widths[i] + 2
	}
	for ; total-2 > columns; total-- {
		if widths[0] >= widths[1] {
			widths[0]--
		} else {
			widths[1]--
		}
	}
	return widths
}

func writeColumns(b *strings.Builder, line []string, widths []int) {
	var out strings.Builder
	for i, cell := range line {
		if n := utf8.RuneCountInString(cell); n > widths[i] {
			cell = string([]rune(cell)[:max(0, widths[i]-2)]) + ".."
		}
		out.WriteString(cell)
		out.WriteString(strings.Repeat(" ", widths[i]+2-utf8.RuneCountInString(cell)))
	}
	fmt.Fprintln(b, strings.TrimRight(out.String(), " "))
}

// wrap writes text in lines of at most columns, broken between words.
func wrap(b *strings.Builder, text, first, next string) {
	line := first
	for i, word := range strings.Fields(text) {
		if i > 0 && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > columns {
			fmt.Fprintln(b, line)
			line = next + word
			continue
		}
		if i > 0 {
			line += " "
		}
		line += word
	}
	fmt.Fprintln(b, line)
}
