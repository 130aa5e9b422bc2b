package main

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/files"
	"github.com/meshca/meshca/cmd/internal/conf"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestF63_FilesUpstreamIsConfigured(t *testing.T) {
	for _, tt := range []struct{ config, want string }{
		{"{dir: /etc/cacerts}", ""},
		{"{dir: /etc/cacerts, layout: auto}", ""},
		{"{dir: /etc/cacerts, layout: cacerts}", ""},
		{"{dir: /etc/cacerts, layout: tls}", ""},
		{"{}", `meshca.yaml:2: upstream.files: "dir" is missing`},
		{"{layout: tls}", `meshca.yaml:2: upstream.files: "dir" is missing`},
		{"{dir: /etc/cacerts, layout: pkcs12}", `meshca.yaml:2: upstream.files.layout: "pkcs12" is unknown; there are "auto", "cacerts" and "tls"`},
		{"{dir: /etc/cacerts, key: x}", `unknown key "upstream.files.key"`},
	} {
		path := filepath.Join(t.TempDir(), "meshca.yaml")
		if err := os.WriteFile(path, []byte("upstream:\n  files: "+tt.config+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		var c struct {
			Upstream struct {
				Files filesConfig `yaml:"files"`
			} `yaml:"upstream"`
		}
		file, err := conf.Load(path, &c)
		if err == nil {
			err = c.Upstream.Files.check(file)
		}
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.config, err, tt.want)
		}
	}
}

// A root of ours in files is as good as an operator's.
func TestFilesUpstreamIsOpened(t *testing.T) {
	td := identitytest.TrustDomain(t, "cluster.local")
	root, key, err := ca.NewRoot(ca.RootConfig{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := ca.EncodeRootKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	if _, err := openFiles(filesConfig{Dir: dir}, td, nil, log, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without files: %v", err)
	}
	for name, data := range map[string][]byte{"tls.crt": identity.EncodePEM(root), "tls.key": keyPEM, "ca.crt": identity.EncodePEM(root)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	u, err := openFiles(filesConfig{Dir: dir, Layout: "tls"}, td, nil, log, nil)
	if err != nil {
		t.Fatal(err)
	}
	if r := u.Report(); r.State != files.StateOK {
		t.Errorf("the report is %+v", r)
	}
	if _, err := openFiles(filesConfig{Dir: dir, Layout: "cacerts"}, td, nil, log, nil); err == nil {
		t.Error("the layout is not passed on")
	}
}
