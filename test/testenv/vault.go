package testenv

import (
	"context"
	"fmt"
	"path/filepath"
)

// VaultVersion is the release that test/tools/vault pins.
const VaultVersion = "v1.21.0"

// Vault builds Vault, server and command, from its module, which takes minutes and
// about 5 GB of memory the first time.
func Vault(ctx context.Context, c *Cache) (string, error) {
	root, err := RepositoryRoot()
	if err != nil {
		return "", err
	}
	module := filepath.Join(root, "test", "tools", "vault")
	const flags = "-s -w"
	key, err := moduleKey(module, flags)
	if err != nil {
		return "", fmt.Errorf("reading which Vault to build: %w", err)
	}
	what := "Vault " + VaultVersion + ", built from source"
	dir, err := c.entry(ctx, "vault-"+VaultVersion+"-"+key, what, func(ctx context.Context, dir string) error {
		return goBuild(ctx, module, filepath.Join(dir, "vault"), "github.com/hashicorp/vault", flags)
	})
	return filepath.Join(dir, "vault"), err
}
