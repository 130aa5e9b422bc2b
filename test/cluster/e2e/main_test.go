package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/meshca/meshca/test/cluster"
	"github.com/meshca/meshca/test/testenv"
)

// What all tests share.
var (
	node   *cluster.Cluster
	client kubernetes.Interface
	config *rest.Config
	// installed is how long it took from the manifest to agents and CAs that are
	// ready.
	installed time.Duration
)

func TestMain(m *testing.M) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	err := setUp(ctx)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		tellState()
		os.Exit(1)
	}
	code := m.Run()
	if code != 0 {
		tellState()
	}
	if vault != nil {
		if err := vault.process.Kill(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// setUp begins with a cluster that has never seen meshca.
func setUp(ctx context.Context) (err error) {
	if err := cluster.Missing(); err != nil {
		return err
	}
	c, err := cluster.Open(cluster.DefaultDir(), os.Stderr)
	if err != nil {
		return err
	}
	// For whoever works on one test: what a run before has installed is used as it is.
	reuse := os.Getenv("E2E_REUSE") != ""
	if !reuse {
		if err := c.Down(ctx); err != nil {
			return err
		}
	}
	if node, err = cluster.Up(ctx, c.Dir(), os.Stderr); err != nil {
		return err
	}
	if config, err = clientcmd.BuildConfigFromFlags("", node.Kubeconfig()); err != nil {
		return err
	}
	config.Dial, config.QPS, config.Burst = node.Dial, 1000, 1000
	if client, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if reuse {
		return nil
	}
	if err := importImages(ctx); err != nil {
		return err
	}
	switch upstream {
	case "":
	case "vault":
		if vault, err = startVault(ctx); err != nil {
			return err
		}
	default:
		return fmt.Errorf("E2E_UPSTREAM is %q; known is vault", upstream)
	}
	return install(ctx)
}

// importImages builds what this checkout holds and gives it to the node under the
// names that the manifest has.
func importImages(ctx context.Context) error {
	tag, err := manifestTag()
	if err != nil {
		return err
	}
	dir := filepath.Join(node.Dir(), "images")
	var images []cluster.Image
	for _, p := range []struct{ module, pkg, name, user string }{
		{".", "./cmd/meshca", "ghcr.io/meshca/meshca:" + tag, "65532:65532"},
		{".", "./cmd/agent", "ghcr.io/meshca/meshca-agent:" + tag, ""},
		{".", "./cmd/proxy", "ghcr.io/meshca/meshca-proxy:" + tag, "15006:15006"},
		{"test/cluster", "./app", "localhost/app:1", "10001:10001"},
	} {
		binary, err := testenv.Build(ctx, dir, p.module, p.pkg)
		if err != nil {
			return err
		}
		to := "/" + filepath.Base(p.pkg)
		images = append(images, cluster.Image{Name: p.name, Files: map[string]string{to: binary}, Entrypoint: []string{to}, User: p.user})
	}
	envoy, err := envoyImage(ctx)
	if err != nil {
		return err
	}
	return node.Import(ctx, append(images, envoy)...)
}

// envoyImage is Envoy as its publisher built it, with this machine's C library.
func envoyImage(ctx context.Context) (cluster.Image, error) {
	cache, err := testenv.OpenCache(os.Stderr)
	if err != nil {
		return cluster.Image{}, err
	}
	binary, err := testenv.Envoy(ctx, cache)
	if err != nil {
		return cluster.Image{}, err
	}
	i := cluster.Image{Name: "localhost/envoy:1", Files: map[string]string{"/envoy": binary}, Entrypoint: []string{"/envoy"}, User: "10002:10002"}
	out, err := exec.CommandContext(ctx, "ldd", binary).Output()
	if err != nil {
		return i, fmt.Errorf("finding the libraries of Envoy: %w", err)
	}
	for _, word := range strings.Fields(string(out)) {
		if filepath.IsAbs(word) {
			i.Files[word] = word
		}
	}
	return i, nil
}

// manifest is deploy/meshca.yaml, or the chart with an upstream, with the two paths that differ on this node.
func manifest() (string, error) {
	root, err := testenv.RepositoryRoot()
	if err != nil {
		return "", err
	}
	read, err := os.ReadFile(filepath.Join(root, "deploy", "meshca.yaml"))
	content := string(read)
	if err == nil && upstream != "" {
		content, err = rendered(context.Background())
	}
	if err != nil {
		return "", err
	}
	return strings.NewReplacer(
		"/var/lib/kubelet", node.KubeletDir(),
		"path: /run/meshca-agent", "path: "+filepath.Join(node.RunDir(), "meshca-agent"),
	).Replace(content), nil
}

func manifestTag() (string, error) {
	content, err := manifest()
	if err != nil {
		return "", err
	}
	_, rest, found := strings.Cut(content, "image: ghcr.io/meshca/meshca:")
	if !found {
		return "", fmt.Errorf("deploy/meshca.yaml names no image of the CA")
	}
	tag, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(tag), nil
}

// install is the one command, and the wait for what it began.
func install(ctx context.Context) error {
	content, err := manifest()
	if err != nil {
		return err
	}
	began := time.Now()
	if _, err := node.Kubectl(ctx, strings.NewReader(content), "apply", "-f", "-"); err != nil {
		return err
	}
	for _, what := range []string{"meshca-system deployment/meshca", "meshca-agents daemonset/meshca-agent"} {
		namespace, object, _ := strings.Cut(what, " ")
		if _, err := node.Kubectl(ctx, nil, "-n", namespace, "rollout", "status", object, "--timeout=90s"); err != nil {
			return err
		}
	}
	installed = time.Since(began)
	return nil
}

// tellState prints what somebody would look at first.
func tellState() {
	if node == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, args := range []string{
		"get pods -A -o wide",
		"get events -A --sort-by=.lastTimestamp",
		"-n meshca-system logs deployment/meshca --tail=60 --all-pods --prefix",
		"-n meshca-agents logs daemonset/meshca-agent --tail=60",
	} {
		out, err := node.Kubectl(ctx, nil, strings.Fields(args)...)
		fmt.Fprintf(os.Stderr, "\n== kubectl %s\n%s", args, out)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
}
