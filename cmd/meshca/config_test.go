package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/cmd/internal/cli"
)

// execute runs one command line that is expected to end by itself.
func execute(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // what starts by mistake ends at once
	var out, errs bytes.Buffer
	code = cli.Execute(ctx, newRoot(), args, &out, &errs)
	return code, out.String(), errs.String()
}

const minimal = "token_issuers:\n- issuer: https://k8s\n  jwks_file: jwks.json\n"

func TestF63_StartIsRefused(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	if code, _, stderr := execute(t, "init", "--state-dir", state); code != 0 {
		t.Fatal(stderr)
	}
	for _, tt := range []struct{ name, config, flags, want string }{
		{"no issuer", "trust_domain: cluster.local", "", "token_issuers: none given"},
		{"unknown key", "leaf_lifetme: 1h\n" + minimal, "", `meshca.yaml:1: unknown key "leaf_lifetme"`},
		{"nested unknown key", "leaf:\n  lifetme: 1h\n" + minimal, "", `meshca.yaml:2: unknown key "leaf.lifetme"; did you mean "lifetime"?`},
		{"bad duration", "leaf:\n  lifetime: 1 hour\n" + minimal, "", `meshca.yaml:2: leaf.lifetime: bad duration "1 hour"`},
		{"floor too low", "leaf: {floor: 1m}\n" + minimal, "", "leaf floor 1m0s is below 5m0s"},
		{"ceiling too high", "leaf: {ceiling: 48h}\nintermediate_lifetime: 200h\n" + minimal, "", "leaf ceiling 48h0m0s is above 24h0m0s"},
		{"intermediate too short", "intermediate_lifetime: 1h\n" + minimal, "", "intermediate lifetime 1h0m0s is too short"},
		{"trust domain", "trust_domain: Cluster.Local\n" + minimal, "", "meshca.yaml:1: trust_domain:"},
		{"other trust domain", "trust_domain: other.example\n" + minimal, "", `set "trust_domain" to the one the root was made for`},
		{"no keys", "token_issuers:\n- issuer: x", "", "meshca.yaml:2: token_issuers[0]: give exactly one of jwks_file, jwks_url and kubernetes; found 0"},
		{"two sources", "token_issuers:\n- issuer: x\n  jwks_file: a\n  kubernetes: true", "", "exactly one of jwks_file, jwks_url and kubernetes; found 2"},
		{"no issuer name", "token_issuers:\n- jwks_file: a", "", `"issuer" is missing`},
		{"plain http", "token_issuers:\n- issuer: x\n  jwks_url: http://x\n  jwks_ca_file: a", "", `meshca.yaml:3: token_issuers[0].jwks_url: "http://x" is not an https URL`},
		{"no pinned CA", "token_issuers:\n- issuer: x\n  jwks_url: https://x/jwks", "", "it needs jwks_ca_file"},
		{"stray CA", minimal + "  jwks_ca_file: a", "", "token_issuers[0].jwks_ca_file: it belongs to jwks_url"},
		{"stray API server", minimal + "  api_server: https://x", "", `token_issuers[0].api_server: it belongs to "kubernetes: true"`},
		{"test lifetimes in a cluster", "token_issuers:\n- issuer: x\n  kubernetes: true", "--test-lifetimes", "--test-lifetimes is for tests and demos and is refused with a cluster"},
		{"bad renewal ID", minimal + "renew_by_certificate: [spiffe://Cluster/x]", "", "meshca.yaml:4: renew_by_certificate[0]:"},
		{"foreign renewal ID", minimal + "renew_by_certificate: ['spiffe://other/ns/a/sa/b']", "", "renew_by_certificate"},
		{"bad server name", minimal + "server_names: ['*.example']", "", "server_names"},
		{"audience without limit", "token_issuers:\n- issuer: x\n  jwks_file: a\n  audiences: {meshca: 0s}", "", "token_issuers"},
		{"pprof to nowhere", minimal, "--pprof --ops-listen=", "--pprof is served on --ops-listen, which is empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(dir, "meshca.yaml")
			if err := os.WriteFile(file, []byte(tt.config), 0o600); err != nil {
				t.Fatal(err)
			}
			args := append([]string{"serve", "--config", file, "--state-dir", state, "--listen", "127.0.0.1:0"}, strings.Fields(tt.flags)...)
			code, _, stderr := execute(t, args...)
			want := cli.ExitUsage
			if tt.name == "other trust domain" {
				want = cli.ExitRefused // the file is as good as the state; they do not belong together
			}
			if code != want || !strings.Contains(stderr, tt.want) {
				t.Errorf("exit %d, %q\nwant %d, %q", code, stderr, want, tt.want)
			}
		})
	}
}

func TestMissingStateSaysWhatToDo(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "meshca.yaml")
	if err := os.WriteFile(file, []byte(minimal), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := execute(t, "serve", "--config", file, "--state-dir", filepath.Join(dir, "none"))
	if code != cli.ExitRefused || !strings.Contains(stderr, "meshca init --state-dir") {
		t.Errorf("exit %d, %q; want a hint to meshca init", code, stderr)
	}
}

func TestInit(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	code, stdout, stderr := execute(t, "init", "--state-dir", state, "--trust-domain", "example.org", "-o", "json")
	if code != 0 || !strings.Contains(stdout, `"trust_domain": "example.org"`) || !strings.Contains(stdout, "root.pem") {
		t.Fatalf("exit %d, %s, %s", code, stdout, stderr)
	}
	code, _, stderr = execute(t, "init", "--state-dir", state, "--trust-domain", "example.org")
	if code != cli.ExitRefused || !strings.Contains(stderr, "to use it: meshca serve") {
		t.Errorf("a second init: exit %d, %q; it must refuse and say what to do", code, stderr)
	}
	code, _, stderr = execute(t, "init", "--state-dir", t.TempDir(), "--trust-domain", "UPPER")
	if code != cli.ExitUsage || !strings.Contains(stderr, "--trust-domain") {
		t.Errorf("a bad trust domain: exit %d, %q", code, stderr)
	}
}

// A root is made once; a mistake elsewhere on the command line must not make one.
func TestInitChecksItsFlagsFirst(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	if code, _, _ := execute(t, "init", "--state-dir", state, "-o", "yaml"); code != cli.ExitUsage {
		t.Errorf("exit %d; want %d", code, cli.ExitUsage)
	}
	if _, err := os.Lstat(state); err == nil {
		t.Error("a root was made although -o was wrong")
	}
}

func TestUsage(t *testing.T) {
	for _, args := range []string{"srve", "serve --bogus", "init extra", "demo -o xml", "demo --stay -o json", "version -o xml"} {
		code, _, stderr := execute(t, strings.Fields(args)...)
		if code != cli.ExitUsage || stderr == "" {
			t.Errorf("meshca %s: exit %d, %q; want %d and a reason", args, code, stderr, cli.ExitUsage)
		}
	}
}
