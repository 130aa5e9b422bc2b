package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/test/testenv"
)

const (
	// NodeName is the only node's.
	NodeName = "node1"
	// Issuer is the "iss" of every token that the API server makes.
	Issuer = "https://kubernetes.default.svc.cluster.local"

	apiPort  = 6443
	etcdPort = 2379
)

// Cluster is a cluster on this machine, which may run or not. Its methods may be
// called by one goroutine at a time.
type Cluster struct {
	dir      string
	progress io.Writer
	kubectl  string
}

// DefaultDir is where the cluster is unless told otherwise: $MESHCA_CLUSTER, or a
// directory that does not outlive the machine.
func DefaultDir() string {
	if dir := os.Getenv("MESHCA_CLUSTER"); dir != "" {
		return dir
	}
	return "/var/tmp/meshca-cluster"
}

// Open returns the cluster in a directory; it may not be there yet.
func Open(dir string, progress io.Writer) (*Cluster, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	return &Cluster{dir: dir, progress: progress, kubectl: filepath.Join(dir, "kubectl")}, nil
}

// Dir is the cluster's directory: its data, its logs, its kubeconfigs.
func (c *Cluster) Dir() string { return c.dir }

// Kubeconfig is the administrator's. The address in it is good inside the
// cluster's network namespace.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir, "admin.kubeconfig") }

// KubeletDir is the kubelet's root directory.
func (c *Cluster) KubeletDir() string { return filepath.Join(c.dir, "kubelet") }

// RunDir is in memory, as a node's /run is.
func (c *Cluster) RunDir() string { return filepath.Join(c.dir, "run") }

// Missing says what this machine lacks for a cluster, nil if nothing.
func Missing() error {
	var lacks []string
	if os.Getuid() != 0 {
		lacks = append(lacks, "root, to make a network namespace and run containers")
	}
	for program, pkg := range map[string]string{
		"containerd": "containerd", "ctr": "containerd", "runc": "runc", "ip": "iproute2", "nft": "nftables",
		"iptables": "iptables", "conntrack": "conntrack", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount",
	} {
		if _, err := exec.LookPath(program); err != nil {
			lacks = append(lacks, fmt.Sprintf("%s (package %s)", program, pkg))
		}
	}
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		lacks = append(lacks, "/usr/lib/cni/bridge (package containernetworking-plugins)")
	}
	if len(lacks) == 0 {
		return nil
	}
	slices.Sort(lacks)
	return fmt.Errorf("a cluster cannot run here: it lacks %s", strings.Join(slices.Compact(lacks), ", "))
}

func (c *Cluster) say(format string, args ...any) {
	fmt.Fprintf(c.progress, "cluster: "+format+"\n", args...)
}

// Up brings the cluster up, from whatever is left of one, and returns when its
// node takes pods and its DNS answers. One that is up already stays.
func Up(ctx context.Context, dir string, progress io.Writer) (*Cluster, error) {
	c, err := Open(dir, progress)
	if err != nil {
		return nil, err
	}
	if err := Missing(); err != nil {
		return nil, err
	}
	if c.healthy(ctx) == nil {
		c.say("is up already, in %s", c.dir)
		return c, nil
	}
	began := time.Now()
	if err := c.Down(ctx); err != nil {
		return nil, err
	}
	if err := c.up(ctx); err != nil {
		return nil, fmt.Errorf("bringing up a cluster in %s: %w", c.dir, err)
	}
	c.say("up after %s; try: %s get pods -A", time.Since(began).Round(100*time.Millisecond), c.kubectl)
	return c, nil
}

func (c *Cluster) up(ctx context.Context) error {
	cache, err := testenv.OpenCache(c.progress)
	if err != nil {
		return err
	}
	control, err := testenv.Kubernetes(ctx, cache)
	if err != nil {
		return err
	}
	node, err := testenv.Node(ctx, cache)
	if err != nil {
		return err
	}
	if err := c.writeConfig(); err != nil {
		return err
	}
	if err := c.writeKubectl(node.Kubectl); err != nil {
		return err
	}
	if err := c.makeRunDir(); err != nil {
		return err
	}
	if err := c.makeNetwork(ctx); err != nil {
		return err
	}
	for _, component := range c.components(control, node) {
		if err := component.Start(); err != nil {
			return err
		}
		switch component.Name {
		case "etcd":
			err = nil // the API server waits for it
		case "kube-apiserver":
			c.say("waiting for the API server")
			err = waitFor(ctx, "the API server", time.Minute, []*Component{c.Component("etcd"), component}, c.ready)
		case "containerd":
			err = waitFor(ctx, "containerd", 20*time.Second, []*Component{component}, c.containerdReady)
			if err == nil {
				err = c.importOwn(ctx, cache)
			}
		}
		if err != nil {
			return err
		}
	}
	if err := c.labelNode(ctx); err != nil {
		return err
	}
	return c.startDNS(ctx)
}

func (c *Cluster) makeRunDir() error {
	if err := os.Mkdir(c.RunDir(), 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", c.RunDir(), "tmpfs", 0, "mode=0755,size=64m"); err != nil {
		return fmt.Errorf("mounting a tmpfs on %q: %w", c.RunDir(), err)
	}
	return nil
}

// writeKubectl makes a kubectl that is in the right namespace, for people.
func (c *Cluster) writeKubectl(binary string) error {
	script := fmt.Sprintf("#!/bin/sh\n# kubectl as the cluster's administrator, in its network namespace.\nexec nsenter --net=%s %s --kubeconfig=%s \"$@\"\n",
		namespaceFile(c.dir), binary, c.Kubeconfig())
	return os.WriteFile(c.kubectl, []byte(script), 0o755)
}

// components are the processes, in the order in which they are started.
func (c *Cluster) components(control testenv.KubernetesBinaries, node testenv.NodeBinaries) []*Component {
	in := func(name string) string { return filepath.Join(c.dir, name) }
	etcd := "http://127.0.0.1:" + strconv.Itoa(etcdPort)
	return []*Component{
		{Name: "etcd", Path: control.Etcd, Args: []string{
			"--data-dir=" + in("etcd/data"), "--listen-client-urls=" + etcd, "--advertise-client-urls=" + etcd,
			"--listen-peer-urls=http://127.0.0.1:" + strconv.Itoa(etcdPort+1), "--unsafe-no-fsync", "--log-level=warn",
		}, dir: c.dir},
		{Name: "containerd", Path: "containerd", Args: []string{"--config=" + in("containerd.toml")}, dir: c.dir},
		{Name: "kube-apiserver", Path: control.APIServer, Args: []string{
			"--etcd-servers=" + etcd, "--cert-dir=" + in("pki/serving"),
			"--bind-address=0.0.0.0", "--advertise-address=" + NodeIP, "--secure-port=" + strconv.Itoa(apiPort),
			"--service-cluster-ip-range=" + serviceCIDR,
			"--service-account-issuer=" + Issuer,
			"--service-account-key-file=" + in("pki/sa.pub"), "--service-account-signing-key-file=" + in("pki/sa.key"),
			"--token-auth-file=" + in("pki/tokens.csv"), "--authorization-mode=Node,RBAC",
			"--enable-admission-plugins=NodeRestriction",
			"--kubelet-client-certificate=" + in("pki/kubelet-client.crt"), "--kubelet-client-key=" + in("pki/kubelet-client.key"),
			"--kubelet-preferred-address-types=InternalIP", "--allow-privileged=true",
			"--shutdown-delay-duration=0s",
		}, dir: c.dir},
		{Name: "kube-controller-manager", Path: node.ControllerManager, Args: []string{
			"--kubeconfig=" + in("controller-manager.kubeconfig"), "--use-service-account-credentials",
			"--service-account-private-key-file=" + in("pki/sa.key"), "--root-ca-file=" + in("pki/serving/apiserver.crt"),
			"--leader-elect=false", "--node-monitor-grace-period=20s",
		}, dir: c.dir},
		{Name: "kube-scheduler", Path: node.Scheduler, Args: []string{
			"--kubeconfig=" + in("scheduler.kubeconfig"), "--leader-elect=false",
		}, dir: c.dir},
		{Name: "kubelet", Path: node.Kubelet, Args: []string{
			"--config=" + in("kubelet.yaml"), "--kubeconfig=" + in("kubelet.kubeconfig"), "--root-dir=" + c.KubeletDir(),
			"--hostname-override=" + NodeName, "--node-ip=" + NodeIP, "--cert-dir=" + in("pki/kubelet"),
		}, dir: c.dir},
		{Name: "kube-proxy", Path: node.Proxy, Args: []string{
			"--kubeconfig=" + in("proxy.kubeconfig"), "--proxy-mode=nftables", "--cluster-cidr=" + podCIDR,
			"--hostname-override=" + NodeName,
			// These are the machine's, not the namespace's.
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
		}, dir: c.dir},
	}
}

// order is that of stopping: what watches others ends before them.
var order = []string{"kubelet", "kube-proxy", "kube-scheduler", "kube-controller-manager", "containerd", "kube-apiserver", "etcd"}

// Component returns one of: etcd, containerd, kube-apiserver,
// kube-controller-manager, kube-scheduler, kubelet, kube-proxy. It may be stopped
// and started again.
func (c *Cluster) Component(name string) *Component {
	component := &Component{Name: name, dir: c.dir}
	if content, err := os.ReadFile(component.specFile()); err == nil {
		_ = json.Unmarshal(content, component) // we wrote it; Start says what is wrong
	}
	return component
}

// apiClient trusts the API server's own certificate, and calls from inside the
// namespace.
func (c *Cluster) apiClient() (*http.Client, error) {
	pem, err := os.ReadFile(filepath.Join(c.dir, "pki", "serving", "apiserver.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	return &http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DialContext: c.Dial, DisableKeepAlives: true,
			TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		},
	}, nil
}

// Dial connects from inside the cluster's network namespace.
func (c *Cluster) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = inNamespace(c.dir, func() (err error) {
		// A socket belongs to the namespace of the thread that makes it. With an
		// address of digits, and one of them, Go makes it on this one.
		conn, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

func (c *Cluster) ready(ctx context.Context) error {
	client, err := c.apiClient()
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("https://%s:%d/readyz", NodeIP, apiPort), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("/readyz answers %s: %s", resp.Status, body)
	}
	return err
}

// healthy tells a cluster that is up from the rest of one.
func (c *Cluster) healthy(ctx context.Context) error {
	for _, name := range order {
		if !c.Component(name).Running() {
			return fmt.Errorf("%s does not run", name)
		}
	}
	return c.ready(ctx)
}

// Kubectl runs kubectl as the administrator and returns what it printed.
func (c *Cluster) Kubectl(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.kubectl, args...)
	cmd.Stdin = stdin
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// labelNode waits for the node.
func (c *Cluster) labelNode(ctx context.Context) error {
	c.say("waiting for the node")
	return waitFor(ctx, "the node to be ready", time.Minute, []*Component{c.Component("kubelet"), c.Component("containerd")}, func(ctx context.Context) error {
		out, err := c.Kubectl(ctx, nil, "get", "node", NodeName, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status} {.status.conditions[?(@.type=="Ready")].message} {.spec.taints}`)
		if err == nil && (!strings.HasPrefix(out, "True") || strings.Contains(out, "NoSchedule")) {
			err = fmt.Errorf("it says: %s", out)
		}
		return err
	})
}

func (c *Cluster) startDNS(ctx context.Context) error {
	if err := c.write("coredns.yaml", "files/coredns.yaml", c.values()); err != nil {
		return err
	}
	if _, err := c.Kubectl(ctx, nil, "apply", "-f", filepath.Join(c.dir, "coredns.yaml")); err != nil {
		return err
	}
	c.say("waiting for DNS")
	return waitFor(ctx, "CoreDNS", time.Minute, nil, func(ctx context.Context) error {
		out, err := c.Kubectl(ctx, nil, "-n", "kube-system", "get", "deployment", "coredns", "-o", "jsonpath={.status.readyReplicas}")
		if err == nil && out != "1" {
			err = errors.New("its pod is not ready")
		}
		return err
	})
}

// Down takes away what is left of the cluster in its directory: every process by
// its own id, then mounts, then files. It is no error if there is none.
func (c *Cluster) Down(ctx context.Context) error {
	if _, err := os.Stat(c.dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, name := range order {
		if name == "containerd" {
			// Containers end while their runtime can still be asked to.
			c.killTasks(ctx)
		}
		grace := 3 * time.Second
		if name == "kube-apiserver" || name == "etcd" {
			grace = 0 // they wait for their clients for a minute, and nothing is to be kept
		}
		if err := c.Component(name).Stop(grace); err != nil {
			return err
		}
	}
	if err := c.endShims(); err != nil {
		return err
	}
	if err := c.unmountAll(); err != nil {
		return err
	}
	if err := c.removeNetwork(); err != nil {
		return err
	}
	if err := os.RemoveAll(c.dir); err != nil {
		return fmt.Errorf("removing the cluster's directory: %w", err)
	}
	return nil
}

// endShims ends what containerd leaves behind so that containers outlive it: each
// shim and each container's first process, known by the cluster's directory in
// their command line or root.
func (c *Cluster) endShims() error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := identify(pid)
		if err != nil {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		ours := strings.Contains(string(cmdline), filepath.Join(c.dir, "containerd.sock")) && strings.Contains(string(cmdline), "shim")
		if !ours {
			continue
		}
		if err := p.end(unix.SIGKILL, 0); err != nil {
			return err
		}
	}
	return nil
}

// unmountAll unmounts all that is mounted below the directory, the last first.
func (c *Cluster) unmountAll() error {
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	for _, line := range slices.Backward(lines) {
		fields := strings.Fields(line)
		if len(fields) < 5 || !strings.HasPrefix(fields[4], c.dir+"/") {
			continue
		}
		if err := unix.Unmount(fields[4], unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			return fmt.Errorf("unmounting %q: %w", fields[4], err)
		}
	}
	return nil
}
