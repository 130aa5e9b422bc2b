// Package cli holds what meshca's programs have in common as command-line
// programs: exit codes, signals, flags for logging, and how an error reaches
// the person who typed the command.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/cmd/internal/logs"
)

// Exit codes of every command.
const (
	ExitOK      = 0 // it holds
	ExitRefused = 1 // a finding, a refusal, or it went wrong
	ExitUsage   = 2 // the command line or the configuration is wrong
	ExitUnknown = 3 // could not tell: no connection, no permission
)

// UsageError is a mistake of the person who started the program.
type UsageError struct{ Err error }

func (e *UsageError) Error() string { return e.Err.Error() }
func (e *UsageError) Unwrap() error { return e.Err }

// Usagef makes a [*UsageError].
func Usagef(format string, args ...any) error { return &UsageError{fmt.Errorf(format, args...)} }

// UnknownError says that what was asked could not be told.
type UnknownError struct{ Err error }

func (e *UnknownError) Error() string { return e.Err.Error() }
func (e *UnknownError) Unwrap() error { return e.Err }

// ErrFound is returned by a command whose result, which is written, holds a finding:
// there is nothing more to say than its exit code. [ErrUntold] likewise, where part of
// the result could not be told.
var (
	ErrFound  = errors.New("something was found")
	ErrUntold = errors.New("something could not be told")
)

// HintError adds what to do next to an error that a library returned. The
// library knows what went wrong; only the command knows which flag or file
// would mend it.
type HintError struct {
	Err  error
	Hint string
}

func (e *HintError) Error() string { return e.Err.Error() + "; " + e.Hint }
func (e *HintError) Unwrap() error { return e.Err }

// Main runs a command line until it ends or SIGINT or SIGTERM arrives, and
// returns the exit code. A second signal ends the process at once.
func Main(root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	return Execute(ctx, root, args, stdout, stderr)
}

// Execute is [Main] without the signals.
func Execute(ctx context.Context, root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	// Never nil, which cobra would take for the process's own arguments.
	root.SetArgs(append([]string{}, args...))
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return Usagef("%w; see %s --help", err, c.CommandPath())
	})
	err := root.ExecuteContext(ctx)
	if err == nil {
		return ExitOK
	}
	switch err { // and nothing that wraps them
	case ErrFound:
		return ExitRefused
	case ErrUntold:
		return ExitUnknown
	}
	fmt.Fprintf(stderr, "%s: %v\n", root.Name(), err)
	var unknown *UnknownError
	if errors.As(err, &unknown) {
		return ExitUnknown
	}
	var usage *UsageError
	if errors.As(err, &usage) || strings.HasPrefix(err.Error(), "unknown command") {
		return ExitUsage
	}
	return ExitRefused
}

// NoArgs refuses arguments beyond the flags.
func NoArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return Usagef("unexpected argument %q; see %s --help", args[0], c.CommandPath())
	}
	return nil
}

// Version returns the module's version, or the commit that was built.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	version := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && (version == "" || version == "(devel)") {
			version = "devel-" + s.Value[:min(12, len(s.Value))]
		}
	}
	if version == "" {
		version = "devel"
	}
	return version
}

// NoCoreDumps keeps the kernel from writing this process's memory, with the
// keys in it, to a disk when it crashes.
func NoCoreDumps() error {
	// One byte and not none: the kernel takes a limit of 1 to mean that the dump
	// is not piped to a collector either, which a limit of 0 does not stop.
	if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{Cur: 1, Max: 1}); err != nil {
		return fmt.Errorf("switching off core dumps: %w", err)
	}
	return nil
}

// LogFlags are the two flags that every long-running command has.
type LogFlags struct{ format, level string }

// Register adds --log-format and --log-level.
func (f *LogFlags) Register(c *cobra.Command) {
	c.Flags().StringVar(&f.format, "log-format", logs.Auto, "auto (text on a terminal, else JSON), text or json")
	c.Flags().StringVar(&f.level, "log-level", "info", "debug, info, warn or error")
}

// Run calls do with the logger that the flags ask for, on the command's error
// stream, and writes out what is still waiting when do has returned.
func (f *LogFlags) Run(c *cobra.Command, do func(context.Context, *slog.Logger) error) error {
	log, flush, err := logs.New(c.ErrOrStderr(), f.format, f.level)
	if err != nil {
		return &UsageError{err}
	}
	defer flush()
	stop := context.AfterFunc(c.Context(), func() { log.Info("stopping") })
	defer stop()
	if err := do(c.Context(), log); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}
