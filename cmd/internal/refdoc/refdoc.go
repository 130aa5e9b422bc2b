// Package refdoc writes the pages of docs/reference from the programs
// themselves: commands from cobra, settings from the configuration struct,
// metrics from what was registered. A test in each program fails when its page
// is stale.
package refdoc

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/meshca/meshca/cmd/internal/conf"
)

// Commands describes a program and each of its commands.
func Commands(root *cobra.Command) string {
	var out strings.Builder
	out.WriteString("## Commands\n")
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Runnable() {
			command(&out, c)
		}
		for _, sub := range c.Commands() {
			if !sub.Hidden && sub.Name() != "help" && sub.Name() != "completion" {
				walk(sub)
			}
		}
	}
	walk(root)
	return out.String()
}

func command(out *strings.Builder, c *cobra.Command) {
	text := c.Long
	if text == "" {
		text = c.Short
	}
	fmt.Fprintf(out, "\n### `%s`\n\n%s\n", c.CommandPath(), text)
	if c.Example != "" {
		fmt.Fprintf(out, "\n```\n%s\n```\n", c.Example)
	}
	rows := 0
	c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		if rows++; rows == 1 {
			out.WriteString("\n| flag | default | what it does |\n|---|---|---|\n")
		}
		def := f.DefValue
		if def == "[]" || def == "false" {
			def = ""
		}
		fmt.Fprintf(out, "| `--%s` | %s | %s |\n", f.Name, code(def), cell(f.Usage))
	})
}

// Settings describes the keys of a configuration file.
func Settings(defaults any) string {
	var out strings.Builder
	out.WriteString("## Configuration file\n\n| key | type | default | what it means |\n|---|---|---|---|\n")
	for _, k := range conf.Keys(defaults) {
		fmt.Fprintf(&out, "| `%s` | %s | %s | %s |\n", k.Path, k.Type, code(k.Default), cell(k.Doc))
	}
	return out.String()
}

// Recorder is a prometheus.Registerer that remembers what is registered, since
// a registry does not tell before a metric has been used.
type Recorder struct {
	mu     sync.Mutex
	reg    *prometheus.Registry
	kinds  map[string]string
	labels map[string]string
	help   map[string]string
}

// NewRecorder returns an empty recorder.
func NewRecorder() *Recorder {
	return &Recorder{reg: prometheus.NewRegistry(), kinds: map[string]string{}, labels: map[string]string{}, help: map[string]string{}}
}

var descText = regexp.MustCompile(`fqName: "([^"]*)", help: "((?:[^"\\]|\\.)*)", (?:unit: "[^"]*", )?constLabels: \{[^}]*\}, variableLabels: \{([^}]*)\}`)

// Register implements prometheus.Registerer.
func (r *Recorder) Register(c prometheus.Collector) error {
	if err := r.reg.Register(c); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	descs := make(chan *prometheus.Desc)
	go func() { c.Describe(descs); close(descs) }()
	for d := range descs {
		// Desc shows its parts only as text.
		m := descText.FindStringSubmatch(d.String())
		if m == nil {
			continue
		}
		r.help[m[1]], r.labels[m[1]], r.kinds[m[1]] = m[2], m[3], kind(c)
	}
	return nil
}

// Alternatively lets names be registered once more: by parts of which a program has
// one or the other. What was said of them first is kept if the parts agree.
func (r *Recorder) Alternatively() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reg = prometheus.NewRegistry()
}

// MustRegister implements prometheus.Registerer.
func (r *Recorder) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		if err := r.Register(c); err != nil {
			panic(err)
		}
	}
}

// Unregister implements prometheus.Registerer.
func (r *Recorder) Unregister(c prometheus.Collector) bool { return r.reg.Unregister(c) }

// kind tells the type of a metric.
func kind(c prometheus.Collector) string {
	switch c.(type) {
	case *prometheus.CounterVec:
		return "counter"
	case *prometheus.GaugeVec:
		return "gauge"
	case *prometheus.HistogramVec:
		return "histogram"
	}
	m, ok := c.(prometheus.Metric)
	if !ok {
		return "several"
	}
	var d dto.Metric
	if m.Write(&d) != nil {
		return "unknown"
	}
	switch {
	case d.Counter != nil:
		return "counter"
	case d.Gauge != nil:
		return "gauge"
	case d.Histogram != nil:
		return "histogram"
	}
	return "unknown"
}

// Metrics describes those of our metrics that have been registered; the Go
// runtime's own are described by its documentation.
func (r *Recorder) Metrics() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var names []string
	for n := range r.help {
		if strings.HasPrefix(n, "meshca_") {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	var out strings.Builder
	out.WriteString("## Metrics\n\n| metric | type | labels | what it counts |\n|---|---|---|---|\n")
	for _, n := range names {
		fmt.Fprintf(&out, "| `%s` | %s | %s | %s |\n", n, r.kinds[n], code(r.labels[n]), cell(r.help[n]))
	}
	return out.String()
}

func code(s string) string {
	if s == "" {
		return ""
	}
	return "`" + s + "`"
}

func cell(s string) string { return strings.ReplaceAll(strings.ReplaceAll(s, "|", "\\|"), "\n", " ") }
