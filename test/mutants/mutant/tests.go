package mutant

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strings"
)

var idPattern = regexp.MustCompile(`^(SPIFFE|V|T|F|L)[1-9][0-9]*$`)

// Test is a test function or a fuzz target in the source.
type Test struct {
	Name string
	File string // base name
}

// TestsIn finds the tests of the package in a directory, by their names.
func TestsIn(dir string) ([]Test, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		return nil, err
	}
	var tests []Test
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, fmt.Errorf("looking for tests: %w", err)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if ok && fn.Recv == nil && fn.Name.Name != "TestMain" &&
				(strings.HasPrefix(fn.Name.Name, "Test") || strings.HasPrefix(fn.Name.Name, "Fuzz")) {
				tests = append(tests, Test{Name: fn.Name.Name, File: filepath.Base(file)})
			}
		}
	}
	return tests, nil
}

// IDs are the requirements that a test says it answers: TestV41_T1_CSRNever…
// answers V41 and T1.
func IDs(test string) []string {
	rest, ok := strings.CutPrefix(test, "Test")
	if !ok {
		rest, ok = strings.CutPrefix(test, "Fuzz")
	}
	if !ok {
		return nil
	}
	var ids []string
	for part := range strings.SplitSeq(rest, "_") {
		if !idPattern.MatchString(part) {
			break
		}
		ids = append(ids, part)
	}
	return ids
}

// Answering are those tests that answer the id.
func Answering(tests []string, id string) []string {
	var found []string
	for _, t := range tests {
		for _, have := range IDs(t) {
			if have == id {
				found = append(found, t)
			}
		}
	}
	return found
}
