package csi_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// From the kubelet's first call to a program that has its SVID, and back.
func TestT9_PodGetsItsIdentityFromItsVolume(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	target := w.target(p)
	if len(target) < 108 {
		t.Fatalf("the path is too short to show anything: %s", target)
	}
	w.publish(i, p)
	w.publish(i, p) // the kubelet does it twice
	svid := w.served(p)
	if len(svid.Certificates) != 2 {
		t.Errorf("%d certificates", len(svid.Certificates))
	}
	folder, err := os.Lstat(target)
	check(t, err)
	socket, err := os.Lstat(filepath.Join(target, "agent.sock"))
	check(t, err)
	if folder.Mode() != os.ModeDir|0o755 || socket.Mode() != os.ModeSocket|0o666 {
		t.Errorf("folder %v, socket %v", folder.Mode(), socket.Mode())
	}
	if names := w.stateFiles(); len(names) != 1 {
		t.Errorf("the state holds %q", names)
	}
	info, err := os.Stat(filepath.Join(w.node.State, w.stateFiles()[0]))
	check(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the entry has mode %v", info.Mode())
	}
	w.unpublish(i, p)
	w.unpublish(i, p)
	if exists(target) || !exists(filepath.Dir(target)) || len(w.stateFiles()) != 0 {
		t.Errorf("left behind: %v, %q", exists(target), w.stateFiles())
	}
	i.stop()
	if strings.Contains(w.log.String(), "level=ERROR") {
		t.Errorf("on a good day:\n%s", w.log.String())
	}
}

func TestPublishTwiceAtOnce(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	req := w.request(p, p.token(w, "meshca"))
	var calls sync.WaitGroup
	for range 8 {
		calls.Go(func() {
			if _, err := i.NodePublishVolume(w.context(), req); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	w.served(p)
	if n := strings.Count(w.log.String(), "certificate obtained"); n != 1 {
		t.Errorf("%d certificates", n)
	}
}

// As many volumes as a large node has, all at once.
func TestL5_250Volumes(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	var calls sync.WaitGroup
	for n := range 250 {
		p := w.pod(n)
		req := w.request(p, p.token(w, "meshca"))
		calls.Go(func() {
			if _, err := i.NodePublishVolume(w.context(), req); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	for n := range 250 {
		w.served(w.pod(n))
	}
	i.stop()

	again := w.start()
	for n := range 250 {
		w.served(w.pod(n))
	}
	at := strings.Index(w.log.String(), "sockets of volumes are there again")
	t.Log(strings.SplitN(w.log.String()[at:], "\n", 2)[0])
	for n := range 250 {
		w.unpublish(again, w.pod(n))
	}
	if n := len(w.stateFiles()); n != 0 {
		t.Errorf("%d entries are left", n)
	}
}

// One pod has its share of the agent, and no more.
func TestOnePodHasTwoVolumes(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	for n := range 6 {
		req := w.request(p, p.token(w, "meshca"))
		req.VolumeId = fmt.Sprint("csi-", n)
		parent := filepath.Join(w.node.Kubelet, "pods", p.uid, "volumes", "kubernetes.io~csi", fmt.Sprint("v", n))
		check(t, os.MkdirAll(parent, 0o750))
		req.TargetPath = filepath.Join(parent, "mount")
		_, err := i.NodePublishVolume(w.context(), req)
		if n < 2 && err != nil || n >= 2 && status.Code(err) != codes.ResourceExhausted {
			t.Errorf("volume %d: %v", n, err)
		}
		if n >= 2 && exists(req.GetTargetPath()) {
			t.Errorf("volume %d left its folder", n)
		}
	}
	w.publish(i, w.pod(2))
	w.served(w.pod(2))
}

// A pod that the CA will not have: the kubelet's event says so, nothing stays,
// and once the CA has it the same call succeeds.
func TestRefusedPodLeavesNothing(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	w.publish(i, w.pod(2))
	_, err := i.NodePublishVolume(w.context(), w.request(p, p.token(w, "vault")))
	s := status.Convert(err)
	for _, part := range []string{"the CA refuses pod shop/cart-1", p.id(), "Unauthenticated", "(ref ", "the log of meshca"} {
		if s.Code() != codes.PermissionDenied || !strings.Contains(s.Message(), part) {
			t.Errorf("the event would be %v; want %q", err, part)
		}
	}
	if exists(w.target(p)) || len(w.stateFiles()) != 1 {
		t.Errorf("left behind: %v, %q", exists(w.target(p)), w.stateFiles())
	}
	w.served(w.pod(2))
	w.publish(i, p)
	w.served(p)
}

// A folder that was there when an agent without state comes has a container
// that runs on it: it stays, even if the CA refuses the pod now.
func TestRefusedPodKeepsAFolderThatWasThere(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	w.publish(i, p)
	i.stop()
	check(t, os.RemoveAll(w.node.State))
	folder, err := os.Stat(w.target(p))
	check(t, err)
	i = w.start()
	if _, err := i.NodePublishVolume(w.context(), w.request(p, p.token(w, "vault"))); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v", err)
	}
	w.publish(i, p)
	w.served(p)
	again, err := os.Stat(w.target(p))
	check(t, err)
	if !os.SameFile(folder, again) {
		t.Error("the folder is another one")
	}
}

// A CA that nobody reaches keeps no pod from starting: its programs wait.
func TestF34_PodStartsWhileTheCAIsAway(t *testing.T) {
	w := newWorld(t)
	kept := w.node.CA
	l, err := net.Listen("tcp", "127.0.0.1:0") // nobody else gets the port
	check(t, err)
	w.node.CA = l.Addr().String()
	check(t, l.Close())
	i := w.start()
	p := w.pod(1)
	began := time.Now()
	w.publish(i, p)
	if took := time.Since(began); took < 2*time.Second || took > 5*time.Second {
		t.Errorf("published after %v", took)
	}
	if !w.log.has("published without a certificate") || i.plugin.Ready() == nil {
		t.Errorf("ready: %v; the log:\n%s", i.plugin.Ready(), w.log.String())
	}
	began = time.Now()
	w.publish(i, p)
	if took := time.Since(began); took > time.Second {
		t.Errorf("published again after %v", took)
	}
	l, err = net.Listen("tcp", w.node.CA)
	check(t, err)
	w.serveCA(l)
	eventually(t, "served once the CA is there", func() bool { _, err := w.fetch(w.context(), p); return err == nil })
	w.served(p)
	w.node.CA = kept
}

// Every 80 s the kubelet comes with a token. What is wrong with it is no reason
// to fail: the pod runs.
func TestRepublishSwapsTheTokenAndNeverFails(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	w.publish(i, p)
	holds := func(token string) bool {
		data, err := os.ReadFile(filepath.Join(w.node.State, w.stateFiles()[0]))
		check(t, err)
		return strings.Contains(string(data), token)
	}
	fresh := p.token(w, "meshca")
	_, err := i.NodePublishVolume(w.context(), w.request(p, fresh))
	check(t, err)
	if !holds(fresh) {
		t.Error("the new token is not kept")
	}
	other := w.pod(2)
	leaked := w.request(p, fresh)
	leaked.Secrets, leaked.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"] = nil, leaked.GetSecrets()["csi.storage.k8s.io/serviceAccount.tokens"]
	none := w.request(p, fresh)
	none.Secrets = nil
	for name, req := range map[string]*spec.NodePublishVolumeRequest{
		"another pod's token":  w.request(p, other.token(w, "meshca")),
		"in the wrong place":   leaked,
		"no token":             none,
		"nothing but the path": {VolumeId: p.volume(), TargetPath: w.target(p)},
	} {
		before := strings.Count(w.log.String(), "brought no new token")
		if _, err := i.NodePublishVolume(w.context(), req); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !holds(fresh) || strings.Count(w.log.String(), "brought no new token") != before+1 {
			t.Errorf("%s: taken, or not told", name)
		}
	}
	w.served(p)
}

// An agent that has lost its state must let pods end, and must delete nothing
// that it did not make.
func TestUnpublishUnknown(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	w.unpublish(i, p) // no folder
	w.publish(i, p)
	i.stop()
	check(t, os.RemoveAll(w.node.State))
	i = w.start()
	w.unpublish(i, p)
	if exists(w.target(p)) {
		t.Error("the folder is left")
	}
}

// For subPath the kubelet makes folders where the volume is, whatever readOnly
// says: they must not keep a pod from ending, however many or deep they are.
func TestUnpublishRemovesWhatTheKubeletMade(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	w.publish(i, p)
	outside := filepath.Join(w.node.Kubelet, "outside")
	check(t, os.MkdirAll(filepath.Join(outside, "kept"), 0o755))
	check(t, os.MkdirAll(filepath.Join(w.target(p), "foo", strings.Repeat("d/", 1500)), 0o755))
	for n := range 300 {
		check(t, os.MkdirAll(filepath.Join(w.target(p), "wide", fmt.Sprint(n), "x"), 0o755))
	}
	check(t, os.WriteFile(filepath.Join(w.target(p), "foo", "file"), nil, 0o600))
	check(t, os.Symlink(outside, filepath.Join(w.target(p), "foo", "link")))
	check(t, os.Symlink("foo", filepath.Join(w.target(p), "link")))
	w.unpublish(i, p)
	if exists(w.target(p)) || !exists(filepath.Join(outside, "kept")) {
		t.Errorf("the folder is there: %v; so is what a link points to: %v", exists(w.target(p)), exists(outside))
	}
}

// What is mounted in the folder is somebody's data.
func TestUnpublishStopsAtAMount(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	w.publish(i, p)
	mounted, data := filepath.Join(w.target(p), "a", "b"), filepath.Join(w.node.Kubelet, "data")
	check(t, os.MkdirAll(filepath.Join(data, "kept"), 0o755))
	check(t, os.MkdirAll(mounted, 0o755))
	// From the same file system, as the kubelet's are: its device tells nothing.
	if err := syscall.Mount(data, mounted, "", syscall.MS_BIND, ""); errors.Is(err, syscall.EPERM) {
		t.Skip("mounting is not allowed here")
	} else {
		check(t, err)
	}
	unmount := sync.OnceValue(func() error { return syscall.Unmount(mounted, syscall.MNT_DETACH) })
	t.Cleanup(func() { _ = unmount() })
	_, err := i.NodeUnpublishVolume(w.context(), &spec.NodeUnpublishVolumeRequest{VolumeId: p.volume(), TargetPath: w.target(p)})
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), `something is mounted on "b"`) || !exists(filepath.Join(data, "kept")) {
		t.Errorf("got %v; the data is there: %v", err, exists(filepath.Join(data, "kept")))
	}
	check(t, unmount())
	w.unpublish(i, p)
	if exists(w.target(p)) || !exists(filepath.Join(data, "kept")) {
		t.Error("not removed, or the data with it")
	}
}

// The kubelet registers the plugin by its own protocol, again after a restart.
func TestRegistration(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	reg := registration.NewRegistrationClient(w.connect(filepath.Join(w.node.Kubelet, "plugins_registry", "csi.meshca.dev-reg.sock")))
	for range 2 {
		info, err := reg.GetInfo(w.context(), &registration.InfoRequest{})
		check(t, err)
		if info.GetType() != "CSIPlugin" || info.GetName() != "csi.meshca.dev" || !slices.Equal(info.GetSupportedVersions(), []string{"1.0.0"}) ||
			info.GetEndpoint() != filepath.Join(w.node.Kubelet, "plugins/csi.meshca.dev/csi.sock") {
			t.Errorf("it says %v", info)
		}
		if err := i.plugin.Ready(); err == nil || !strings.Contains(err.Error(), "kubelet") {
			t.Errorf("before it is registered: %v", err)
		}
		_, err = reg.NotifyRegistrationStatus(w.context(), &registration.RegistrationStatus{PluginRegistered: true})
		check(t, err)
		eventually(t, "ready", func() bool { return i.plugin.Ready() == nil })
		_, err = reg.NotifyRegistrationStatus(w.context(), &registration.RegistrationStatus{Error: "no, thanks"})
		check(t, err)
		if err := i.plugin.Ready(); err == nil || !strings.Contains(err.Error(), "no, thanks") {
			t.Errorf("after the kubelet's refusal: %v", err)
		}
	}
	node, err := i.NodeGetInfo(w.context(), &spec.NodeGetInfoRequest{})
	check(t, err)
	if node.GetNodeId() != "node-1" {
		t.Errorf("the node is %q", node.GetNodeId())
	}
	who, err := spec.NewIdentityClient(i.conn).GetPluginInfo(w.context(), &spec.GetPluginInfoRequest{})
	check(t, err)
	if who.GetName() != "csi.meshca.dev" || who.GetVendorVersion() == "" {
		t.Errorf("it is %v", who)
	}
}

// BenchmarkPublish is the time from the kubelet's call to its answer, with the
// first SVID there: folder, socket, key, CSR over TCP, verification.
func BenchmarkPublish(b *testing.B) {
	w := newWorld(b)
	i := w.start()
	var took []time.Duration
	n := 0
	for b.Loop() {
		b.StopTimer()
		p := w.pod(n)
		n++
		req := w.request(p, p.token(w, "meshca"))
		b.StartTimer()
		began := time.Now()
		if _, err := i.NodePublishVolume(b.Context(), req); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
		b.StopTimer()
		w.unpublish(i, p)
		b.StartTimer()
	}
	slices.Sort(took)
	for share, unit := range map[float64]string{0.5: "ms-p50", 0.99: "ms-p99"} {
		b.ReportMetric(float64(took[int(share*float64(len(took)-1))].Microseconds())/1000, unit)
	}
}
