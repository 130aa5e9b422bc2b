package testenv

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Build builds a program of this repository, static as we ship it, into the
// directory dir and returns its path. module is the folder of its module, from the
// repository's root.
func Build(ctx context.Context, dir, module, pkg string) (string, error) {
	root, err := RepositoryRoot()
	if err != nil {
		return "", err
	}
	output := filepath.Join(dir, filepath.Base(pkg))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-tags", "grpcnotrace", "-o", output, pkg)
	cmd.Dir = filepath.Join(root, module)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s in %q: %w\n%s", pkg, module, err, bytes.TrimSpace(out))
	}
	return output, nil
}

// CoreDNS builds the cluster's DNS server, which takes two minutes the first time.
func CoreDNS(ctx context.Context, c *Cache) (string, error) {
	root, err := RepositoryRoot()
	if err != nil {
		return "", err
	}
	module := filepath.Join(root, "test", "tools", "coredns")
	const flags = "-s -w"
	key, err := moduleKey(module, flags)
	if err != nil {
		return "", fmt.Errorf("reading which CoreDNS to build: %w", err)
	}
	dir, err := c.entry(ctx, "coredns-"+key, "CoreDNS, built from source", func(ctx context.Context, dir string) error {
		return goBuild(ctx, module, filepath.Join(dir, "coredns"), "github.com/coredns/coredns", flags)
	})
	return filepath.Join(dir, "coredns"), err
}
