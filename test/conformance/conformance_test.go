package conformance

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/meshca/meshca/test/testenv"
)

var update = flag.Bool("update", false, "write docs/conformance.md")

func TestPageIsFresh(t *testing.T) {
	root, err := testenv.RepositoryRoot()
	if err != nil {
		t.Fatal(err)
	}
	page, err := Page(root)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(root, "docs", "conformance.md")
	if *update {
		if err := os.WriteFile(path, page, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if old, err := os.ReadFile(path); err != nil || !bytes.Equal(old, page) {
		t.Errorf("docs/conformance.md is stale (%v); run make conformance", err)
	}
}

func TestAnIDCountsOnlyWithBoth(t *testing.T) {
	for name, tt := range map[string]struct {
		e    evidence
		want bool
	}{
		"test and mutant": {evidence{tests: []string{"ca.TestT6"}, controls: []string{"clamp"}}, true},
		"test alone":      {evidence{tests: []string{"ca.TestT6"}}, false},
		"mutant alone":    {evidence{controls: []string{"clamp"}}, false},
	} {
		if got := tt.e.counts(); got != tt.want {
			t.Errorf("%s: counts = %v, want %v", name, got, tt.want)
		}
	}
}
