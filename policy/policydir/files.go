package policydir

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// List returns the names of the policy files in a directory, sorted: those that end
// in .yaml, .yml or .json and do not begin with a dot. Directories in it are not
// entered.
func List(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		switch filepath.Ext(name) {
		case ".yaml", ".yml", ".json":
			return strings.HasPrefix(name, ".")
		}
		return true
	})
	slices.Sort(names)
	return names, nil
}
