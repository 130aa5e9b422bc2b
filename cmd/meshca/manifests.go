package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"

	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/identity/inputfile"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/lint"
	"github.com/meshca/meshca/policy/manifest"
	"github.com/meshca/meshca/policy/policydir"
)

// Files given on a command line may be whole clusters' pods, other than those that
// a proxy reads again and again.
const (
	maxManifestFile    = 64 << 20
	maxManifestObjects = 500_000
)

// manifests is what stands in the files of a command line.
type manifests struct {
	policies []lint.Policy // each name once
	services []manifest.Service
	pods     []manifest.Pod
	broken   []*manifestError
	files    int
	notRead  map[string]int     // objects of other kinds, by kind
	seen     map[policy.Ref]int // positions in policies
}

// manifestError says why a file, or a policy in it, cannot be used.
type manifestError struct {
	file   string
	line   int
	code   string // of a finding
	policy policy.Ref
	text   string
}

func (e *manifestError) Error() string {
	where := e.file
	if e.line > 0 {
		where = fmt.Sprintf("%s:%d", e.file, e.line)
	}
	if e.policy != (policy.Ref{}) {
		where += ": " + e.policy.String()
	}
	return fmt.Sprintf("%s: %s", where, e.text)
}

// loadManifests reads files and directories. What is wrong inside a file is in the
// result; the error is about files that cannot be read.
func loadManifests(stdin io.Reader, paths []string) (*manifests, error) {
	m := &manifests{notRead: make(map[string]int), seen: make(map[policy.Ref]int)}
	for _, path := range paths {
		if path == "-" {
			data, err := io.ReadAll(io.LimitReader(stdin, maxManifestFile+1))
			if err != nil {
				return nil, fmt.Errorf("reading standard input: %w", err)
			}
			m.add("standard input", data)
			continue
		}
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, cli.Usagef("-f %q: there is no such file or directory", path)
		} else if err != nil {
			return nil, fmt.Errorf("reading policies: %w", err)
		}
		files := []string{path}
		if info.IsDir() {
			if files, err = listManifests(path); err != nil {
				return nil, err
			}
		}
		for _, file := range files {
			data, err := inputfile.Read(file, maxManifestFile)
			if err != nil {
				return nil, fmt.Errorf("reading policies: %w", err)
			}
			m.add(file, data)
		}
	}
	return m, nil
}

func listManifests(dir string) ([]string, error) {
	names, err := policydir.List(dir)
	if err != nil {
		return nil, fmt.Errorf("reading policies: %w", err)
	}
	for i, name := range names {
		names[i] = filepath.Join(dir, name)
	}
	return names, nil
}

func (m *manifests) add(file string, data []byte) {
	m.files++
	if len(data) > maxManifestFile {
		m.broken = append(m.broken, &manifestError{file: file, code: "PV0", text: fmt.Sprintf("it has more than %d bytes", maxManifestFile)})
		return
	}
	c, err := manifest.Parse(data, maxManifestObjects)
	if err != nil {
		e := &manifestError{file: file, code: "PV0", text: err.Error()}
		var syntax *manifest.SyntaxError
		if errors.As(err, &syntax) {
			e.line, e.text = syntax.Line, syntax.Text
		}
		m.broken = append(m.broken, e)
		return
	}
	if c.Objects == 0 && c.Lists == 0 {
		// The CA takes an empty file for one that is being written.
		m.broken = append(m.broken, &manifestError{file: file, code: "PV0", text: "it holds no object, and what it said before would stay in force; remove the file, or put an empty list into it"})
		return
	}
	for kind, n := range c.Others {
		m.notRead[kind] += n
	}
	m.services = append(m.services, c.Services...)
	m.pods = append(m.pods, c.Pods...)
	for _, p := range c.Policies {
		m.addPolicy(file, p)
	}
}

// addPolicy keeps the first of a name. Another of that name is an error unless it
// says the same: in a cluster there would be one, and nothing tells which.
func (m *manifests) addPolicy(file string, p manifest.Policy) {
	if at, twice := m.seen[p.Ref]; twice && p.Name != "" {
		first := m.policies[at]
		if first.Mode != p.Mode || !first.Created.Equal(p.Created) || !maps.Equal(first.Selector, p.Selector) || !maps.Equal(first.Ports, p.Ports) {
			m.broken = append(m.broken, &manifestError{file, p.Line, "PV0", p.Ref, fmt.Sprintf("it is in %s:%d too, and they differ", first.File, first.Line)})
		}
		return
	}
	m.seen[p.Ref] = len(m.policies)
	m.policies = append(m.policies, lint.Policy{Policy: p, File: file})
}
