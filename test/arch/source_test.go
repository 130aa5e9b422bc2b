package arch

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/testenv"
)

func repositoryRoot(t *testing.T) string {
	t.Helper()
	root, err := testenv.RepositoryRoot()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// repositoryFiles are those that git tracks or would, relative to the root.
func repositoryFiles(t *testing.T) []string {
	t.Helper()
	cmd := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard")
	cmd.Dir = repositoryRoot(t)
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("not in a git checkout: %v", err)
	}
	var files []string
	for name := range strings.Lines(string(out)) {
		name = strings.TrimSpace(name)
		if _, err := os.Stat(filepath.Join(cmd.Dir, name)); err == nil { // deleted, not yet committed
			files = append(files, name)
		}
	}
	return files
}

// source is a parsed Go file.
type source struct {
	name string // relative to the root
	set  *token.FileSet
	file *ast.File
}

func (s source) at(n ast.Node) string {
	return fmt.Sprintf("%s:%d", s.name, s.set.Position(n.Pos()).Line)
}

func (s source) isTest() bool { return strings.HasSuffix(s.name, "_test.go") }

// importName is what a file calls an imported package, or "" if it does not.
func (s source) importName(path string) string {
	for _, i := range s.file.Imports {
		if strings.Trim(i.Path.Value, `"`) != path {
			continue
		}
		if i.Name != nil {
			return i.Name.Name
		}
		return path[strings.LastIndex(path, "/")+1:]
	}
	return ""
}

// goSources parses all Go files that people wrote.
func goSources(t *testing.T) []source {
	t.Helper()
	root := repositoryRoot(t)
	var all []source
	for _, name := range repositoryFiles(t) {
		if !strings.HasSuffix(name, ".go") {
			continue
		}
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, filepath.Join(root, name), nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !ast.IsGenerated(f) {
			all = append(all, source{name, set, f})
		}
	}
	return all
}

func TestOnePackageCommentEach(t *testing.T) {
	comments := make(map[string][]string) // by directory
	for _, s := range goSources(t) {
		if s.isTest() {
			continue
		}
		dir := filepath.Dir(s.name)
		comments[dir] = append(comments[dir], []string{}...) // none is found, too
		if s.file.Doc != nil {
			comments[dir] = append(comments[dir], s.name)
			if text := s.file.Doc.Text(); !strings.HasPrefix(text, commentStart(s)) && !strings.HasPrefix(text, "Command ") {
				t.Errorf("%s: the package comment begins %.30q, want %q", s.name, text, commentStart(s))
			}
		}
	}
	for dir, files := range comments {
		if len(files) != 1 {
			t.Errorf("%s has %d package comments, want exactly one: %q", dir, len(files), files)
		}
	}
}

// commentStart is how Go's tools expect a package comment to begin; a program's
// begins with its name.
func commentStart(s source) string {
	if s.file.Name.Name != "main" {
		return "Package " + s.file.Name.Name + " "
	}
	program := filepath.Base(filepath.Dir(s.name))
	return strings.ToUpper(program[:1]) + program[1:] + " "
}

// TestNoSleepInTests: what waits by the clock is slow on a fast machine and
// wrong on a slow one. Inside a synctest bubble time is not the clock's, so a
// function that makes one may sleep.
func TestNoSleepInTests(t *testing.T) {
	for _, s := range goSources(t) {
		if !s.isTest() && !strings.HasPrefix(s.name, "test/") {
			continue
		}
		name, bubble := s.importName("time"), s.importName("testing/synctest")
		if name == "" {
			continue
		}
		for _, d := range s.file.Decls {
			sleeps, bubbles := []ast.Node{}, false
			ast.Inspect(d, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok {
					bubbles = bubbles || bubble != "" && isSelector(call.Fun, bubble, "Test")
					if isSelector(call.Fun, name, "Sleep") {
						sleeps = append(sleeps, call)
					}
				}
				return true
			})
			for _, call := range sleeps {
				if !bubbles {
					t.Errorf("%s: time.Sleep outside a test with a synctest bubble; wait for the thing itself", s.at(call))
				}
			}
		}
	}
}

// TestNoSharedGlobals: loggers and registries come in a Config, and nothing
// happens because a package was linked.
func TestNoSharedGlobals(t *testing.T) {
	forbidden := map[string][]string{
		"log/slog": {"Default", "SetDefault", "Debug", "Info", "Warn", "Error", "Log", "DebugContext", "InfoContext", "WarnContext", "ErrorContext"},
		"github.com/prometheus/client_golang/prometheus": {"DefaultRegisterer", "DefaultGatherer", "MustRegister", "Register"},
		"github.com/prometheus/client_golang/prometheus/promauto": {
			"NewCounter", "NewCounterVec", "NewGauge", "NewGaugeVec", "NewGaugeFunc", "NewHistogram", "NewHistogramVec", "NewSummary",
		},
		"net/http": {"DefaultServeMux", "Handle", "HandleFunc"},
		"flag":     {"String", "Bool", "Int", "Duration", "StringVar", "BoolVar", "IntVar", "DurationVar", "Parse"},
	}
	for _, s := range goSources(t) {
		for _, d := range s.file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s: func init", s.at(fn))
			}
		}
		if s.isTest() { // -update flags of golden files
			continue
		}
		for path, names := range forbidden {
			imported := s.importName(path)
			if imported == "" {
				continue
			}
			ast.Inspect(s.file, func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok && slices.Contains(names, sel.Sel.Name) && isSelector(sel, imported, sel.Sel.Name) {
					t.Errorf("%s: %s.%s is shared by the whole process; take it from a Config", s.at(sel), imported, sel.Sel.Name)
				}
				return true
			})
		}
	}
}

// TestV64_NothingTakesAnyUsage: a verification that passes "any usage" skips more
// than usages (CVE-2025-22874: policies as well), and a certificate that has it
// is good for whatever its thief likes.
func TestV64_NothingTakesAnyUsage(t *testing.T) {
	for _, s := range goSources(t) {
		imported := s.importName("crypto/x509")
		// What stands in for a bad peer may have it.
		if imported == "" || s.isTest() || strings.Contains(s.name, "/identitytest/") {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			if e, ok := n.(ast.Expr); ok && isSelector(e, imported, "ExtKeyUsageAny") {
				t.Errorf("%s: x509.ExtKeyUsageAny", s.at(n))
			}
			return true
		})
	}
}

func isSelector(e ast.Expr, pkg, name string) bool {
	sel, ok := e.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != name {
		return false
	}
	id, ok := sel.X.(*ast.Ident)
	return ok && id.Name == pkg
}

// TestNoForeignPlaces keeps one machine's paths and the hosts that packages
// are fetched from out of the repository: they are not the same everywhere.
func TestNoForeignPlaces(t *testing.T) {
	// Written in pieces, or the list would find itself.
	words := []string{
		"/wo" + `rk/`, "/tmp/" + "team", "/tmp/" + "probe", `\.\./sha` + "red",
		"pypi" + `\.org`, "python" + "hosted", "proxy" + `\.golang`, "sum" + `\.golang`, "npmjs" + `\.`, "crates" + `\.io`, "deb" + `\.debian\.org`,
	}
	pattern := regexp.MustCompile(`(^|[^\w.])(` + strings.Join(words, "|") + ")")
	root := repositoryRoot(t)
	for _, name := range repositoryFiles(t) {
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			continue // a link to nowhere
		}
		line := 0
		for text := range strings.Lines(string(content)) {
			line++
			if found := pattern.FindString(text); found != "" {
				t.Errorf("%s:%d: %q", name, line, found)
			}
		}
	}
}

func TestV68_GoIsNotBelowItsFloor(t *testing.T) {
	for _, tt := range []struct {
		have, floor string
		ok          bool
	}{
		{"go1.26.8", "1.26.8", true}, {"go1.26.9", "1.26.8", true}, {"go1.27.0", "1.26.8", true},
		{"go1.26.7", "1.26.8", false}, {"go1.26", "1.26.8", false}, {"go1.9.9", "1.26.8", false},
		{"go1.26.8", "a new one", false},
	} {
		if err := checkGoFloor(tt.have, tt.floor); (err == nil) != tt.ok {
			t.Errorf("checkGoFloor(%q, %q) = %v", tt.have, tt.floor, err)
		}
	}
	content, err := os.ReadFile(filepath.Join(repositoryRoot(t), "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	floor := regexp.MustCompile(`(?m)^go (\S+)$`).FindSubmatch(content)
	if floor == nil {
		t.Fatal("go.mod names no Go version")
	}
	if err := checkGoFloor(runtime.Version(), string(floor[1])); err != nil {
		t.Error(err)
	}
}
