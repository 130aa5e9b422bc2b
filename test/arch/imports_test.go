package arch

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/meshca/meshca"

// pkg is what go list says of a package.
type pkg struct {
	ImportPath string
	Name       string
	Imports    []string
	Deps       []string
	Standard   bool
	Error      *struct{ Err string }
}

// local is the path inside the module, or "" for a package of others.
func local(importPath string) string {
	rest, ok := strings.CutPrefix(importPath, module+"/")
	if !ok {
		return ""
	}
	return rest
}

// area is the part of the design that a package belongs to.
func area(importPath string) string {
	first, _, _ := strings.Cut(local(importPath), "/")
	return first
}

func listPackages(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Name,Imports,Deps,Standard,Error", "./...")
	cmd.Dir = repositoryRoot(t)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	all := make(map[string]pkg)
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[p.ImportPath] = p
	}
}

// isKit tells packages that stand in for something in tests. Only tests, the
// demo and other kits may use them.
func isKit(importPath string) bool {
	l := local(importPath)
	return strings.HasPrefix(l, "test/") || strings.HasSuffix(path.Base(l), "test") || path.Base(l) == "tokenissuer"
}

// TestWhoMayImportWhom is the table of docs/design.md.
func TestWhoMayImportWhom(t *testing.T) {
	may := map[string][]string{
		"cmd":      {"agent", "ca", "sds", "proxy", "policy", "identity", "wire"},
		"ca":       {"policy", "identity", "wire"},
		"agent":    {"sds", "policy", "identity", "wire"},
		"sds":      {"policy", "identity", "wire"},
		"proxy":    {"policy", "identity"},
		"policy":   {"identity"},
		"identity": {},
		"wire":     {"policy", "identity"},
	}
	for _, p := range listPackages(t) {
		from := area(p.ImportPath)
		if from == "" || from == "test" {
			continue
		}
		if _, ok := may[from]; !ok {
			t.Errorf("%s: %q is no part of the design; add it to the table here and in docs/design.md", p.ImportPath, from)
		}
		for _, i := range p.Imports {
			to := area(i)
			if to != "" && to != from && !slices.Contains(may[from], to) {
				t.Errorf("%s imports %s; %s may import %q only", local(p.ImportPath), local(i), from, may[from])
			}
			if isKit(i) && !isKit(p.ImportPath) && !strings.HasPrefix(local(p.ImportPath), "cmd/meshca/demo") {
				t.Errorf("%s imports %s, which stands in for something in tests", local(p.ImportPath), local(i))
			}
		}
	}
}

// kubeletRegistration is what the kubelet asks a plugin, and nothing else: generated
// messages.
const kubeletRegistration = "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

// TestWhatPodsLink keeps the CA, and a Kubernetes client, out of the programs
// that run beside every workload. Of Kubernetes, the agent has the messages by
// which a kubelet registers plugins, and the proxy nothing.
func TestWhatPodsLink(t *testing.T) {
	packages := listPackages(t)
	for _, program := range []string{"cmd/agent", "cmd/proxy"} {
		p, ok := packages[module+"/"+program]
		if !ok {
			t.Logf("%s does not exist yet", program)
			continue
		}
		for _, d := range p.Deps {
			kube := strings.HasPrefix(d, "k8s.io/") && (program != "cmd/agent" || d != kubeletRegistration)
			if area(d) == "ca" || kube || d == "testing" {
				t.Errorf("%s links %s", program, d)
			}
		}
	}
}

// TestWhereKubernetesTypesStop keeps client-go and the API's types in the packages
// that turn them into nouns of ours, and where those are wired.
func TestWhereKubernetesTypesStop(t *testing.T) {
	for _, p := range listPackages(t) {
		l := local(p.ImportPath)
		if l == "" || strings.HasPrefix(l, "ca/kube/") || l == "cmd/meshca" {
			continue
		}
		for _, i := range p.Imports {
			for _, prefix := range []string{"k8s.io/client-go", "k8s.io/api/", "k8s.io/apimachinery"} {
				if strings.HasPrefix(i, prefix) {
					t.Errorf("%s imports %s; only packages below ca/kube may", l, i)
				}
			}
		}
	}
}

// TestImportDepthAndFanOut reports both for every program and package, and
// bounds what readers have to hold in their heads.
func TestImportDepthAndFanOut(t *testing.T) {
	const maxDepth, maxFanOut = 5, 8
	packages := listPackages(t)
	depth := make(map[string]int)
	var measure func(string) int
	measure = func(p string) int {
		if d, ok := depth[p]; ok {
			return d
		}
		deepest := 0
		for _, i := range packages[p].Imports {
			if local(i) != "" {
				deepest = max(deepest, measure(i)+1)
			}
		}
		depth[p] = deepest
		return deepest
	}
	for path, p := range packages {
		if local(path) == "" || area(path) == "test" {
			continue
		}
		fanOut := 0
		for _, i := range p.Imports {
			if local(i) != "" {
				fanOut++
			}
		}
		t.Logf("%-32s fan-out %d, depth %d", local(path), fanOut, measure(path))
		// Programs wire everything, in one readable column: their width is no burden.
		if fanOut > maxFanOut && area(path) != "cmd" {
			t.Errorf("%s imports %d packages of ours, at most %d", local(path), fanOut, maxFanOut)
		}
		if p.Name == "main" && measure(path) > maxDepth {
			t.Errorf("%s is %d imports deep, at most %d", local(path), measure(path), maxDepth)
		}
	}
}
