package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// volume is what the kubelet would publish, for a pod that runs without.
type volume struct {
	request *csi.NodePublishVolumeRequest
	folder  string // that the kubelet makes
	want    string // SPIFFE ID
}

func newVolume(t *testing.T, p *pod, account, name string) volume {
	t.Helper()
	uid := podUID(t, p)
	token := tokenOf(t, p, account, "meshca")
	secret, err := json.Marshal(map[string]any{"meshca": map[string]string{"token": token, "expirationTimestamp": time.Now().Add(time.Hour).Format(time.RFC3339)}})
	if err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(node.KubeletDir(), "pods", uid, "volumes/kubernetes.io~csi", name)
	if err := os.MkdirAll(folder, 0o750); err != nil {
		t.Fatal(err)
	}
	return volume{folder: folder, want: id(p.namespace, account), request: &csi.NodePublishVolumeRequest{
		VolumeId: "csi-e2e-" + name + "-" + uid, TargetPath: filepath.Join(folder, "mount"), Readonly: true,
		VolumeCapability: &csi.VolumeCapability{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY},
		},
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/pod.name": p.name, "csi.storage.k8s.io/pod.namespace": p.namespace, "csi.storage.k8s.io/pod.uid": uid,
			"csi.storage.k8s.io/serviceAccount.name": account, "csi.storage.k8s.io/ephemeral": "true",
		},
		Secrets: map[string]string{"csi.storage.k8s.io/serviceAccount.tokens": string(secret)},
	}}
}

// plugin connects to the agent as the kubelet does.
func plugin(t *testing.T) csi.NodeClient {
	t.Helper()
	socket := filepath.Join(node.KubeletDir(), "plugins/csi.meshca.dev/csi.sock")
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return csi.NewNodeClient(conn)
}

// fetch gets the SVID from the volume's socket, as a new client.
func (v volume) fetch(ctx context.Context) error {
	// The path is longer than a socket's address can be.
	folder, err := os.Open(v.request.TargetPath)
	if err != nil {
		return err
	}
	defer folder.Close()
	short := fmt.Sprintf("/proc/self/fd/%d/agent.sock", folder.Fd())
	c, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+short), workloadapi.WithDialOptions(grpc.WithContextDialer(
		func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", short)
		})))
	if err != nil {
		return err
	}
	defer c.Close()
	got, err := c.FetchX509SVID(ctx)
	if err == nil && got.ID.String() != v.want {
		err = fmt.Errorf("the SVID is for %s, want %s", got.ID, v.want)
	}
	return err
}

// unpublish takes the volume back, and the folder as the kubelet does.
func (v volume) unpublish(t *testing.T, kubelet csi.NodeClient) {
	t.Helper()
	_, err := kubelet.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.request.VolumeId, TargetPath: v.request.TargetPath})
	if err == nil {
		err = os.Remove(v.folder)
	}
	if err != nil {
		t.Error(err)
	}
}

// atOnce does one thing for all volumes at one instant, and returns how long each
// took, sorted.
func atOnce(t *testing.T, volumes []volume, do func(context.Context, volume) error) []time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	times, errs := make([]time.Duration, len(volumes)), make([]error, len(volumes))
	var wg sync.WaitGroup
	for i, v := range volumes {
		wg.Go(func() {
			began := time.Now()
			errs[i] = do(ctx, v)
			times[i] = time.Since(began)
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			t.Errorf("volume %s: %v", volumes[i].request.VolumeId, err)
		}
	}
	slices.Sort(times)
	return times
}

// TestVolumes publishes volumes as the kubelet does, for pods that run, with tokens
// that the API server made for them.
func TestVolumes(t *testing.T) {
	const pods, each = 125, 2 // 250 volumes; 2 are what a pod may have
	ns := namespace(t)
	account(t, ns, "many")
	var specs []*corev1.Pod
	for i := range pods {
		specs = append(specs, app(ns, fmt.Sprintf("many-%d", i), "many", false))
	}
	running := start(t, specs[:50]...)
	kubelet := plugin(t)
	publish := func(ctx context.Context, v volume) error {
		_, err := kubelet.NodePublishVolume(ctx, v.request)
		return err
	}
	fetch := func(ctx context.Context, v volume) error { return v.fetch(ctx) }
	t.Run("50 at once", func(t *testing.T) {
		const n = 50
		best, resting := time.Hour, true
		for round := range 5 {
			var volumes []volume
			for _, p := range running[:n] {
				volumes = append(volumes, newVolume(t, p, "many", "bench"))
			}
			resting = resting && calm(t)
			agent, cas, self := cpu(t, "/agent"), cpu(t, "/meshca"), cpu(t, os.Args[0])
			// The call returns when the SVID is there to be had; programs come then.
			times := atOnce(t, volumes, publish)
			agentUsed, casUsed, selfUsed := cpu(t, "/agent")-agent, cpu(t, "/meshca")-cas, cpu(t, os.Args[0])-self
			fetched := atOnce(t, volumes, fetch)
			t.Logf("round %d, from the call until the SVID is there: p50 %v, p99 %v, at most %v; CPU of the agent %v, of the CAs %v, of the caller %v; then 50 new clients at once have it after p50 %v, p99 %v",
				round, times[n/2], times[n*99/100], times[n-1], agentUsed, casUsed, selfUsed, fetched[n/2], fetched[n*99/100])
			best = min(best, times[n*99/100])
			for _, v := range volumes {
				v.unpublish(t, kubelet)
			}
		}
		// Judged where the machine has nothing else to do, and whoever asks knows that.
		if os.Getenv("E2E_TIMES") != "" && best > 100*time.Millisecond {
			t.Errorf("p99 is %v in the best round, want at most 100ms", best)
		}
	})
	running = append(running, start(t, specs[50:]...)...)
	t.Run("250 and the agent killed", func(t *testing.T) {
		var volumes []volume
		for _, p := range running {
			for i := range each {
				volumes = append(volumes, newVolume(t, p, "many", fmt.Sprintf("v%d", i)))
			}
		}
		times := atOnce(t, volumes, publish)
		t.Logf("%d volumes at once: p50 %v, at most %v", len(volumes), times[len(times)/2], times[len(times)-1])
		atOnce(t, volumes, fetch)
		killAgent(t)
		began := time.Now()
		times = atOnce(t, volumes, func(ctx context.Context, v volume) error {
			for {
				err := v.fetch(ctx)
				if err == nil || ctx.Err() != nil {
					return err
				}
			}
		})
		t.Logf("the agent was killed with %d volumes; new clients on half of them were served after %v, on all after %v", len(volumes), times[len(times)/2], time.Since(began))
		for _, v := range volumes {
			v.unpublish(t, kubelet)
		}
	})
}

// calm waits until the machine has little else to do, such as the start of the pods,
// but not for ever, and reports whether it does: what is measured on a busy one is
// reported too.
func calm(t *testing.T) bool {
	t.Helper()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	busy, all := ticks(t)
	for range 15 {
		<-tick.C
		b, a := ticks(t)
		if share := float64(b-busy) / float64(a-all); share < 0.15 {
			return true
		}
		busy, all = b, a
	}
	t.Log("the machine does not come to rest")
	return false
}

// ticks returns for how long all processors together have been busy, and have been up,
// in hundredths of a second.
func ticks(t *testing.T) (busy, all int) {
	t.Helper()
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(stat), "\n")
	for i, field := range strings.Fields(line)[1:9] {
		n, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		all += n
		if i != 3 && i != 4 { // idle, and waiting for a disk
			busy += n
		}
	}
	return busy, all
}

// cpu is the CPU time that all processes of a program have used.
func cpu(t *testing.T, program string) time.Duration {
	t.Helper()
	var sum time.Duration
	for _, pid := range processes(t, program) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // it has ended
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		for _, ticks := range fields[11:13] { // utime and stime, in hundredths of a second
			n, err := strconv.Atoi(ticks)
			if err != nil {
				t.Fatal(err)
			}
			sum += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return sum
}

// TestFiftyPodsAtOnce starts 50 pods with a volume each, and asks when each program
// had its SVID.
func TestFiftyPodsAtOnce(t *testing.T) {
	const n = 50
	ns := namespace(t)
	var specs []*corev1.Pod
	for i := range n {
		specs = append(specs, app(ns, fmt.Sprintf("pod-%d", i), "default", true))
	}
	began := time.Now()
	pods := start(t, specs...)
	running := time.Since(began)
	var slowest time.Duration
	for _, p := range pods {
		var s svid
		if err := p.do(t.Context(), "/first", nil, &s); err != nil {
			t.Fatal(err)
		}
		slowest = max(slowest, s.Took)
	}
	t.Logf("%d pods with a volume ran after %v; the slowest program waited %v from its start to its SVID", n, running, slowest)
	if slowest > 3*time.Second {
		t.Errorf("the slowest program waited %v for its SVID, want at most 3s", slowest)
	}
	// None may have failed to mount on the way.
	events, err := client.CoreV1().Events(ns).List(t.Context(), metav1.ListOptions{FieldSelector: "reason=FailedMount"})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events.Items {
		t.Errorf("%s: %s", e.InvolvedObject.Name, e.Message)
	}
}
