package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The cluster's addresses, inside its own network namespace.
const (
	NodeIP      = "10.244.0.1" // the bridge's, and so the node's and the API server's
	podCIDR     = "10.244.0.0/24"
	serviceCIDR = "10.96.0.0/16"
	dnsIP       = "10.96.0.10"
	bridge      = "meshca0"
)

// namespaceFile is where the cluster's network namespace has its name.
func namespaceFile(dir string) string { return filepath.Join(dir, "netns") }

// NetworkNamespace is a path that nsenter --net and setns take.
func (c *Cluster) NetworkNamespace() string { return namespaceFile(c.dir) }

// makeNetwork makes the namespace with its loopback and the bridge that pods will
// hang on. The bridge is there before the kubelet, whose node has its address.
func (c *Cluster) makeNetwork(ctx context.Context) error {
	file := namespaceFile(c.dir)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	// A bind mount keeps the namespace of the process that is gone.
	if err := run(ctx, "unshare", "--net="+file, "true"); err != nil {
		return fmt.Errorf("making a network namespace: %w", err)
	}
	return inNamespace(c.dir, func() error {
		for _, command := range []string{
			"ip link set lo up",
			"ip link add " + bridge + " type bridge",
			"ip address add " + NodeIP + "/24 dev " + bridge,
			"ip link set " + bridge + " up",
			// Without one, whatever asks for the machine's own address finds none.
			"ip route add default dev " + bridge,
		} {
			words := strings.Fields(command)
			if err := run(ctx, words[0], words[1:]...); err != nil {
				return fmt.Errorf("making the cluster's network: %w", err)
			}
		}
		for name, value := range map[string]string{
			"ipv4/ip_forward":          "1",
			"ipv4/conf/all/rp_filter":  "0",
			"ipv6/conf/all/forwarding": "1",
		} {
			// Written by the thread that is in the namespace: each has its own.
			if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644); err != nil {
				return fmt.Errorf("setting net/%s: %w", name, err)
			}
		}
		return nil
	})
}

// removeNetwork takes the namespace away, and with it all that is in it.
func (c *Cluster) removeNetwork() error {
	file := namespaceFile(c.dir)
	if err := unix.Unmount(file, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("removing the network namespace: %w", err)
	}
	return nil
}

// output runs a command and returns what it printed.
func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return string(out), nil
}

// run runs a command to its end; its output is in the error.
func run(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
