package main

import (
	"bytes"
	"context"
	"flag"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/refdoc"
)

var update = flag.Bool("update", false, "write docs/reference/agent.md")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestReferenceIsCurrent(t *testing.T) {
	metrics, nodeMetrics := refdoc.NewRecorder(), refdoc.NewRecorder()
	where := common{trustAnchor: "root.pem", tokenFile: "token"}
	p, err := build(config{TrustDomain: "example.org", KeyType: "P-256", CA: caConfig{Addresses: []string{"127.0.0.1:1"}}},
		options{common: where}, slog.New(slog.DiscardHandler), metrics)
	if err != nil {
		t.Fatal(err)
	}
	p.client.Close()
	n, err := buildNode(config{TrustDomain: "example.org", KeyType: "P-256", CA: caConfig{Addresses: []string{"127.0.0.1:1"}}},
		nodeOptions{common: where, kubeletDir: "/k", stateDir: "/s"}, slog.New(slog.DiscardHandler), nodeMetrics)
	if err != nil {
		t.Fatal(err)
	}
	n.client.Close()
	page := refdoc.Head + "# agent\n\n" + refdoc.Commands(newRoot()) + "\n" + refdoc.Settings(defaultConfig()) + "\n" + metrics.Metrics() +
		"\n" + strings.Replace(nodeMetrics.Metrics(), "## Metrics", "## Metrics of `agent node`", 1)
	if err := refdoc.Check("../../docs/reference/agent.md", page, *update); err != nil {
		t.Error(err)
	}
}

// start runs the command line to its end and returns the exit code and what it
// said on the error stream.
func start(t *testing.T, args ...string) (code int, stderr string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // what starts by mistake ends at once
	var out, errs bytes.Buffer
	code = cli.Execute(ctx, newRoot(), args, &out, &errs)
	return code, errs.String()
}

func TestF63_StartIsRefused(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "agent.yaml")
	write := func(text string) string {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	where := []string{"--trust-anchor", "root.pem", "--token-file", "token", "--socket", filepath.Join(dir, "s")}
	node := []string{"node", "--trust-anchor", "root.pem", "--token-file", "token", "--ca", "a:1"}
	for _, tt := range []struct {
		name, config string
		args         []string
		want         string
	}{
		{"no anchor", "", []string{"--token-file", "t", "--ca", "a:1"}, "--trust-anchor is missing"},
		{"no token", "", []string{"--trust-anchor", "a", "--ca", "a:1"}, "--token-file is missing"},
		{"no address", "", where, "no address of a CA"},
		{"bad address", "", append(where, "--ca", "localhost"), `"localhost" is not host:port`},
		{"address twice", "ca: {addresses: ['a:1']}", append(where, "--ca", "b:1"), "agent.yaml:1: ca.addresses: the addresses are given by --ca too"},
		{"unknown key", "trust_domain: x\nkeytype: P-256", append(where, "--ca", "a:1"), `agent.yaml:2: unknown key "keytype"; did you mean "key_type"?`},
		{"bad key type", "key_type: rsa", append(where, "--ca", "a:1"), `agent.yaml:1: key_type: key type "rsa" is not one of`},
		{"bad trust domain", "trust_domain: Example", append(where, "--ca", "a:1"), "agent.yaml:1: trust_domain:"},
		{"bad mode", "", append(where, "--ca", "a:1", "--socket-mode", "rw"), `--socket-mode "rw": give octal permissions`},
		{"pprof to nowhere", "", append(where, "--ca", "a:1", "--pprof"), "--pprof is served on --ops-listen, which is empty"},
		{"bad log level", "", append(where, "--ca", "a:1", "--log-level", "loud"), `--log-level "loud"`},
		{"argument", "", append(where, "extra"), `unexpected argument "extra"`},
		{"node without an anchor", "", []string{"node", "--ca", "a:1", "--token-file", "t"}, "--trust-anchor is missing"},
		{"node without an address", "", []string{"node", "--trust-anchor", "a", "--token-file", "t"}, "no address of a CA"},
		{"node with a relative folder", "", append(node, "--kubelet-dir", "kubelet"), `--kubelet-dir "kubelet": give an absolute path`},
		{"node with a detour", "", append(node, "--node-state-dir", "/run/../tmp"), `--node-state-dir "/run/../tmp": give an absolute path`},
		{"node with its state in the kubelet's", "", append(node, "--node-state-dir", "/var/lib/kubelet/x"), "is in the kubelet's folder"},
		{"node with a socket", "", append(node, "--socket", "s"), "unknown flag: --socket"},
		{"unknown flag", "", []string{"--tokn"}, "unknown flag: --tokn"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := tt.args
			if tt.config != "" {
				args = append(args[:len(args):len(args)], "--config", write(tt.config))
			}
			code, stderr := start(t, args...)
			if code != cli.ExitUsage || !strings.Contains(stderr, tt.want) {
				t.Errorf("exit %d, %q; want exit %d with %q", code, stderr, cli.ExitUsage, tt.want)
			}
		})
	}
}
