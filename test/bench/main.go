// Command bench measures meshca's programs beside their goals and beside what people
// would use instead, and writes docs/benchmarks.md:
//
//	go run . [-quick] [-rounds 5] [-only issuing,proxy] [-o DIRECTORY]
//
// Each part leaves its raw figures in docs/benchmarks; the page is made from all that
// are there, so that one part can be measured anew alone.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/meshca/meshca/test/bench/delivery"
	"github.com/meshca/meshca/test/bench/issuing"
	"github.com/meshca/meshca/test/bench/measure"
	"github.com/meshca/meshca/test/bench/pacing"
	"github.com/meshca/meshca/test/bench/relays"
	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/bench/storms"
	"github.com/meshca/meshca/test/bench/table"
	"github.com/meshca/meshca/test/testenv"
)

// part is one section of the page.
type part struct {
	name, title, method string
	run                 func(context.Context, *rig.Run, *table.Part) error
}

var parts = []part{
	{"issuing", issuing.Title, issuing.Method, issuing.Run},
	{"storms", storms.Title, storms.Method, storms.Run},
	{"renewals", storms.RenewalsTitle, storms.RenewalsMethod, storms.RunRenewals},
	{"pacing", pacing.Title, pacing.Method, pacing.Run},
	{"fleet", storms.FleetTitle, storms.FleetMethod, storms.RunFleet},
	{"proxy", relays.Title, relays.Method, relays.Run},
	{"delivery", delivery.Title, delivery.Method, delivery.Run},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	quick := flags.Bool("quick", false, "measure for a tenth of the time, one round: to see that all runs")
	rounds := flags.Int("rounds", 0, "how many rounds to measure, instead of five")
	only := flags.String("only", "", "the parts to measure, separated by commas; all of them if empty")
	output := flags.String("o", "", "the directory for benchmarks.md and the folder benchmarks; docs unless set, and a temporary one for a quick run")
	renewals := flags.Duration("renewals", 3*time.Minute, "how long renewals at a steady rate go on")
	strict := flags.Bool("strict", false, "fail where a goal is missed that is not of time, which depends on who else has the machine")
	profiles := flags.String("profiles", "", "the directory for the profiles themselves, which end up beside the figures as text; they are not kept if empty")
	if err := flags.Parse(args); err != nil {
		return err
	}
	wanted, err := choose(*only)
	if err != nil {
		return err
	}
	if *output == "" {
		if *output, err = outputDir(*quick); err != nil {
			return err
		}
	}
	o := options{
		quick: *quick, rounds: *rounds, renewals: *renewals, profiles: *profiles,
		command: strings.Join(append([]string{"bench"}, args...), " "), folder: filepath.Join(*output, "benchmarks"),
	}
	var errs, missed []error
	for _, w := range wanted {
		p, err := one(ctx, w, o, out)
		errs = append(errs, err)
		if err == nil && *strict {
			missed = append(missed, repeated(p))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return errors.Join(append(missed, write(*output, out))...)
}

// options are of all parts.
type options struct {
	quick           bool
	rounds          int // if not the default
	renewals        time.Duration
	profiles        string
	command, folder string
}

// repeated names the goals that a part missed although what is measured repeats.
func repeated(p *table.Part) error {
	var errs []error
	for _, f := range p.Figures {
		if !f.Met() && !slices.Contains([]string{"s", "ms", "µs"}, f.Unit) {
			errs = append(errs, fmt.Errorf("%s: %s, of %s: %.3g %s, and the goal is missed", p.Name, f.Group, f.Of, f.Median(), f.Unit))
		}
	}
	return errors.Join(errs...)
}

func choose(only string) ([]part, error) {
	if only == "" {
		return parts, nil
	}
	var wanted []part
	for name := range strings.SplitSeq(only, ",") {
		i := slices.IndexFunc(parts, func(p part) bool { return p.name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no part %q; there are %s", name, strings.Join(names(), ", "))
		}
		wanted = append(wanted, parts[i])
	}
	return wanted, nil
}

func names() []string {
	var all []string
	for _, p := range parts {
		all = append(all, p.name)
	}
	return all
}

// outputDir keeps a quick run's figures away from those that are kept.
func outputDir(quick bool) (string, error) {
	if quick {
		return os.MkdirTemp("", "meshca-bench-quick")
	}
	root, err := testenv.RepositoryRoot()
	return filepath.Join(root, "docs"), err
}

// one measures a part in a directory of its own.
func one(ctx context.Context, w part, o options, out io.Writer) (p *table.Part, err error) {
	dir, err := os.MkdirTemp("", "meshca-bench")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	r, err := rig.NewRun(o.quick, dir, out)
	if err != nil {
		return nil, err
	}
	r.Part(w.name)
	r.Profiles, r.Renewals = o.profiles, o.renewals
	r.Rounds = cmp.Or(o.rounds, r.Rounds)
	p = &table.Part{
		Name: w.name, Title: w.title, Method: w.method, Machine: measure.Machine(), Commit: rig.Commit(ctx), Command: o.command,
		Quick: o.quick, Began: time.Now(), Versions: rig.Versions(),
	}
	if err := w.run(ctx, r, p); err != nil {
		return nil, fmt.Errorf("%s: %w", w.name, err)
	}
	p.Took = time.Since(p.Began).Seconds()
	for _, f := range p.Figures {
		goal := ""
		if f.Goal != nil && !f.Met() {
			goal = "  MISSED"
		}
		fmt.Fprintf(out, "  %-48s %-28s %10.3f %s%s\n", f.Group, f.Of, f.Median(), f.Unit, goal)
	}
	return p, p.Save(o.folder)
}

// write makes the page and its pictures from all raw figures.
func write(output string, out io.Writer) error {
	folder := filepath.Join(output, "benchmarks")
	all, err := table.Load(folder, names())
	if err != nil {
		return err
	}
	pictures := make(map[string][]byte)
	for _, p := range all {
		for _, s := range p.Series {
			pictures[s.Name] = s.SVG()
		}
	}
	for _, name := range slices.Sorted(maps.Keys(pictures)) {
		if err := os.WriteFile(filepath.Join(folder, name+".svg"), pictures[name], 0o644); err != nil {
			return err
		}
	}
	page := filepath.Join(output, "benchmarks.md")
	fmt.Fprintln(out, "wrote", page)
	return os.WriteFile(page, table.Page(all, "benchmarks"), 0o644)
}
