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
	profiles := flags.String("profiles", "", "the directory for CPU profiles of our programs, taken after the rounds; none if empty")
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
	var errs []error
	for _, w := range wanted {
		errs = append(errs, one(ctx, w, *quick, *rounds, *profiles, strings.Join(append([]string{"bench"}, args...), " "), filepath.Join(*output, "benchmarks"), out))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return write(*output, out)
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
func one(ctx context.Context, w part, quick bool, rounds int, profiles, command, folder string, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "meshca-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	r, err := rig.NewRun(quick, dir, out)
	if err != nil {
		return err
	}
	r.Part(w.name)
	r.Profiles = profiles
	r.Rounds = cmp.Or(rounds, r.Rounds)
	p := &table.Part{
		Name: w.name, Title: w.title, Method: w.method, Machine: measure.Machine(), Commit: rig.Commit(ctx), Command: command,
		Quick: quick, Began: time.Now(), Versions: rig.Versions(),
	}
	if err := w.run(ctx, r, p); err != nil {
		return fmt.Errorf("%s: %w", w.name, err)
	}
	p.Took = time.Since(p.Began).Seconds()
	for _, f := range p.Figures {
		goal := ""
		if f.Goal != nil && !f.Met() {
			goal = "  MISSED"
		}
		fmt.Fprintf(out, "  %-48s %-28s %10.3f %s%s\n", f.Group, f.Of, f.Median(), f.Unit, goal)
	}
	return p.Save(folder)
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
