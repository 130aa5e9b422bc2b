package testenv

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// KubernetesVersion is the release that test/tools/k8s pins. It is linked into
// the API server, which otherwise believes to be version 0.
const KubernetesVersion = "v1.37.2"

// KubernetesBinaries are paths of executables.
type KubernetesBinaries struct {
	APIServer string
	Etcd      string
}

// Kubernetes builds the API server and etcd from their modules, which takes
// minutes and about 2.5 GB of memory the first time.
func Kubernetes(ctx context.Context, c *Cache) (KubernetesBinaries, error) {
	root, err := RepositoryRoot()
	if err != nil {
		return KubernetesBinaries{}, err
	}
	module := filepath.Join(root, "test", "tools", "k8s")
	sum := sha256.New()
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(module, name))
		if err != nil {
			return KubernetesBinaries{}, fmt.Errorf("reading which Kubernetes to build: %w", err)
		}
		sum.Write(content)
	}
	fmt.Fprint(sum, runtime.Version(), runtime.GOARCH, kubernetesFlags())
	key := fmt.Sprintf("kubernetes-%s-%s", KubernetesVersion, hex.EncodeToString(sum.Sum(nil))[:16])

	what := "kube-apiserver " + KubernetesVersion + " and etcd, built from source"
	dir, err := c.entry(ctx, key, what, func(ctx context.Context, dir string) error {
		if err := goBuild(ctx, module, filepath.Join(dir, "etcd"), "go.etcd.io/etcd/server/v3"); err != nil {
			return err
		}
		return goBuild(ctx, module, filepath.Join(dir, "kube-apiserver"), "k8s.io/kubernetes/cmd/kube-apiserver")
	})
	if err != nil {
		return KubernetesBinaries{}, err
	}
	return KubernetesBinaries{
		APIServer: filepath.Join(dir, "kube-apiserver"),
		Etcd:      filepath.Join(dir, "etcd"),
	}, nil
}

func kubernetesFlags() string {
	const p = " -X k8s.io/component-base/version."
	return "-s -w" + p + "gitVersion=" + KubernetesVersion + p + "gitMajor=1" + p + "gitMinor=37"
}

func goBuild(ctx context.Context, module, output, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-mod=readonly", "-buildvcs=false",
		"-ldflags", kubernetesFlags(), "-o", output, pkg)
	cmd.Dir = module
	// A workspace or flags meant for our own code must not decide what is built here.
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s in %q: %w\n%s", pkg, module, err, bytes.TrimSpace(out))
	}
	return nil
}

// RepositoryRoot finds the checkout that holds the working directory. Tests
// run in their package's directory, in whatever module, so it looks upwards.
func RepositoryRoot() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the repository: %w", err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		if exists(filepath.Join(dir, "test", "tools", "k8s", "go.mod")) {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("finding the repository: no directory above %q holds test/tools/k8s/go.mod", start)
		}
	}
}
