package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/cmd/internal/conf"
)

func TestF63_VaultUpstreamIsConfigured(t *testing.T) {
	const where = "addresses: ['https://vault:8200'], ca_file: ca.crt, roots_file: roots.pem"
	for _, tt := range []struct{ config, want string }{
		{where + ", kubernetes: {token_file: token}", ""},
		{where + ", kubernetes: {mount: k8s/one, role: ca, token_file: token}, mount: pki/mesh, issuer: mesh-2, namespace: team/a", ""},
		{where + ", app_role: {role_id: x, secret_id_file: s, wrapped: true}", ""},
		{where + ", token_file: token", ""},
		{where, "meshca.yaml:2: upstream.vault: 0 ways to log in"},
		{where + ", token_file: token, app_role: {role_id: x, secret_id_file: s}", "2 ways to log in"},
		{"ca_file: ca.crt, roots_file: roots.pem, token_file: t", "no address is given"},
		{"addresses: ['http://vault:8200'], ca_file: ca.crt, roots_file: roots.pem, token_file: t", "want https://HOST:PORT"},
		{"addresses: ['https://vault:8200'], roots_file: roots.pem, token_file: t", "no CA file"},
		{"addresses: ['https://vault:8200'], ca_file: ca.crt, token_file: t", "no file of roots"},
		{where + ", token_file: t, issuer: default", `issuer "default" is whichever`},
		{where + ", token_file: t, mount: 'pki/../sys'", "want names of letters"},
		{where + ", app_role: {secret_id_file: s}", "no RoleID"},
		{where + ", kubernetes: {role: 'a/b', token_file: t}", `role "a/b"`},
		{where + ", token_file: t, tls_skip_verify: true", `unknown key "upstream.vault.tls_skip_verify"`},
	} {
		path := filepath.Join(t.TempDir(), "meshca.yaml")
		if err := os.WriteFile(path, []byte("upstream:\n  vault: {"+tt.config+"}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		c := struct {
			Upstream upstreamConfig `yaml:"upstream"`
		}{upstreamConfig{Vault: defaultVaultConfig()}}
		file, err := conf.Load(path, &c)
		if err == nil {
			err = c.Upstream.check(file)
		}
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.config, err, tt.want)
		}
	}
}

func TestOneUpstreamIsConfigured(t *testing.T) {
	for config, want := range map[string]string{
		"{}": "give exactly one of",
		"{files: {dir: d}, vault: {addresses: ['https://v:1'], ca_file: c, roots_file: r, token_file: t}}": "give exactly one of",
		"{files: {dir: d}}": "",
	} {
		path := filepath.Join(t.TempDir(), "meshca.yaml")
		if err := os.WriteFile(path, []byte("upstream: "+config+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		var c struct {
			Upstream upstreamConfig `yaml:"upstream"`
		}
		file, err := conf.Load(path, &c)
		if err == nil {
			err = c.Upstream.check(file)
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: got %v, want %q", config, err, want)
		}
	}
}
