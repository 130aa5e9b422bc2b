package main

import (
	"io"
	"testing"

	"github.com/meshca/meshca/test/mutants/mutant"
	"github.com/meshca/meshca/test/testenv"
)

// TestMutantsFit finds those that an edit of the code has left behind.
func TestMutantsFit(t *testing.T) {
	root, err := testenv.RepositoryRoot()
	if err != nil {
		t.Fatal(err)
	}
	all, err := mutant.Load(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if err := m.Check(root); err != nil {
			t.Error(err)
		}
	}
}

func TestUnknownAreaIsAnError(t *testing.T) {
	if err := run(t.Context(), []string{"-area", "no such area"}, io.Discard, io.Discard); err == nil {
		t.Error("no error; a typing error would look like a proof")
	}
}
