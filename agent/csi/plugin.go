package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/sds"
)

// DriverName is the name that pods ask for, and that the CSIDriver object has.
const DriverName = "csi.meshca.dev"

// audience is that of the tokens that the CSIDriver object asks the kubelet for.
const audience = "meshca"

// firstSVIDWait is how long the first publish of a volume waits for a
// certificate, so that it is there before the pod's programs are, and so that a
// refusal becomes an event of the pod.
const firstSVIDWait = 3 * time.Second

const (
	// restoreAtOnce is how many volumes are taken up again at the same time.
	restoreAtOnce = 8
	// restorePatience is how long the kubelet, and the volumes that have their
	// sockets already, wait for the next socket.
	restorePatience = 500 * time.Millisecond
)

// Config is what a [Plugin] is made from.
type Config struct {
	// Host keeps the identities; required. Whoever made it runs it.
	Host *agent.Host
	// KubeletDir is the kubelet's folder, /var/lib/kubelet as a rule; required.
	// It must have the same path for us and for the kubelet.
	KubeletDir string
	// Socket is where the kubelet's calls are taken; empty means
	// plugins/csi.meshca.dev/csi.sock in KubeletDir.
	Socket string
	// StateDir is where volumes and their tokens outlive the process; required.
	// It must be ours alone, and in memory unless StateOnDisk is true, which is
	// for tests.
	StateDir    string
	StateOnDisk bool
	// Version is what the kubelet is told of ours; required by the protocol.
	Version string
	// Now is the wall clock; required.
	Now func() time.Time
	// Log gets a line for each volume that comes, goes or is refused; required.
	Log *slog.Logger
	// Metrics is where metrics are registered; required.
	Metrics prometheus.Registerer
}

// Plugin serves the volumes of one node. Use [New], then Run.
type Plugin struct {
	conf     Config
	td       identity.TrustDomain
	pods     pods
	metrics  *metrics
	registry registry
	locks    locks
	budget   *sds.Budget

	store *store // from the beginning of Run

	mu      sync.Mutex
	volumes map[string]*volume // by volume ID
}

// New checks the configuration. It touches nothing outside.
func New(conf Config) (*Plugin, error) {
	switch {
	case conf.Host == nil || conf.Now == nil || conf.Log == nil || conf.Metrics == nil:
		return nil, errors.New("CSI plugin: Host, Now, Log and Metrics must all be given")
	case !filepath.IsAbs(conf.KubeletDir) || filepath.Clean(conf.KubeletDir) != conf.KubeletDir:
		return nil, fmt.Errorf("CSI plugin: the kubelet's folder %q is no absolute path without detours", conf.KubeletDir)
	case conf.StateDir == "":
		return nil, errors.New("CSI plugin: no folder for the state is given")
	case conf.Version == "":
		return nil, errors.New("CSI plugin: no version is given")
	}
	if conf.Socket == "" {
		conf.Socket = filepath.Join(conf.KubeletDir, "plugins", DriverName, "csi.sock")
	}
	p := &Plugin{
		conf: conf, td: conf.Host.TrustDomain(),
		pods:    pods{filepath.Join(conf.KubeletDir, "pods")},
		volumes: make(map[string]*volume),
		budget:  sds.NewBudget(sharedConnections, sharedCalls),
	}
	p.registry = registry{endpoint: conf.Socket, log: conf.Log}
	var err error
	p.metrics, err = newMetrics(conf.Metrics, p)
	return p, err
}

// Run takes up the volumes that are known, then serves the kubelet until ctx
// ends; then it returns nil, and before that a [*StateError] where the state
// cannot be used. Sockets of volumes stay in place: whoever succeeds
// us replaces them, as after a crash.
func (p *Plugin) Run(ctx context.Context) (err error) {
	p.store, err = openStore(ctx, p.conf.StateDir, p.conf.StateOnDisk, p.conf.Log)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return &StateError{Dir: p.conf.StateDir, Err: err}
	}
	// Last of all: who gets the lock may take the sockets.
	defer func() { err = errors.Join(err, p.store.close()) }()
	defer p.stopAll()
	entries, err := p.store.load()
	if err != nil {
		return &StateError{Dir: p.conf.StateDir, Err: err}
	}
	restored := p.restore(ctx, entries)
	defer restored.Wait() // before the volumes are stopped
	calls, err := listen(p.conf.Socket)
	if err != nil {
		return err
	}
	registration, err := listen(p.registrationSocket())
	if err != nil {
		return errors.Join(err, calls.Close())
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.serve(ctx, calls, p.register) })
	g.Go(func() error { return p.serve(ctx, registration, p.registry.register) })
	return g.Wait()
}

func (p *Plugin) registrationSocket() string {
	return filepath.Join(p.conf.KubeletDir, "plugins_registry", DriverName+"-reg.sock")
}

// listen makes a socket for the kubelet alone. The folder of the plugin is made
// if it is missing; those around it are the kubelet's.
func listen(path string) (net.Listener, error) {
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("making the folder of the socket for the kubelet: %w; is --kubelet-dir the kubelet's folder, and mounted at the same path?", err)
	}
	return sds.Listen(path, 0o600)
}

// Ready returns nil once the kubelet has registered the plugin and a CA has
// answered; otherwise it says what is missing.
func (p *Plugin) Ready() error {
	return errors.Join(p.registry.ready(), p.conf.Host.Ready())
}

// restore serves the volumes that an earlier process left, with new keys and
// the last tokens, before the kubelet says a word: it returns when their sockets
// are there, or when none has come for restorePatience. Calls about those that are
// late wait, and the group does, until they are there.
func (p *Plugin) restore(ctx context.Context, entries []entry) *sync.WaitGroup {
	began := time.Now()
	restored := new(sync.WaitGroup)
	places := make(chan struct{}, restoreAtOnce)
	ready := make(chan bool, len(entries)) // for each, whether its socket is there
	start := make(chan struct{})           // closed when volumes may run
	waiting, bound := 0, 0
	for _, e := range entries {
		release, err := p.locks.acquire(ctx, e.Volume)
		if err != nil {
			break // we are asked to end
		}
		waiting++
		restored.Go(func() {
			defer release()
			places <- struct{}{}
			v := p.restoreOne(e)
			<-places
			ready <- v != nil
			if v != nil {
				<-start
				v.run()
			}
		})
	}
	timer := time.NewTimer(restorePatience)
	defer timer.Stop()
	for late := false; waiting > 0 && !late; waiting-- {
		select {
		case there := <-ready:
			if there {
				bound++
			}
			timer.Reset(restorePatience)
		case <-timer.C:
			late = true
		}
	}
	// First all sockets, then what keeps the machine busy: keys and handshakes.
	close(start)
	if len(entries) > 0 {
		p.conf.Log.Info("sockets of volumes are there again", "volumes", bound, "of", len(entries),
			"took", time.Since(began).Round(time.Millisecond).String())
	}
	return restored
}

// restoreOne binds the socket of one volume; nil if it cannot.
func (p *Plugin) restoreOne(e entry) *volume {
	c, err := e.claim(p.td, p.pods)
	if err != nil {
		p.store.setAside(entryName(e.Volume), err)
		return nil
	}
	log := p.logOf(c)
	there, err := p.pods.exists(c.target)
	if err == nil && !there {
		log.Info("the folder of a volume is gone, and the volume is forgotten")
		err = p.store.remove(c.id)
	}
	if err == nil && there {
		v := p.newVolume(c, e.Token)
		v.published, v.made = e.Published, e.Made
		if err = p.bind(v); err == nil {
			return v
		}
	}
	if err != nil {
		log.Error("a volume cannot be taken up again; the kubelet brings it back within two minutes", "reason", err.Error())
	}
	return nil
}

// logOf is a logger that names the pod.
func (p *Plugin) logOf(c *claim) *slog.Logger {
	return p.conf.Log.With("pod", c.who(), "pod_uid", c.target.pod, "volume", c.target.volume)
}

func (p *Plugin) volume(id string) *volume {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.volumes[id]
}

func (p *Plugin) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.volumes)
}

// stopAll ends all volumes at once, and waits.
func (p *Plugin) stopAll() {
	p.mu.Lock()
	volumes := p.volumes
	p.volumes = make(map[string]*volume)
	p.mu.Unlock()
	for _, v := range volumes {
		v.cancel()
	}
	for _, v := range volumes {
		<-v.ended
	}
}
