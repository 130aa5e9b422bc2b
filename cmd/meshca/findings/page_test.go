package findings

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/ca/kube/report"
	"github.com/meshca/meshca/cmd/internal/refdoc"
)

var update = flag.Bool("update", false, "write docs/findings.md")

func TestPageIsCurrent(t *testing.T) {
	if err := refdoc.Check("../../../docs/findings.md", refdoc.Head+Markdown(), *update); err != nil {
		t.Error(err)
	}
}

// Every code that the linter and the status can say has a page, and no page is of a
// code that nobody says.
func TestEveryCodeHasAPage(t *testing.T) {
	said := []string{
		report.Refused, report.EndingSoon, report.Refusing, report.BundleBehind, report.PolicyBehind, "disconnected", "unknown",
	}
	code := regexp.MustCompile(`"(P[VAL][0-9]+|MC[0-9]{4})"`)
	for _, dir := range []string{"../../../policy/lint", "../../../policy/manifest", "../../../ca/kube/check"} {
		files, err := filepath.Glob(dir + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range code.FindAllStringSubmatch(string(text), -1) {
				said = append(said, m[1])
			}
		}
	}
	slices.Sort(said)
	said = slices.Compact(said)
	have := Codes()
	slices.Sort(have)
	if !slices.Equal(said, have) {
		t.Errorf("said are\n%v, and pages are of\n%v", said, have)
	}
	for _, p := range All() {
		if p.Title == "" || p.Means == "" || p.Do == "" || strings.HasSuffix(p.Title, ".") {
			t.Errorf("%+v", p)
		}
	}
	if p, ok := Find("pv3"); !ok || p.Code != "PV3" {
		t.Errorf("pv3 is %+v", p)
	}
}
