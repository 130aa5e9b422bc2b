package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/kube/record"
	"github.com/meshca/meshca/ca/roots"
	"github.com/meshca/meshca/ca/self"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/conf"
	"github.com/meshca/meshca/identity"
)

// upstreamConfig says whose the root is, if it is not the CA's own.
type upstreamConfig struct {
	Files filesConfig `yaml:"files" doc:"A CA of the operator's in files, such as Istio's cacerts."`
	Vault vaultConfig `yaml:"vault" doc:"An issuer of a HashiCorp Vault's PKI secrets engine. See docs/vault.md."`
}

// check checks what can be known before anybody is asked.
func (c *upstreamConfig) check(file *conf.File) error {
	if !file.Has("upstream") {
		return nil
	}
	inFiles, inVault := file.Has("upstream.files"), file.Has("upstream.vault")
	switch {
	case inFiles == inVault:
		return file.Errorf("upstream", `give exactly one of "files" and "vault", or leave it out for a root that meshca makes itself`)
	case inFiles:
		return c.Files.check(file)
	}
	return c.Vault.check(file)
}

// foreign is an upstream whose root is not the CA's own, and what keeps its roots.
type foreign struct {
	ca.Upstream
	run   func(context.Context) error
	roots *roots.Keeper
}

// openForeign opens the upstream that the configuration names.
func (p *parts) openForeign(c config, file *conf.File, o serveOptions, td identity.TrustDomain, log *slog.Logger, metrics prometheus.Registerer) (*foreign, error) {
	store, err := p.recordStore(o)
	if err != nil {
		return nil, err
	}
	k, err := roots.New(roots.Config{TrustDomain: td, Store: store, Ceiling: c.Leaf.Ceiling, Now: time.Now, Log: log})
	if err != nil {
		return nil, err
	}
	if file.Has("upstream.vault") {
		upstream, err := openVault(c.Upstream.Vault, file, log, metrics)
		if err != nil {
			return nil, &cli.HintError{Err: err, Hint: `see "upstream" in the configuration, and docs/vault.md`}
		}
		return &foreign{Upstream: upstream, run: upstream.Run, roots: k}, nil
	}
	upstream, err := openFiles(c.Upstream.Files, td, k.Judge, log, metrics)
	if err != nil {
		return nil, &cli.HintError{Err: err, Hint: `the files are those of "upstream" in the configuration`}
	}
	return &foreign{Upstream: upstream, run: upstream.Run, roots: k}, nil
}

// recordStore is where the record of the roots lies: in the cluster, or in the state
// directory, which may hold no root of our own.
func (p *parts) recordStore(o serveOptions) (roots.Store, error) {
	if k := p.cluster; k != nil {
		return record.New(k.clients.state.CoreV1(), k.namespace), nil
	}
	if err := os.Mkdir(o.stateDir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("making the state directory: %w; choose another --state-dir", err)
	}
	if _, err := os.Lstat(self.AnchorPath(o.stateDir)); !errors.Is(err, fs.ErrNotExist) {
		return nil, &cli.HintError{
			Err:  fmt.Errorf("state directory %q holds a root that meshca init made, and the configuration names another upstream", o.stateDir),
			Hint: `moving a mesh from one to the other is not built yet: leave "upstream" out, or choose another --state-dir for a new mesh`,
		}
	}
	return roots.File{Path: filepath.Join(o.stateDir, roots.FileName)}, nil
}
