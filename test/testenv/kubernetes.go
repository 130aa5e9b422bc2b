package testenv

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
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
	what := "kube-apiserver " + KubernetesVersion + " and etcd, built from source"
	dir, err := kubernetesEntry(ctx, c, "kubernetes", what, map[string]string{
		"etcd":           "go.etcd.io/etcd/server/v3",
		"kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
	})
	if err != nil {
		return KubernetesBinaries{}, err
	}
	return KubernetesBinaries{
		APIServer: filepath.Join(dir, "kube-apiserver"),
		Etcd:      filepath.Join(dir, "etcd"),
	}, nil
}

// NodeBinaries are paths of the executables that a node, and a control plane that
// schedules pods to it, need beside the API server.
type NodeBinaries struct {
	ControllerManager string
	Scheduler         string
	Kubelet           string
	Proxy             string
	Kubectl           string
}

// Node builds the rest of Kubernetes, which takes minutes the first time.
func Node(ctx context.Context, c *Cache) (NodeBinaries, error) {
	names := []string{"kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"}
	packages := make(map[string]string)
	for _, n := range names {
		packages[n] = "k8s.io/kubernetes/cmd/" + n
	}
	what := "kubelet and the rest of Kubernetes " + KubernetesVersion + ", built from source"
	dir, err := kubernetesEntry(ctx, c, "kubernetes-node", what, packages)
	if err != nil {
		return NodeBinaries{}, err
	}
	path := func(i int) string { return filepath.Join(dir, names[i]) }
	return NodeBinaries{ControllerManager: path(0), Scheduler: path(1), Kubelet: path(2), Proxy: path(3), Kubectl: path(4)}, nil
}

// kubernetesEntry returns the cache's entry with the packages built as the names
// that they are under.
func kubernetesEntry(ctx context.Context, c *Cache, prefix, what string, packages map[string]string) (string, error) {
	root, err := RepositoryRoot()
	if err != nil {
		return "", err
	}
	module := filepath.Join(root, "test", "tools", "k8s")
	key, err := moduleKey(module, kubernetesFlags())
	if err != nil {
		return "", fmt.Errorf("reading which Kubernetes to build: %w", err)
	}
	return c.entry(ctx, fmt.Sprintf("%s-%s-%s", prefix, KubernetesVersion, key), what, func(ctx context.Context, dir string) error {
		for _, name := range slices.Sorted(maps.Keys(packages)) {
			if err := goBuild(ctx, module, filepath.Join(dir, name), packages[name], kubernetesFlags()); err != nil {
				return err
			}
		}
		return nil
	})
}

// moduleKey is a fingerprint of all that decides what is built in a module.
func moduleKey(module, flags string) (string, error) {
	sum := sha256.New()
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(module, name))
		if err != nil {
			return "", err
		}
		sum.Write(content)
	}
	fmt.Fprint(sum, runtime.Version(), runtime.GOARCH, flags, buildEnv)
	return hex.EncodeToString(sum.Sum(nil))[:16], nil
}

func kubernetesFlags() string {
	const p = " -X k8s.io/component-base/version."
	return "-s -w" + p + "gitVersion=" + KubernetesVersion + p + "gitMajor=1" + p + "gitMinor=37"
}

// buildEnv keeps a workspace, or flags meant for our own code, from deciding what
// is built here, and makes binaries that run in an image without a C library.
var buildEnv = []string{"GOWORK=off", "GOFLAGS=", "CGO_ENABLED=0"}

func goBuild(ctx context.Context, module, output, pkg, flags string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-mod=readonly", "-buildvcs=false", "-ldflags", flags, "-o", output, pkg)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), buildEnv...)
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
