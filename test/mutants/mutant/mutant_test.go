package mutant

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestIDs(t *testing.T) {
	for name, want := range map[string][]string{
		"TestV41_T1_CSRNeverWidens":   {"V41", "T1"},
		"TestSPIFFE25_ExactlyOneURI":  {"SPIFFE25"},
		"FuzzV53_PEM":                 {"V53"},
		"TestT6":                      {"T6"},
		"TestValidate":                nil,
		"TestTokens_V9":               nil, // ids come first
		"TestV01_LeadingZeroIsNoID":   nil,
		"BenchmarkL3_IsNoProofByItse": nil,
	} {
		if diff := cmp.Diff(want, IDs(name)); diff != "" {
			t.Errorf("IDs(%q): %s", name, diff)
		}
	}
}

// repository makes a tree with one file, one test and one list.
func repository(t *testing.T, list string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range map[string]string{
		"test/mutants/area.yaml": list,
		"pkg/pkg.go":             "package pkg\n\nfunc Limit(n int) bool { return n > 3 || n > 3 }\nfunc Odd(n int) bool { return n&1 == 1 }\n",
		"pkg/pkg_test.go":        "package pkg\n\nfunc TestT6_Odd() {}\n",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestCheck(t *testing.T) {
	for name, tt := range map[string]struct{ list, want string }{
		"fits": {
			`[{ids: [T6], control: odd, file: pkg/pkg.go, old: "n&1 == 1", new: "true", package: ./pkg, run: TestT6}]`, "",
		},
		"the text is there twice": {
			`[{ids: [T6], control: odd, file: pkg/pkg.go, old: "n > 3", new: "true", package: ./pkg, run: TestT6}]`, "occurs 2 times",
		},
		"the text is gone": {
			`[{ids: [T6], control: odd, file: pkg/pkg.go, old: "n > 4", new: "true", package: ./pkg, run: TestT6}]`, "occurs 0 times",
		},
		"nothing changes": {
			`[{ids: [T6], control: odd, file: pkg/pkg.go, old: "n&1", new: "n&1", package: ./pkg, run: TestT6}]`, "is the old one",
		},
		"no test": {
			`[{ids: [T6], control: odd, file: pkg/pkg.go, old: "n&1", new: "n", package: ./pkg, run: TestT66}]`, "has no test",
		},
		"the test answers another id": {
			`[{ids: [T7], control: odd, file: pkg/pkg.go, old: "n&1", new: "n", package: ./pkg, run: Test}]`, "has T7 in its name",
		},
		"no such id": {
			`[{ids: [X7], control: odd, file: pkg/pkg.go, old: "n&1", new: "n", package: ./pkg, run: Test}]`, `"X7" is not an id`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := repository(t, tt.list)
			all, err := Load(root)
			if err != nil {
				t.Fatal(err)
			}
			err = all[0].Check(root)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("Check = %v, want %q", err, tt.want)
			}
		})
	}
}

func TestLoadIsStrict(t *testing.T) {
	if _, err := Load(repository(t, `[{id: T6}]`)); err == nil {
		t.Error("an unknown key was accepted")
	}
}

func TestBlocksOfCodeMayBeginWithATab(t *testing.T) {
	all, err := Load(repository(t, "- ids: [T6]\n  old: |\n    \tif odd {\n    \t}\n  new: |\n    if true {\n    }\n"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "\tif odd {\n\t}\n"; all[0].Old != want {
		t.Errorf("old = %q, want %q", all[0].Old, want)
	}
	if want := "if true {\n}\n"; all[0].New != want {
		t.Errorf("new = %q, want %q", all[0].New, want)
	}
}
