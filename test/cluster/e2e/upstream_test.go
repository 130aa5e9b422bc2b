package e2e

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/test/cluster"
	"github.com/meshca/meshca/test/testenv"
)

// upstream is what make e2e installs the CA with the second time: "vault", or nothing
// for a root of its own.
var upstream = os.Getenv("E2E_UPSTREAM")

// vaultServer is a real Vault on the node, as pods reach it, which setup.sh has set up
// for the CA in the cluster.
type vaultServer struct {
	process *testenv.Process
	dir     string
	binary  string
}

const (
	vaultURL   = "https://" + cluster.NodeIP + ":8200"
	vaultToken = "root-of-the-test" // of a development server that ends with the test
)

var vault *vaultServer // nil without

func (v *vaultServer) root() string { return filepath.Join(v.dir, "root.pem") }

// startVault starts Vault and has our own script set it up, as docs/vault.md says.
func startVault(ctx context.Context) (*vaultServer, error) {
	cache, err := testenv.OpenCache(os.Stderr)
	if err != nil {
		return nil, err
	}
	v := &vaultServer{dir: filepath.Join(node.Dir(), "vault")}
	if v.binary, err = testenv.Vault(ctx, cache); err != nil {
		return nil, err
	}
	if err := errors.Join(os.RemoveAll(v.dir), os.MkdirAll(v.dir, 0o700)); err != nil {
		return nil, err
	}
	// A development server keeps its data in memory and is unsealed; all else is as ever.
	v.process, err = testenv.Start(filepath.Join(v.dir, "log"), "nsenter", "--net="+node.NetworkNamespace(), v.binary, "server",
		"-dev", "-dev-tls", "-dev-tls-cert-dir="+v.dir, "-dev-tls-san="+cluster.NodeIP,
		"-dev-listen-address="+cluster.NodeIP+":8200", "-dev-root-token-id="+vaultToken, "-dev-no-store-token")
	if err != nil {
		return nil, err
	}
	if err := v.await(ctx); err != nil {
		return nil, errors.Join(err, v.process.Kill())
	}
	return v, v.setUp(ctx)
}

func (v *vaultServer) caFile() string { return filepath.Join(v.dir, "vault-ca.pem") }

// command runs a command against Vault with the right to do anything.
func (v *vaultServer) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + node.NetworkNamespace(), name}, args...)...)
	c.Env = append(os.Environ(), "VAULT_ADDR="+vaultURL, "VAULT_CACERT="+v.caFile(), "VAULT_TOKEN="+vaultToken,
		"PATH="+filepath.Dir(v.binary)+":"+os.Getenv("PATH"))
	return c
}

func (v *vaultServer) await(ctx context.Context) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		out, err := v.command(ctx, v.binary, "status").CombinedOutput()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-v.process.Done():
			return v.process.Exited()
		case <-ctx.Done():
			return fmt.Errorf("waiting for Vault: %w; the last: %s", err, out)
		}
	}
}

// setUp gives Vault a PKI, our policy and Kubernetes auth, and the cluster what the
// chart wants to be there.
func (v *vaultServer) setUp(ctx context.Context) error {
	const objects = `
apiVersion: v1
kind: Namespace
metadata: {name: vault}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: reviewer, namespace: vault}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: vault-reviewer}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: system:auth-delegator}
subjects: [{kind: ServiceAccount, name: reviewer, namespace: vault}]
`
	if _, err := node.Kubectl(ctx, strings.NewReader(objects), "apply", "-f", "-"); err != nil {
		return err
	}
	token, err := node.Kubectl(ctx, nil, "-n", "vault", "create", "token", "reviewer", "--duration=2h")
	if err != nil {
		return err
	}
	reviewer, authorities := filepath.Join(v.dir, "reviewer"), filepath.Join(v.dir, "kubernetes-ca.pem")
	if err := errors.Join(os.WriteFile(reviewer, []byte(strings.TrimSpace(token)), 0o600), os.WriteFile(authorities, config.CAData, 0o600)); err != nil {
		return err
	}
	if len(config.CAData) == 0 {
		authorities = config.CAFile
	}
	root, err := testenv.RepositoryRoot()
	if err != nil {
		return err
	}
	c := v.command(ctx, filepath.Join(root, "deploy/vault/setup.sh"), "pki", "policy", "kubernetes")
	c.Env = append(c.Env, "ROOT_FILE="+v.root(), "KUBERNETES_HOST="+config.Host, "KUBERNETES_CA_FILE="+authorities, "REVIEWER_TOKEN_FILE="+reviewer)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("setting Vault up: %w\n%s", err, out)
	}
	if _, err := node.Kubectl(ctx, nil, "create", "namespace", "meshca-system"); err != nil {
		return err
	}
	_, err = node.Kubectl(ctx, nil, "-n", "meshca-system", "create", "configmap", "meshca-vault",
		"--from-file=ca.crt="+v.caFile(), "--from-file=roots.pem="+v.root())
	return err
}

// rendered is the chart with an upstream in its values.
func rendered(ctx context.Context) (string, error) {
	root, err := testenv.RepositoryRoot()
	if err != nil {
		return "", err
	}
	c := exec.CommandContext(ctx, "go", "tool", "-modfile=tools/helm/go.mod", "helm", "template", "--no-hooks", "meshca", "deploy/chart",
		"--set", "ca.upstream.vault.addresses={"+vaultURL+"}")
	c.Dir, c.Stderr = root, os.Stderr
	out, err := c.Output()
	if err != nil {
		return "", fmt.Errorf("rendering the chart: %w", err)
	}
	return string(out), nil
}

// needsVault refuses to run on the other installation.
func needsVault(t *testing.T) {
	t.Helper()
	if vault == nil {
		t.Fatal("this installation has a root of its own; make e2e-vault runs it with Vault's")
	}
}

// Pods of a CA whose root is in Vault: their chains end in Vault's root, which is all
// that they trust, and operators are told.
func TestVaultSigns(t *testing.T) {
	needsVault(t)
	ns := namespace(t)
	account(t, ns, "cart")
	cart := start(t, app(ns, "cart", "cart", true))[0]
	got := cart.svid(t)
	content, err := os.ReadFile(vault.root())
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(content)
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Roots) != 1 || !slices.Equal(got.Roots[0], root.Raw) {
		t.Errorf("the pod trusts %d roots, want Vault's alone", len(got.Roots))
	}
	eventually(t, 20*time.Second, "meshca status to tell of Vault", func(context.Context) error {
		code, out := meshca(t, "status", "--namespace", ns)
		if code != 0 || !strings.Contains(out, "upstream vault ok") || !strings.Contains(out, "a restart now loses nothing") {
			return fmt.Errorf("exit %d\n%s", code, out)
		}
		return nil
	})
	if code, out := meshca(t, "check", "--all", "--kubelet-dir="+node.KubeletDir()); code != 0 {
		t.Errorf("meshca check: exit %d\n%s", code, out)
	}
}

// Vault sealed: pods come and get their certificates, status says until when, and it
// heals by itself.
func TestF44_VaultSealed(t *testing.T) {
	needsVault(t)
	ns := namespace(t)
	account(t, ns, "cart")
	v := func(args ...string) {
		t.Helper()
		if out, err := vault.command(t.Context(), vault.binary, args...).CombinedOutput(); err != nil {
			t.Fatalf("vault %s: %v\n%s", args[0], err, out)
		}
	}
	key := vault.unsealKey(t)
	v("operator", "seal")
	eventually(t, 60*time.Second, "meshca status to say that Vault is sealed", func(context.Context) error {
		code, out := meshca(t, "status")
		if code != 1 || !strings.Contains(out, "upstream vault sealed") || !strings.Contains(out, "2 of 2 CAs can sign") || !strings.Contains(out, "a restart now loses signing on 2 CAs") {
			return fmt.Errorf("exit %d\n%s", code, out)
		}
		return nil
	})
	start(t, app(ns, "cart", "cart", true))[0].svid(t)
	v("operator", "unseal", key)
	eventually(t, 30*time.Second, "meshca status to say that all is well", func(context.Context) error {
		code, out := meshca(t, "status", "--namespace", ns)
		if code != 0 || !strings.Contains(out, "upstream vault ok") {
			return fmt.Errorf("exit %d\n%s", code, out)
		}
		return nil
	})
}

// unsealKey is printed by a development server at its start.
func (v *vaultServer) unsealKey(t *testing.T) string {
	t.Helper()
	_, rest, found := strings.Cut(string(v.process.Log()), "Unseal Key: ")
	if !found {
		t.Fatal("Vault has not said its unseal key")
	}
	key, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(key)
}
