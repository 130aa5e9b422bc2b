package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestVerdict(t *testing.T) {
	const (
		pass = `{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.1}` + "\n"
		fail = `{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:1: no\n"}` + "\n" +
			`{"Action":"fail","Package":"p","Test":"TestB"}` + "\n" + `{"Action":"fail","Package":"p"}` + "\n"
		skip  = `{"Action":"output","Package":"p","Test":"TestC/sub","Output":"    c_test.go:1: no gnutls\n"}` + "\n" + `{"Action":"skip","Package":"p","Test":"TestC/sub"}` + "\n"
		build = `{"ImportPath":"p","Action":"build-output","Output":"p.go:1: undefined: x\n"}` + "\n" + `{"Action":"fail","Package":"p","FailedBuild":"p"}` + "\n"
	)
	for name, tt := range map[string]struct {
		list, input string
		wantErr     string // none if empty
		wantOut     []string
	}{
		"all well":      {"", pass, "", []string{"1 passed, 0 failed, 0 skipped\n"}},
		"a test fails":  {"", pass + fail, "1 tests failed", []string{"b_test.go:1: no", "1 passed, 1 failed, 0 skipped\n"}},
		"unlisted skip": {"", pass + skip, "TestC/sub", []string{"NOT LISTED", "no gnutls", "1 passed, 0 failed, 1 skipped\n"}},
		"listed skip":   {"# why\n\nTestC\tgnutls is not here\n", pass + skip, "", []string{"gnutls is not here", "1 passed, 0 failed, 1 skipped\n"}},
		"similar name":  {"TestC/su\twhatever\n", pass + skip, "TestC/sub", nil},
		"no reason":     {"TestC\t\n", pass, "line 1", nil},
		"build fails":   {"", pass + build, "failed in 1 packages", []string{"undefined: x"}},
		"nothing ran":   {"", "", "no test ran", nil},
		"time is up": {
			"", `{"Action":"output","Package":"p","Test":"TestD","Output":"panic: test timed out\n"}` + "\n" + `{"Action":"fail","Package":"p"}` + "\n",
			"in 1 packages", []string{"p: TestD\npanic: test timed out\n"},
		},
		"foreign output":   {"", "make: hello\n" + pass, "", []string{"make: hello\n"}},
		"no final newline": {"", strings.TrimSpace(pass), "", []string{"1 passed"}},
	} {
		t.Run(name, func(t *testing.T) {
			list := filepath.Join(t.TempDir(), "skips")
			if err := os.WriteFile(list, []byte(tt.list), 0o600); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			err := run([]string{list}, strings.NewReader(tt.input), &out)
			if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
				t.Errorf("err = %v, want %q", err, tt.wantErr)
			}
			for _, want := range tt.wantOut {
				if !strings.Contains(out.String(), want) {
					t.Errorf("output %q lacks %q", out.String(), want)
				}
			}
		})
	}
}
