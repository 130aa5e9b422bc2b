package mutant

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Mutant is one control, switched off.
type Mutant struct {
	// IDs are the requirements that the control answers. Each of them must
	// stand in the name of a test that goes red.
	IDs []string `yaml:"ids"`
	// Control says in plain words what is switched off.
	Control string `yaml:"control"`
	// File is the one to edit, from the repository's root.
	File string `yaml:"file"`
	// Old occurs exactly once in File and is replaced by New.
	Old string `yaml:"old"`
	New string `yaml:"new"`
	// Package holds the tests, as ./path from the repository's root.
	Package string `yaml:"package"`
	// Run selects tests, as go test's -run does.
	Run string `yaml:"run"`

	// Area is the name of the list, without its ending. Nth counts from 1.
	Area string `yaml:"-"`
	Nth  int    `yaml:"-"`
}

// Name tells this mutant from all others.
func (m *Mutant) Name() string { return fmt.Sprintf("%s/%d", m.Area, m.Nth) }

// Load reads all lists, in the order of their names.
func Load(root string) ([]*Mutant, error) {
	files, err := filepath.Glob(filepath.Join(root, "test", "mutants", "*.yaml"))
	if err != nil {
		return nil, err
	}
	var all []*Mutant
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("reading mutants: %w", err)
		}
		var list []*Mutant
		d := yaml.NewDecoder(bytes.NewReader(tabbedBlocks(content)))
		d.KnownFields(true)
		if err := d.Decode(&list); err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("reading mutants: %s: %w", filepath.Base(file), err)
		}
		for i, m := range list {
			m.Area, m.Nth = strings.TrimSuffix(filepath.Base(file), ".yaml"), i+1
		}
		all = append(all, list...)
	}
	return all, nil
}

var tabbedBlock = regexp.MustCompile(`(?m)^( *)(\w+): \|(\n *)\t`)

// tabbedBlocks lets a block of Go begin with a tab. A parser that has to find
// out how far a block is indented stumbles over that, so it is told.
func tabbedBlocks(content []byte) []byte {
	return tabbedBlock.ReplaceAllFunc(content, func(found []byte) []byte {
		m := tabbedBlock.FindSubmatch(found)
		key, indent := m[1], len(m[3])-1-len(m[1])
		if indent < 1 || indent > 9 {
			return found
		}
		return fmt.Appendf(nil, "%s%s: |%d%s\t", key, m[2], indent, m[3])
	})
}

// Apply returns File's content with the control switched off.
func (m *Mutant) Apply(root string) ([]byte, error) {
	content, err := os.ReadFile(filepath.Join(root, m.File))
	if err != nil {
		return nil, err
	}
	if n := bytes.Count(content, []byte(m.Old)); m.Old == "" || n != 1 {
		return nil, fmt.Errorf("the old text occurs %d times in %s, must be exactly once:\n%s", n, m.File, m.Old)
	}
	return bytes.Replace(content, []byte(m.Old), []byte(m.New), 1), nil
}

// Check finds what can be found wrong without compiling anything.
func (m *Mutant) Check(root string) error {
	var errs []error
	if m.Control == "" {
		errs = append(errs, errors.New("no control is named"))
	}
	if m.Old == m.New {
		errs = append(errs, errors.New("the new text is the old one"))
	}
	if _, err := m.Apply(root); err != nil {
		errs = append(errs, err)
	}
	tests, err := m.tests(root)
	if err != nil {
		errs = append(errs, err)
	} else if len(tests) == 0 {
		errs = append(errs, fmt.Errorf("%s has no test that matches %q", m.Package, m.Run))
	}
	if len(m.IDs) == 0 {
		errs = append(errs, errors.New("no ids are listed"))
	}
	for _, id := range m.IDs {
		if !idPattern.MatchString(id) {
			errs = append(errs, fmt.Errorf("%q is not an id", id))
		} else if len(tests) > 0 && len(Answering(tests, id)) == 0 {
			errs = append(errs, fmt.Errorf("none of the tests that match %q has %s in its name", m.Run, id))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("mutant %s (%s): %w", m.Name(), m.Control, err)
	}
	return nil
}

// tests are the names of the tests that Run selects, by the source.
func (m *Mutant) tests(root string) ([]string, error) {
	top, _, _ := strings.Cut(m.Run, "/")
	pattern, err := regexp.Compile(top)
	if err != nil {
		return nil, err
	}
	all, err := TestsIn(filepath.Join(root, m.Package))
	if err != nil {
		return nil, err
	}
	var selected []string
	for _, t := range all {
		if pattern.MatchString(t.Name) {
			selected = append(selected, t.Name)
		}
	}
	return selected, nil
}
