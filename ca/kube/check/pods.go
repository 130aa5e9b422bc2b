package check

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/ca/kube/volumes"
)

// pods is what matters of all pods of the cluster, in one pass.
type pods struct {
	root      []string // can do what root can on their node, with the reason
	expected  int      // the same in kube-system
	writable  []string
	unmounted []string
	users     []volumes.Pod
}

// kubeSystem is where a node's own helpers are. Who may write there owns the nodes
// anyway.
const kubeSystem = "kube-system"

func (r *run) readPods(ctx context.Context) (*pods, error) {
	return r.pods.get(func() (*pods, error) {
		found, sensitive := new(pods), r.sensitive(ctx)
		now := r.Now()
		err := volumes.Each(ctx, r.client, func(p *corev1.Pod) {
			if volumes.Finished(p) {
				return
			}
			name := p.Namespace + "/" + p.Name
			if why := rootOnNode(p, sensitive); why != "" && !r.isAgent(p) {
				if p.Namespace == kubeSystem {
					found.expected++
				} else {
					found.root = append(found.root, name+": "+why)
				}
			}
			if volumes.Uses(p, now) {
				found.users = append(found.users, volumes.Pod{Namespace: p.Namespace, Name: p.Name, Node: p.Spec.NodeName})
			}
			for _, v := range volumes.Of(p) {
				about := fmt.Sprintf("%s: volume %q", name, v.Name)
				// A mount that is read-only is not enough: another container's need not be.
				if v.CSI.ReadOnly == nil || !*v.CSI.ReadOnly {
					found.writable = append(found.writable, about)
				}
				if !mounted(p, v.Name) {
					found.unmounted = append(found.unmounted, about)
				}
			}
		})
		if err != nil {
			return nil, err
		}
		slices.Sort(found.root)
		slices.Sort(found.writable)
		slices.Sort(found.unmounted)
		return found, nil
	})
}

// isAgent tells our own, which the kubelet's folder is for. Labels anybody can have;
// the namespace and the account are the agents' alone.
func (r *run) isAgent(p *corev1.Pod) bool {
	return p.Namespace == r.AgentsNamespace && p.Spec.ServiceAccountName == "meshca-agent"
}

// sensitive are the folders of a node from which another pod's identity can be had:
// the kubelet's, with all pods' volumes and sockets; the agent's own; and those
// through which one starts whatever one likes as root.
func (r *run) sensitive(ctx context.Context) []string {
	all := []string{r.KubeletDir, "/run/meshca-agent", "/proc", "/etc/kubernetes",
		"/run/containerd", "/run/crio", "/run/docker.sock", "/run/k3s/containerd"}
	if d, err := r.readDaemonSet(ctx); err == nil {
		for _, v := range d.Spec.Template.Spec.Volumes {
			if v.HostPath != nil {
				all = append(all, v.HostPath.Path)
			}
		}
	}
	for i := range all {
		all[i] = onNode(all[i])
	}
	return all
}

// onNode is a path in the form in which paths are compared. /var/run is /run on every
// Linux that a kubelet runs on.
func onNode(p string) string {
	p = path.Clean("/" + p)
	if p == "/var/run" || strings.HasPrefix(p, "/var/run/") {
		return strings.TrimPrefix(p, "/var")
	}
	return p
}

// overlaps reports whether one path is, holds or lies in the other.
func overlaps(a, b string) bool { return within(a, b) || within(b, a) }

func within(p, folder string) bool {
	return p == folder || folder == "/" || strings.HasPrefix(p, folder+"/")
}

// strong are capabilities with which a container does what it likes on the node.
var strong = []corev1.Capability{"ALL", "SYS_ADMIN", "SYS_MODULE", "SYS_RAWIO", "DAC_READ_SEARCH", "BPF"}

// rootOnNode says why a pod can do what root can on its node, or nothing.
func rootOnNode(p *corev1.Pod, sensitive []string) string {
	for _, c := range containers(p) {
		s := c.SecurityContext
		if s == nil {
			continue
		}
		if s.Privileged != nil && *s.Privileged {
			return fmt.Sprintf("container %q is privileged", c.Name)
		}
		if s.Capabilities == nil {
			continue
		}
		for _, have := range s.Capabilities.Add {
			if slices.Contains(strong, corev1.Capability(strings.TrimPrefix(strings.ToUpper(string(have)), "CAP_"))) {
				return fmt.Sprintf("container %q has the capability %s", c.Name, have)
			}
		}
	}
	if p.Spec.HostPID {
		return "hostPID: it sees the node's processes, and their files"
	}
	for _, v := range p.Spec.Volumes {
		if v.HostPath == nil {
			continue
		}
		for _, s := range sensitive {
			if overlaps(onNode(v.HostPath.Path), s) {
				return fmt.Sprintf("hostPath %s", v.HostPath.Path)
			}
		}
	}
	return ""
}

// containers are all of a pod, whenever they run.
func containers(p *corev1.Pod) []corev1.Container {
	all := slices.Concat(p.Spec.InitContainers, p.Spec.Containers)
	for _, e := range p.Spec.EphemeralContainers {
		all = append(all, corev1.Container(e.EphemeralContainerCommon))
	}
	return all
}

// mounted reports whether any container mounts a volume.
func mounted(p *corev1.Pod, volume string) bool {
	return slices.ContainsFunc(containers(p), func(c corev1.Container) bool {
		return slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == volume })
	})
}

func (r *run) rootPods(ctx context.Context) Result {
	found, err := r.readPods(ctx)
	if err != nil {
		return unknown(err)
	}
	expected := ""
	if found.expected > 0 {
		expected = fmt.Sprintf("; %d in kube-system beside, as is expected", found.expected)
	}
	if len(found.root) > 0 {
		return attention("each of them can take any identity of its node; see whether they have to be so",
			"%s%s", plural(len(found.root), "pod"), expected).about(found.root)
	}
	return holds("none%s", expected)
}

func (r *run) writable(ctx context.Context) Result {
	found, err := r.readPods(ctx)
	if err != nil {
		return unknown(err)
	}
	if len(found.writable) > 0 {
		return broken("write readOnly: true beside driver: csi.meshca.dev in those pods",
			"%s without readOnly: agents refuse them, and those pods do not start", plural(len(found.writable), "volume")).about(found.writable)
	}
	return holds("none")
}

func (r *run) unmounted(ctx context.Context) Result {
	found, err := r.readPods(ctx)
	if err != nil {
		return unknown(err)
	}
	if len(found.unmounted) > 0 {
		return attention("mount them where the program looks, such as /run/meshca, or take them out of the pod",
			"%s: those pods have an identity that nothing in them can use", plural(len(found.unmounted), "volume")).about(found.unmounted)
	}
	return holds("none")
}

func (r *run) orphans(ctx context.Context) Result {
	found, err := r.readPods(ctx)
	if err != nil {
		return unknown(err)
	}
	agents, err := r.readAgents(ctx)
	if err != nil {
		return unknown(err)
	}
	served := make(map[string]bool)
	for _, a := range agents {
		if _, notReady := judgePods([]corev1.Pod{a}); len(notReady) == 0 && a.DeletionTimestamp == nil {
			served[a.Spec.NodeName] = true
		}
	}
	var without []string
	for _, u := range found.users {
		if u.Node != "" && !served[u.Node] {
			without = append(without, fmt.Sprintf("%s (%s)", u, u.Node))
		}
	}
	if len(without) > 0 {
		slices.Sort(without)
		return broken("bring an agent up on their nodes (see MC0401), or put such pods elsewhere: agent.nodeSelector and agent.tolerations",
			"%s: their certificates are not renewed, and they cannot end cleanly", plural(len(without), "pod")).about(without)
	}
	return holds("none of %s with a volume", plural(len(found.users), "pod"))
}
