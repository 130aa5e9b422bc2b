package delivery

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/meshca/meshca/test/bench/measure"
	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/testenv"
)

// startingAtOnce is how many volumes the kubelet asks for at the same time.
const startingAtOnce = 8

// driver is the plugin's name, which is in the paths of its sockets.
const driver = "csi.meshca.dev"

// node is an agent in a process of its own, and all that a kubelet does for it.
type node struct {
	run     *rig.Run
	agent   *testenv.Process
	ops     string // the address of the agent's metrics
	kubelet string // its folder
	conn    *grpc.ClientConn
	volumes []*socket
	closers []func() error
}

// startNode starts the agent whose pod that is, and registers it as the kubelet does.
func startNode(ctx context.Context, r *rig.Run, m *rig.Mesh, self rig.Pod, round int) (n *node, err error) {
	dir := filepath.Join(r.Dir, fmt.Sprintf("node-%d", round))
	n = &node{run: r, kubelet: filepath.Join(dir, "kubelet")}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.stop())
		}
	}()
	for _, d := range []string{"pods", "plugins", "plugins_registry"} {
		if err := os.MkdirAll(filepath.Join(n.kubelet, d), 0o750); err != nil {
			return n, err
		}
	}
	program, err := r.Program(ctx, "./cmd/agent")
	if err != nil {
		return n, err
	}
	token, err := r.Write("agent.token", []byte(self.Token))
	if err != nil {
		return n, err
	}
	// The state is read at a start only, and the run's directory is removed whatever
	// happens; so it need not lie in memory.
	p, stop, err := r.Start(fmt.Sprintf("agent-%d", round), program, append([]string{
		"node", "--ca", m.Address, "--trust-anchor", m.Anchor, "--token-file", token, "--kubelet-dir", n.kubelet,
		"--node-state-dir", filepath.Join(dir, "state"), "--allow-state-on-disk", "--ops-listen", "127.0.0.1:0",
	}, rig.Profiled()...)...)
	if err != nil {
		return n, err
	}
	n.agent = p
	n.closers = append(n.closers, stop)
	if err := n.register(ctx); err != nil {
		return n, fmt.Errorf("registering the agent: %w; the last of its log:\n%s", err, p.LogTail(5))
	}
	return n, nil
}

// register is what the kubelet does with a plugin's socket that it finds.
func (n *node) register(ctx context.Context) error {
	conn, err := n.dial(ctx, filepath.Join(n.kubelet, "plugins_registry", driver+"-reg.sock"))
	if err != nil {
		return err
	}
	kubelet := registration.NewRegistrationClient(conn)
	info, err := kubelet.GetInfo(ctx, &registration.InfoRequest{})
	if err != nil {
		return err
	}
	if n.conn, err = n.dial(ctx, info.GetEndpoint()); err != nil {
		return err
	}
	if _, err := spec.NewNodeClient(n.conn).NodeGetInfo(ctx, &spec.NodeGetInfoRequest{}); err != nil {
		return err
	}
	if _, err := kubelet.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
		return err
	}
	for l := range logged(n.agent, "serving the node's volumes") {
		n.ops = l.Ops
	}
	return rig.Ready(ctx, "the agent", n.ops, n.agent)
}

// dial connects to one of the sockets for the kubelet, as soon as it is there.
func (n *node) dial(ctx context.Context, path string) (*grpc.ClientConn, error) {
	s, err := openSocket(path)
	if err == nil {
		n.closers = append(n.closers, s.close)
		err = rig.Poll(ctx, "the agent's socket "+filepath.Base(path), time.Minute, func() error {
			c, err := s.connect(ctx)
			if err == nil {
				err = c.Close()
			}
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	conn, err := s.dial()
	if err == nil {
		n.closers = append(n.closers, conn.Close)
	}
	return conn, err
}

// publish has the volumes of pods made, as when they start. Each has its certificate
// when that returns.
func (n *node) publish(ctx context.Context, pods []rig.Pod) error {
	n.volumes = make([]*socket, len(pods))
	group, within := errgroup.WithContext(ctx)
	group.SetLimit(startingAtOnce)
	for i, pod := range pods {
		group.Go(func() error {
			request, err := n.request(pod)
			if err != nil {
				return err
			}
			if _, err := spec.NewNodeClient(n.conn).NodePublishVolume(within, request); err != nil {
				return fmt.Errorf("publishing the volume of pod %s: %w", pod.Name, err)
			}
			n.volumes[i], err = openSocket(filepath.Join(request.GetTargetPath(), "agent.sock"))
			return err
		})
	}
	err := group.Wait()
	for _, v := range n.volumes {
		if v != nil {
			n.closers = append(n.closers, v.close)
		}
	}
	return err
}

// request is what the kubelet asks for a pod's volume with, in whose folder it has made
// all but the last.
func (n *node) request(pod rig.Pod) (*spec.NodePublishVolumeRequest, error) {
	const from = "csi.storage.k8s.io/"
	parent := filepath.Join(n.kubelet, "pods", pod.UID, "volumes", "kubernetes.io~csi", "meshca")
	if err := os.MkdirAll(parent, 0o750); err != nil {
		return nil, err
	}
	tokens, err := json.Marshal(map[string]any{"meshca": map[string]string{
		"token": pod.Token, "expirationTimestamp": time.Now().Add(time.Hour).UTC().Format(time.RFC3339),
	}})
	if err != nil {
		return nil, err
	}
	return &spec.NodePublishVolumeRequest{
		VolumeId: "csi-" + pod.UID, TargetPath: filepath.Join(parent, "mount"), Readonly: true,
		VolumeCapability: &spec.VolumeCapability{
			AccessType: &spec.VolumeCapability_Mount{Mount: &spec.VolumeCapability_MountVolume{}},
			AccessMode: &spec.VolumeCapability_AccessMode{Mode: spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: map[string]string{
			from + "pod.name": pod.Name, from + "pod.namespace": rig.Namespace, from + "pod.uid": pod.UID,
			from + "serviceAccount.name": pod.Account, from + "ephemeral": "true",
		},
		Secrets: map[string]string{from + "serviceAccount.tokens": string(tokens)},
	}, nil
}

// stop ends the agent, last of all.
func (n *node) stop() error {
	var errs []error
	for i := len(n.closers) - 1; i >= 0; i-- {
		errs = append(errs, n.closers[i]())
	}
	return errors.Join(errs...)
}

// settled is the agent's memory once a second changes less than a hundredth of it.
func (n *node) settled(ctx context.Context) (bytes float64, err error) {
	last := 0.0
	for range 60 {
		m, err := measure.MemoryOf(n.agent.PID())
		if err != nil {
			return 0, err
		}
		now := float64(m.Resident())
		if change := now - last; change < now/100 && -change < now/100 {
			return now, nil
		}
		last = now
		if err := pause(ctx, time.Second); err != nil {
			return 0, err
		}
	}
	return 0, errors.New("the agent's memory does not settle within a minute")
}

// held is what the agent holds by its own metrics.
type held struct {
	goroutines, files float64
	nextGC            float64 // bytes of heap at which it collects garbage next
}

func (n *node) held(ctx context.Context) (h held, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.ops+"/metrics", nil)
	if err != nil {
		return h, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return h, err
	}
	defer resp.Body.Close()
	into := map[string]*float64{"go_goroutines": &h.goroutines, "process_open_fds": &h.files, "go_memstats_next_gc_bytes": &h.nextGC}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if v := into[name]; v != nil {
			if *v, err = strconv.ParseFloat(value, 64); err != nil {
				return h, fmt.Errorf("reading the metric %s: %w", name, err)
			}
			delete(into, name)
		}
	}
	if len(into) > 0 {
		return h, errors.Join(fmt.Errorf("%d of the agent's metrics are missing", len(into)), lines.Err())
	}
	return h, lines.Err()
}

// socket is a Unix socket, known by its folder: paths of volumes are longer than a
// socket's address may be. In a pod the folder is mounted, and the path is short.
type socket struct {
	folder *os.File
	name   string
}

func openSocket(path string) (*socket, error) {
	folder, err := os.Open(filepath.Dir(path))
	return &socket{folder, filepath.Base(path)}, err
}

func (s *socket) close() error { return s.folder.Close() }

func (s *socket) connect(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", s.folder.Fd(), s.name))
}

// dial makes a connection of its own, with small buffers: what is measured is the
// agent, and a thousand clients live in this one process.
func (s *socket) dial() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.connect(ctx) }))
}

// line is what is read of a line of a program's log.
type line struct {
	Time  time.Time
	Msg   string
	Ops   string
	Roots int
}

// logged are the lines with that message in a program's log so far.
func logged(p *testenv.Process, msg string) iter.Seq[line] {
	return func(yield func(line) bool) {
		for text := range strings.Lines(string(p.Log())) {
			var l line
			// A last line may be there in part; what is not JSON is not looked for.
			if json.Unmarshal([]byte(text), &l) == nil && l.Msg == msg && !yield(l) {
				return
			}
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
