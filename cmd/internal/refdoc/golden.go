package refdoc

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Head begins every generated page.
const Head = "<!-- Generated from the program; change the code and run `make generate`. -->\n\n"

// StaleError says that a page on disk is not what the program says.
type StaleError struct{ File string }

func (e *StaleError) Error() string {
	return fmt.Sprintf("%s is not what the program says; run: make generate", e.File)
}

// Check compares a page with the file that holds it, or writes the file.
func Check(file, page string, update bool) error {
	if update {
		return os.WriteFile(file, []byte(page), 0o644)
	}
	have, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !bytes.Equal(have, []byte(page)) {
		return &StaleError{file}
	}
	return nil
}
