package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshca/meshca/cmd/internal/cli"
)

// golden compares with a file in testdata, or writes it with -update.
func golden(t *testing.T, name, got string) {
	t.Helper()
	goldenFile(t, filepath.Join("testdata", name), got)
}

func goldenFile(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s: %s", path, diff)
	}
}

// TestPolicyCommands keeps what scripts rely on: the documents and exit codes.
func TestPolicyCommands(t *testing.T) {
	const files = " testdata/policy/shop.yaml testdata/policy/mesh.yaml"
	for _, tt := range []struct {
		name, args string
		code       int
	}{
		{"resolve-cart.json", "resolve -f" + files + " --namespace shop --labels app=cart,version=v1 -o json", 0},
		{"resolve-cart.txt", "resolve -f" + files + " --namespace shop --labels app=cart,version=v1", 0},
		{"resolve-port.json", "resolve -f" + files + " --namespace shop --labels app=cart --port 8080 -o json", 0},
		{"resolve-other-port.json", "resolve -f" + files + " --namespace shop --labels app=cart --port 1 -o json", 0},
		{"resolve-newer.json", "resolve -f testdata/policy --namespace bank -o json", 0},
		{"resolve-newer.txt", "resolve -f testdata/policy --namespace bank", 0},
		{"resolve-mesh.json", "resolve -f" + files + " --namespace other --labels app=x -o json", 0},
		{"resolve-default.json", "resolve -f" + files + " --root-namespace istio-system --namespace other -o json", 0},
		{"lint.json", "lint -f" + files + " -o json", 1},
		{"lint.txt", "lint -f" + files, 1},
		{"lint-cluster.json", "lint -f testdata/policy -o json", 1},
		{"lint-mesh.json", "lint -f testdata/policy/mesh.yaml -f testdata/policy/mesh.yaml -o json", 0},
		{"lint-nothing.txt", "lint -f testdata/policy/cluster.yaml", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := execute(t, append([]string{"policy"}, strings.Fields(tt.args)...)...)
			if code != tt.code || (code == 0) != (stderr == "") {
				t.Errorf("exit code %d, want %d; %s", code, tt.code, stderr)
			}
			golden(t, "policy-golden/"+tt.name, stdout)
		})
	}
}

func writeTemp(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "p.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const onePolicy = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: w, namespace: foo}\n"

// TestT10_PolicyThatMeansNothingGivesNoAnswer is about resolve: an answer would be
// a guess. Lint finds the same.
func TestT10_PolicyThatMeansNothingGivesNoAnswer(t *testing.T) {
	for code, text := range map[string]string{
		"PV4":  onePolicy + "spec: {mtls: {mode: 3}}",
		"PV9":  onePolicy + "spec: {selector: {matchLabels: {app: a}}, portLevelMtls: {65536: {}}}",
		"PV14": onePolicy + "spec: {selector: {matchLabels: {app: '*'}}}",
		"PV19": onePolicy + "Spec: {mtls: {mode: STRICT}}",
		"PV20": onePolicy + "spec: {mTLS: {mode: STRICT}}",
		"PA6":  onePolicy + "spec: {selector: {matchLabels: {app: a}}, portLevelMtls: {80: {}, '080': {}}}",
		"PV0":  "spec: [",
		"PV0 ": onePolicy + "spec: {mtls: {mode: STRICT}}\n---\n" + onePolicy + "spec: {mtls: {mode: DISABLE}}",
	} {
		path := writeTemp(t, text)
		exit, stdout, stderr := execute(t, "policy", "resolve", "-f", path, "--namespace", "foo")
		if exit != 1 || stdout != "" || !strings.Contains(stderr, "p.yaml:") {
			t.Errorf("%s: resolve exits with %d, prints %q; %s", code, exit, stdout, stderr)
		}
		exit, stdout, _ = execute(t, "policy", "lint", "-f", path, "-o", "json")
		var result linted
		if err := json.Unmarshal([]byte(stdout), &result); err != nil {
			t.Fatal(err)
		}
		if exit != 1 || len(result.Findings) == 0 || result.Findings[0].Code != strings.TrimSpace(code) || result.Findings[0].Severity != "rejected" {
			t.Errorf("%s: lint exits with %d, finds %+v", code, exit, result.Findings)
		}
	}
}

// TestV22_ResolveWhatSlippedPastValidation: the meaning of these is known.
func TestV22_ResolveWhatSlippedPastValidation(t *testing.T) {
	for text, want := range map[string]string{
		"spec: {mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}}}":                                         "STRICT",
		"spec: {mtls: {mode: strict}}":                                                                                 "STRICT",
		"spec: {selector: {matchLabels: {v: 1}}, mtls: {mode: DISABLE}}":                                               "DISABLE",
		"spec: {selector: {matchLabels: {v: '1'}}, mtls: {mode: DISABLE}, portLevelMtls: {}}":                          "DISABLE",
		"spec: {selector: {matchLabels: {v: '1'}}, mtls: {mode: DISABLE}, portLevelMtls: {8080: {mode: XSTRICT}}}":     "STRICT",
		"spec: {selector: {matchLabels: {v: '1'}}, mtls: {mode: DISABLE}, portLevelMtls: {08080: {mode: PERMISSIVE}}}": "PERMISSIVE",
	} {
		code, stdout, stderr := execute(t, "policy", "resolve", "-f", writeTemp(t, onePolicy+text), "--namespace", "foo", "--labels", "v=1", "--port", "8080", "-o", "json")
		var result struct{ Mode string }
		if err := json.Unmarshal([]byte(stdout), &result); err != nil {
			t.Fatal(err, stderr)
		}
		if code != 0 || result.Mode != want {
			t.Errorf("%s: exit code %d, mode %q, want %q", text, code, result.Mode, want)
		}
	}
}

func TestPolicyUsage(t *testing.T) {
	good := writeTemp(t, onePolicy)
	for _, tt := range []struct{ args, want string }{
		{"bogus", `unknown command "bogus"`},
		{"lint", "-f: give at least one"},
		{"lint -f missing.yaml", "no such file"},
		{"lint -f " + good + " -o xml", "choose text or json"},
		{"lint -f " + good + " --root-namespace=", "--root-namespace"},
		{"resolve -f " + good, "--namespace: give the workload's"},
		{"resolve -f " + good + " --namespace foo --port 0", "--port 0: it must be 1 to 65535"},
		{"resolve -f " + good + " --namespace foo --port 65536", "--port 65536"},
		{"resolve -f " + good + " --namespace foo --labels app", `"app" is not key=value`},
		{"resolve -f " + good + " --namespace foo --labels =a", "not key=value"},
		{"resolve -f " + good + " --namespace foo --labels a=1 --labels a=2", `label "a" is given twice`},
	} {
		code, stdout, stderr := execute(t, append([]string{"policy"}, strings.Fields(tt.args)...)...)
		if code != cli.ExitUsage || stdout != "" || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: exit code %d, %q, want %q", tt.args, code, stderr, tt.want)
		}
	}
	if code, stdout, _ := execute(t, "policy"); code != 0 || !strings.Contains(stdout, "resolve") {
		t.Errorf("policy alone: exit code %d, %s", code, stdout)
	}
}

func TestPolicyFromStandardInput(t *testing.T) {
	var out, errs bytes.Buffer
	root := newRoot()
	root.SetIn(strings.NewReader(onePolicy + "spec: {mtls: {mode: STRICT}}"))
	if code := cli.Execute(t.Context(), root, []string{"policy", "resolve", "-f", "-", "--namespace", "foo"}, &out, &errs); code != 0 || !strings.HasPrefix(out.String(), "STRICT ") {
		t.Errorf("exit code %d: %s%s", code, &out, &errs)
	}
}
