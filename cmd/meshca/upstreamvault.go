package main

import (
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca/vault"
	"github.com/meshca/meshca/cmd/internal/conf"
)

// vaultConfig says which issuer of which Vault signs, and how to log in there.
type vaultConfig struct {
	Addresses  []string             `yaml:"addresses" doc:"The https URLs of Vault's servers; the first that is active is asked. Behind a load balancer there is one."`
	CAFile     string               `yaml:"ca_file" doc:"The only authorities that the servers' certificates may chain to, as PEM. Read again for each request."`
	Namespace  string               `yaml:"namespace" doc:"Vault's namespace that the mounts are in, for editions that have namespaces."`
	Mount      string               `yaml:"mount" doc:"The path of the PKI secrets engine."`
	Issuer     string               `yaml:"issuer" doc:"The name or ID of the issuer. \"default\" is refused: whoever sets a mount's default would choose who signs."`
	RootsFile  string               `yaml:"roots_file" doc:"The roots to believe, all of them, as PEM. Nothing that Vault says adds one. Read again every 30 s."`
	Kubernetes vaultKubernetesLogin `yaml:"kubernetes" doc:"Log in by the CA's ServiceAccount. Exactly one of kubernetes, app_role and token_file must be given."`
	AppRole    vaultAppRoleLogin    `yaml:"app_role" doc:"Log in by AppRole."`
	TokenFile  string               `yaml:"token_file" doc:"A token in a file, which something else keeps fresh."`
}

type vaultKubernetesLogin struct {
	Mount     string `yaml:"mount" doc:"The path of the auth method."`
	Role      string `yaml:"role" doc:"The role in it."`
	TokenFile string `yaml:"token_file" doc:"A projected token of an audience of Vault's own, read for each login."`
}

type vaultAppRoleLogin struct {
	Mount        string `yaml:"mount" doc:"The path of the auth method."`
	RoleID       string `yaml:"role_id" doc:"The RoleID."`
	SecretIDFile string `yaml:"secret_id_file" doc:"The file with the SecretID, read for each login."`
	Wrapped      bool   `yaml:"wrapped" doc:"The file holds a response-wrapping token in place of the SecretID. It is used once, so that a restart needs a new one."`
}

func defaultVaultConfig() vaultConfig {
	return vaultConfig{
		Mount: "pki", Issuer: "meshca",
		Kubernetes: vaultKubernetesLogin{Mount: "kubernetes", Role: "meshca"},
		AppRole:    vaultAppRoleLogin{Mount: "approle"},
	}
}

// check checks what can be known before anybody is asked.
func (c *vaultConfig) check(file *conf.File) error {
	const key = "upstream.vault"
	given := 0
	for _, login := range []string{"kubernetes", "app_role", "token_file"} {
		if file.Has(key + "." + login) {
			given++
		}
	}
	if given != 1 {
		return file.Errorf(key, "%d ways to log in are given; give exactly one of kubernetes, app_role and token_file", given)
	}
	if err := c.settings(file).Check(); err != nil {
		return file.Errorf(key, "%v", err)
	}
	return nil
}

// settings is what package vault wants. check has seen to it that there is one way to
// log in.
func (c *vaultConfig) settings(file *conf.File) vault.Config {
	s := vault.Config{
		Addresses: c.Addresses, CAFile: c.CAFile, Namespace: c.Namespace, Mount: c.Mount, Issuer: c.Issuer, RootsFile: c.RootsFile,
	}
	switch {
	case file.Has("upstream.vault.kubernetes"):
		s.Auth = vault.Kubernetes{Mount: c.Kubernetes.Mount, Role: c.Kubernetes.Role, TokenFile: c.Kubernetes.TokenFile}
	case file.Has("upstream.vault.app_role"):
		s.Auth = vault.AppRole{Mount: c.AppRole.Mount, RoleID: c.AppRole.RoleID, SecretIDFile: c.AppRole.SecretIDFile, Wrapped: c.AppRole.Wrapped}
	default:
		s.Auth = vault.TokenFile(c.TokenFile)
	}
	return s
}

// openVault reads the roots; Vault is asked nothing yet.
func openVault(c vaultConfig, file *conf.File, log *slog.Logger, metrics prometheus.Registerer) (*vault.Upstream, error) {
	s := c.settings(file)
	s.Now, s.Log, s.Metrics = time.Now, log, metrics
	return vault.New(s)
}
