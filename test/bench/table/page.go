package table

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// Page renders parts as docs/benchmarks.md. Pictures lie in the folder of the raw
// results, named by it relative to the page.
func Page(parts []*Part, folder string) []byte {
	var b strings.Builder
	b.WriteString(`# Benchmarks

What meshca costs, beside its goals and beside what people would use instead. ` + "`make bench`" + ` measures
all of it and writes this page; ` + "`make bench-quick`" + ` runs the same in a few minutes, too short for figures to
keep. What is compared was measured in the same run, in turns: a round of one, a round of the other,
and again. A figure is the median of its rounds; behind it are the lowest and the highest. Processor time
comes from the kernel's CPU clock of the process, and is the figure to trust: seconds of the wall depend
on who else has the machine. A goal that was not met stays in its place; [why](performance.md).

CI measures no time. It counts the allocations of a certificate and of a proxied request, which repeat
(` + "`TestAllocations…`" + `); instructions it cannot count where the processor's counters are hidden, as on most virtual machines.
`)
	for _, p := range parts {
		p.section(&b, folder)
	}
	return []byte(b.String())
}

func (p *Part) section(b *strings.Builder, folder string) {
	fmt.Fprintf(b, "\n## %s\n\n%s\n\n", p.Title, strings.TrimSpace(p.Method))
	if p.Quick {
		b.WriteString("**A quick run: the figures are too short to keep.**\n\n")
	}
	b.WriteString("| measured | of | figure | lowest – highest | goal | |\n|---|---|---|---|---|---|\n")
	last := ""
	for _, f := range p.Figures {
		group := f.Group
		if group == last {
			group = ""
		}
		last = f.Group
		goal, mark := "", ""
		if f.Goal != nil {
			goal = fmt.Sprintf("at most %s", number(f.Goal.Limit))
			if f.Goal.Least {
				goal = fmt.Sprintf("at least %s", number(f.Goal.Limit))
			}
			if f.Goal.From != "" {
				goal += " (" + f.Goal.From + ")"
			}
			mark = "met"
			if !f.Met() {
				mark = "**missed**"
			}
		}
		if f.Note != "" {
			mark = strings.TrimSpace(mark + " " + f.Note)
		}
		spread := ""
		if len(f.Rounds) > 1 {
			spread = number(slices.Min(f.Rounds)) + " – " + number(slices.Max(f.Rounds))
		}
		fmt.Fprintf(b, "| %s | %s | %s %s | %s | %s | %s |\n", group, f.Of, number(f.Median()), f.Unit, spread, goal, mark)
	}
	for _, s := range p.Series {
		fmt.Fprintf(b, "\n![%s](%s/%s.svg)\n", s.Title, folder, s.Name)
	}
	for i, f := range p.Profiles {
		lead := ", "
		if i == 0 {
			lead = "\nWhere it goes, taken after the rounds: "
		}
		fmt.Fprintf(b, "%s[%s](%s/%s.txt)", lead, f.Title, folder, f.Name)
	}
	if len(p.Profiles) > 0 {
		b.WriteString(".\n")
	}
	fmt.Fprintf(b, "\n%s, in %s, on %s; commit %s; `%s`; raw figures: [%s.json](%s/%s.json).", p.Began.UTC().Format("2006-01-02 15:04 UTC"),
		(time.Duration(p.Took) * time.Second).String(), p.Machine, p.Commit, p.Command, p.Name, folder, p.Name)
	for i, name := range slices.Sorted(maps.Keys(p.Versions)) {
		if i == 0 {
			b.WriteString(" Versions: ")
		} else {
			b.WriteString(", ")
		}
		fmt.Fprintf(b, "%s %s", name, p.Versions[name])
	}
	if len(p.Versions) > 0 {
		b.WriteString(".")
	}
	b.WriteString("\n")
}

// number has three digits that count.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "–"
	case a >= 10000:
		return thousands(int64(math.Round(v)))
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	case a == 0:
		return "0"
	}
	return fmt.Sprintf("%.3f", v)
}

func thousands(v int64) string {
	s := fmt.Sprint(v)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
