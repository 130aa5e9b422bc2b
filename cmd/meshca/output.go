package main

import (
	"encoding/json"
	"io"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/cmd/internal/cli"
)

// outputFlag adds -o to a command whose result a script may want.
func outputFlag(c *cobra.Command, into *string) {
	c.Flags().StringVarP(into, "output", "o", "text", "text, or json for scripts")
}

// checkOutput refuses a form that there is not.
func checkOutput(format string) error {
	if format != "text" && format != "json" {
		return cli.Usagef("-o %q: choose text or json", format)
	}
	return nil
}

// printResult writes a command's result in the form that was asked for.
func printResult(w io.Writer, format string, result any, text func(io.Writer) error) error {
	if err := checkOutput(format); err != nil {
		return err
	}
	if format == "text" {
		return text(w)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(result)
}
