package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/mutants/mutant"
)

const (
	limits = `package limits

func TooLong(n int) bool { return n > 3 }
func TooShort(n int) bool { return n < 1 }
func Odd(n int) bool { return n&1 == 1 }
`
	limitsTest = `package limits

import "testing"

func TestT1_TooLong(t *testing.T) {
	if !TooLong(4) {
		t.Error("4 is too long")
	}
}

func TestT2_TooShort(t *testing.T) {
	if TooShort(2) {
		t.Error("2 is not too short")
	}
}

func TestT3_Odd(t *testing.T) {
	t.Skip("not today")
}

func TestT4_Forever(t *testing.T) {
	if !Odd(3) {
		panic("3 is odd")
	}
}

func TestV5_AfterThePanic(t *testing.T) {
	if !Odd(5) {
		t.Error("5 is odd")
	}
}
`
)

// TestRunner proves the prover: on a small module of its own it must tell
// controls whose tests notice from those whose tests do not.
func TestRunner(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{
		"go.mod": "module limits\n\ngo 1.26\n", "limits.go": limits, "limits_test.go": limitsTest,
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		mutant mutant.Mutant
		want   string // in the reason why it is hollow; red if empty
	}{
		{mutant.Mutant{IDs: []string{"T1"}, Old: "n > 3", New: "false", Run: "TestT1"}, ""},
		{mutant.Mutant{IDs: []string{"T2"}, Old: "n < 1", New: "false", Run: "TestT2"}, "no test for T2 noticed"},
		{mutant.Mutant{IDs: []string{"T1", "T2"}, Old: "n > 3", New: "false", Run: "TestT"}, "no test for T2 noticed"},
		{mutant.Mutant{IDs: []string{"T3"}, Old: "n&1 == 1", New: "false", Run: "TestT3"}, "is skipped"},
		{mutant.Mutant{IDs: []string{"T1"}, Old: "n > 3", New: "never", Run: "TestT1"}, "does not compile"},
		{mutant.Mutant{IDs: []string{"T4", "V5"}, Old: "n&1 == 1", New: "false", Run: "Test"}, ""},
	}
	var all []*mutant.Mutant
	for i := range tests {
		m := &tests[i].mutant
		m.Area, m.Nth, m.File, m.Package = "limits", i+1, "limits.go", "."
		all = append(all, m)
	}
	var out bytes.Buffer
	r := &runner{root: root, parallel: 2, stdout: &out, stderr: io.Discard}
	if err := r.run(t.Context(), all); err == nil || !strings.Contains(err.Error(), "4 of 6") {
		t.Errorf("err = %v, want 4 of 6 to be hollow", err)
	}
	told := strings.Split(out.String(), "limits/")[1:]
	for i, tt := range tests {
		if tt.want != "" && !strings.Contains(told[i], tt.want) {
			t.Errorf("mutant %d: told %q, want %q", i+1, told[i], tt.want)
		}
		if tt.want == "" && strings.Contains(told[i], "no test") {
			t.Errorf("mutant %d: told %q, want red", i+1, told[i])
		}
	}
}
