package kube

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/policy/manifest"
	"github.com/meshca/meshca/test/kubetest"
)

const (
	policiesPath = "/apis/security.istio.io/v1/namespaces/policy/peerauthentications"
	strictly     = "?dryRun=All&fieldValidation=Strict"
)

// installPeerAuthentication adds Istio's own definition, unchanged.
func installPeerAuthentication(t *testing.T, c *kubetest.Cluster) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api").Output()
	if err != nil {
		t.Fatalf("finding Istio's definitions: %v", err)
	}
	all, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "kubernetes", "customresourcedefinitions.gen.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for definition := range bytes.SplitSeq(all, []byte("\n---\n")) {
		if !bytes.Contains(definition, []byte("\n  name: peerauthentications.security.istio.io\n")) {
			continue
		}
		var status *kubetest.StatusError
		err := c.CreateYAML(t.Context(), "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
		if err != nil && !(errors.As(err, &status) && status.Code == http.StatusConflict) {
			t.Fatal(err)
		}
	}
	// The resource is served a moment after its definition was accepted.
	for tick := time.NewTicker(50 * time.Millisecond); ; {
		if _, err := c.Get(t.Context(), policiesPath); err == nil {
			tick.Stop()
			return
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("the API server does not serve PeerAuthentication")
		}
	}
}

// TestPolicyVerdictsAreTheAPIServers shows the same objects to the linter and to an
// API server. Not among them is "80" beside 80, of which YAML readers silently take
// one, and which we refuse.
func TestPolicyVerdictsAreTheAPIServers(t *testing.T) {
	c := cluster.Get(t)
	if err := c.CreateNamespace(t.Context(), "policy"); err != nil {
		t.Fatal(err)
	}
	installPeerAuthentication(t, c)

	const selected = "{selector: {matchLabels: {app: a}}, "
	port := func(key string) string {
		return "spec: " + selected + "portLevelMtls: {" + key + ": {mode: DISABLE}}}"
	}
	label := func(pair string) string { return "spec: {selector: {matchLabels: {" + pair + "}}}" }
	var many strings.Builder
	for i := range 4097 {
		fmt.Fprintf(&many, "l%d: a, ", i)
	}
	for _, spec := range []string{
		"", "spec:", "spec: {}", "spec: STRICT", "Spec: {}", "extra: 1", "spec: {extra: 1}",
		"spec: {mtls: {}}", "spec: {mtls: }", "spec: {mtls: STRICT}", "spec: {mtls: {extra: 1}}", "spec: {mtls: {mode: }}",
		"spec: {mtls: {mode: UNSET}}", "spec: {mtls: {mode: STRICT}}", "spec: {mtls: {mode: strict}}", "spec: {mtls: {mode: BLAH}}", "spec: {mtls: {mode: ''}}",
		"spec: {mtls: {mode: 3}}", "spec: {mtls: {mode: true}}", "spec: {mtls: {mode: [STRICT]}}", "spec: {mtls: {mode: off}}",
		"spec: {selector: }", "spec: {selector: {}}", "spec: {selector: {matchLabels: {}}}", "spec: {selector: {matchLabels: }}", "spec: {selector: {extra: 1}}", "spec: {selector: [a]}",
		label("app: a"), label("app: ''"), label("app: 1"), label("app: true"), label("app: 'true'"), label("app: yes"), label("app: off"), label("app: y"), label("app: N"), label("app: 'on'"),
		label("app: "), label("app: 1.5"), label("app: 2026-01-01"), label("app: 0x1F"), label("app: 1_000"), label("app: ~"), label("app: [a]"),
		label("app: a*"), label("'app*': a"), label("'': a"), label("1: a"), label("true: a"), label("app: " + strings.Repeat("a", 63)), label("app: " + strings.Repeat("a", 64)),
		label("app: " + strings.Repeat("ä", 63)), label("app: " + strings.Repeat("ä", 64)), label(many.String()), label(strings.TrimPrefix(many.String(), "l0: a, ")),
		label("app: , v: a"), "spec: {portLevelMtls: {80: {}}}", "spec: {selector: {matchLabels: {app: }}, portLevelMtls: {80: {}}}",
		"spec: " + selected + "portLevelMtls: {80: , 90: {}}}", "spec: {portLevelMtls: {}}", "spec: {portLevelMtls: }", "spec: {selector: {}, portLevelMtls: {80: {}}}",
		"spec: " + selected + "portLevelMtls: {}}", "spec: " + selected + "portLevelMtls: }", "spec: " + selected + "portLevelMtls: {80: }}", "spec: " + selected + "portLevelMtls: [80]}",
		"spec: " + selected + "portLevelMtls: {80: {}, 443: {mode: STRICT}}, mtls: {mode: DISABLE}}", "spec: " + selected + "portLevelMtls: {80: {mode: on}}}",
		port("80"), port("0"), port("1"), port("65535"), port("65536"), port("42949672"), port("-1"), port("'-1'"), port("acd"), port("http"), port("''"), port("' 80'"), port("'08080'"),
		port("08080"), port("010"), port("0x50"), port("'0x50'"), port("8080.0"), port("80.5"), port("1e3"), port("1_000"), port("'1_000'"), port("0o10"), port("true"), port("99999999999999999999"),
		"spec: {}\nspec: {}", "spec: {mtls: {mode: STRICT, mode: DISABLE}}",
	} {
		object := "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: policy}\n" + spec
		err := c.CreateYAML(t.Context(), policiesPath+strictly, []byte(object))
		var status *kubetest.StatusError
		if err != nil && !errors.As(err, &status) {
			t.Fatal(err)
		}
		why := ours(object)
		if (err == nil) != (why == "") {
			t.Errorf("%.200s\n  the API server: %.400v\n  meshca:         %s", spec, err, why)
		}
	}
}

// ours returns why the linter refuses an object, or "".
func ours(object string) string {
	contents, err := manifest.Parse([]byte(object), 1)
	if err != nil {
		return err.Error()
	}
	if worst, ok := contents.Policies[0].Worst(); ok && worst.Verdict > manifest.Warned {
		return worst.Code + ": " + worst.Text
	}
	return ""
}
