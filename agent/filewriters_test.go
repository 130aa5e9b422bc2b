package agent

import (
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"testing"
)

// fileWriters returns the calls in a source file that can create or change a
// file. os.OpenFile counts unless its flags begin with O_RDONLY.
func fileWriters(t *testing.T, name string, src []byte) []string {
	t.Helper()
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, src, 0)
	if err != nil {
		t.Fatal(err)
	}
	writers := []string{"Create", "CreateTemp", "WriteFile", "Rename", "Link", "Symlink", "Mkdir", "MkdirAll", "MkdirTemp", "CopyFS", "NewFile", "OpenRoot"}
	var found []string
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		pkg, ok := sel.X.(*ast.Ident)
		if !ok || pkg.Name != "os" && pkg.Name != "syscall" && pkg.Name != "ioutil" {
			return true
		}
		if slices.Contains(writers, sel.Sel.Name) || sel.Sel.Name == "OpenFile" && !readOnly(call) {
			found = append(found, fset.Position(call.Pos()).String()+": "+pkg.Name+"."+sel.Sel.Name)
		}
		return true
	})
	return found
}

func readOnly(call *ast.CallExpr) bool {
	flags := call.Args[1]
	for {
		switch e := flags.(type) {
		case *ast.BinaryExpr:
			flags = e.X
			continue
		case *ast.SelectorExpr:
			return e.Sel.Name == "O_RDONLY"
		}
		return false
	}
}
