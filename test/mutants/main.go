// Command mutants switches off one control after another and wants the tests
// to notice:
//
//	go run ./test/mutants [-area name] [-id T6] [-check]
//
// A mutant that no test notices is hollow: its requirement is not proved, and
// the command fails. So does one that does not compile or whose tests are red
// without it. Nothing in the checkout is changed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"

	"github.com/meshca/meshca/test/mutants/mutant"
	"github.com/meshca/meshca/test/testenv"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("mutants", flag.ContinueOnError)
	flags.SetOutput(stderr)
	area := flags.String("area", "", "only those of test/mutants/`name`.yaml")
	id := flags.String("id", "", "only those that list this `id`")
	check := flags.Bool("check", false, "only see whether all of them fit the code; run nothing")
	parallel := flags.Int("j", runtime.NumCPU(), "how many to run at once")
	if err := flags.Parse(args); err != nil {
		return err
	}
	root, err := testenv.RepositoryRoot()
	if err != nil {
		return err
	}
	all, err := mutant.Load(root)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(m *mutant.Mutant) bool {
		return *area != "" && m.Area != *area || *id != "" && !slices.Contains(m.IDs, *id)
	})
	if len(all) == 0 {
		return fmt.Errorf("there is no mutant of area %q with id %q", *area, *id)
	}
	var errs []error
	for _, m := range all {
		errs = append(errs, m.Check(root))
	}
	if err := errors.Join(errs...); err != nil || *check {
		if err == nil {
			fmt.Fprintf(stdout, "%d mutants fit the code\n", len(all))
		}
		return err
	}
	r := &runner{root: root, parallel: *parallel, stdout: stdout, stderr: stderr}
	return r.run(ctx, all)
}
