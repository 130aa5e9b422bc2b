// Package table keeps figures beside their goals, as raw results and as a page.
package table

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/meshca/meshca/test/bench/measure"
)

// Figure is one measured thing: a value from each round, in the order of rounds.
type Figure struct {
	Group  string    `json:"group"` // what is measured
	Of     string    `json:"of"`    // whose figure it is: meshca, or who is compared
	Unit   string    `json:"unit"`
	Rounds []float64 `json:"rounds"`
	Goal   *Goal     `json:"goal,omitempty"`
	Note   string    `json:"note,omitempty"`
}

// Goal is a limit on the median.
type Goal struct {
	Limit float64 `json:"limit"`          // in the figure's unit
	Least bool    `json:"least"`          // the limit is a floor, else a ceiling
	From  string  `json:"from,omitempty"` // where a limit comes from that was measured too
}

// AtMost and AtLeast are goals that were set beforehand.
func AtMost(limit float64) *Goal { return &Goal{Limit: limit} }

// AtLeast is a goal that is a floor.
func AtLeast(limit float64) *Goal { return &Goal{Limit: limit, Least: true} }

// Median is the figure's value.
func (f *Figure) Median() float64 { return measure.Median(f.Rounds) }

// Met reports whether the goal holds; a figure without one has nothing to meet.
func (f *Figure) Met() bool {
	switch {
	case f.Goal == nil:
		return true
	case f.Goal.Least:
		return f.Median() >= f.Goal.Limit
	}
	return f.Median() <= f.Goal.Limit
}

// Part is all that one part of a run measured, with what it was measured on.
type Part struct {
	Name     string            `json:"name"`
	Title    string            `json:"title"`
	Method   string            `json:"method"` // how it was measured
	Machine  string            `json:"machine"`
	Versions map[string]string `json:"versions"`
	Commit   string            `json:"commit"`
	Command  string            `json:"command"`
	Quick    bool              `json:"quick"`
	Began    time.Time         `json:"began"`
	Took     float64           `json:"took_seconds"`
	Figures  []*Figure         `json:"figures"`
	Series   []Series          `json:"series,omitempty"`
	Profiles []Profile         `json:"profiles,omitempty"`
}

// Profile is where the time or the memory of a program of a part goes: what pprof's
// table says.
type Profile struct {
	Name  string `json:"name"`  // of its file
	Title string `json:"title"` // what, and of what
	Text  string `json:"-"`     // is that file
}

// Series is a curve or a histogram, for a picture.
type Series struct {
	Name  string `json:"name"` // of the picture's file
	Title string `json:"title"`
	X     string `json:"x"`
	Y     string `json:"y"`
	Lines []Line `json:"lines"`
	Bars  bool   `json:"bars,omitempty"`
	LogX  bool   `json:"log_x,omitempty"`
}

// Line is one line of a picture.
type Line struct {
	Name string    `json:"name"`
	X    []float64 `json:"x"`
	Y    []float64 `json:"y"`
}

// Add puts a round's value to a figure, which it makes when it is the first.
func (p *Part) Add(group, of, unit string, value float64) *Figure {
	i := slices.IndexFunc(p.Figures, func(f *Figure) bool { return f.Group == group && f.Of == of })
	if i < 0 {
		i = len(p.Figures)
		p.Figures = append(p.Figures, &Figure{Group: group, Of: of, Unit: unit})
	}
	p.Figures[i].Rounds = append(p.Figures[i].Rounds, value)
	return p.Figures[i]
}

// Find returns a figure, nil if there is none.
func (p *Part) Find(group, of string) *Figure {
	i := slices.IndexFunc(p.Figures, func(f *Figure) bool { return f.Group == group && f.Of == of })
	if i < 0 {
		return nil
	}
	return p.Figures[i]
}

// Save writes the raw results of a part into a directory.
func (p *Part) Save(dir string) error {
	content, err := json.MarshalIndent(p, "", " ")
	if err != nil {
		return fmt.Errorf("writing the results of %s: %w", p.Name, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("writing the results of %s: %w", p.Name, err)
	}
	for _, f := range p.Profiles {
		if err := os.WriteFile(filepath.Join(dir, f.Name+".txt"), []byte(f.Text), 0o644); err != nil {
			return fmt.Errorf("writing the results of %s: %w", p.Name, err)
		}
	}
	return os.WriteFile(filepath.Join(dir, p.Name+".json"), append(content, '\n'), 0o644)
}

// Load reads the parts that are there, in the order of names.
func Load(dir string, names []string) ([]*Part, error) {
	var parts []*Part
	for _, name := range names {
		content, err := os.ReadFile(filepath.Join(dir, name+".json"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the results of %s: %w", name, err)
		}
		p := &Part{}
		if err := json.Unmarshal(content, p); err != nil {
			return nil, fmt.Errorf("reading the results of %s: %w", name, err)
		}
		parts = append(parts, p)
	}
	return parts, nil
}
