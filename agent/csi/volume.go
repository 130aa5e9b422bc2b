package csi

import (
	"context"
	"log/slog"
	"net"
	"sync"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/sds"
)

// What one pod can have of the agent, which serves all pods of the node.
const (
	// maxVolumesPerPod: each volume is a certificate, and a server on a socket. One
	// is enough for all containers of a pod; two let two of them be apart.
	maxVolumesPerPod = 2
	maxConnections   = 32 // of a volume's socket
	maxCalls         = 64
	// What all sockets share beyond the few places that each has for itself.
	sharedConnections = 256
	sharedCalls       = 512
)

// volume is one that is served.
type volume struct {
	claim    *claim
	log      *slog.Logger // names the pod
	agent    *agent.Agent
	server   *sds.Server
	listener net.Listener
	cancel   context.CancelFunc
	ended    chan struct{} // closed when nothing of it runs any more

	// Guarded by the lock of its ID.
	published bool // the kubelet has been told that it is there
	made      bool // by us: the folder was not there

	mu    sync.Mutex
	token string
}

// currentToken is a [caclient.TokenSource].
func (v *volume) currentToken() (string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.token, nil
}

// setToken replaces the token and reports whether it is another one.
func (v *volume) setToken(token string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	changed := v.token != token
	v.token = token
	return changed
}

func (v *volume) running() bool {
	select {
	case <-v.ended:
		return false
	default:
		return true
	}
}

// newVolume makes a volume of which nothing is there yet.
func (p *Plugin) newVolume(c *claim, token string) *volume {
	return &volume{claim: c, token: token, log: p.logOf(c), ended: make(chan struct{})}
}

// bind makes the socket in a volume's folder, which must be there. From then on
// programs can connect; they are answered once the volume runs. The lock of the
// volume's ID is held.
func (p *Plugin) bind(v *volume) (err error) {
	c, feed := v.claim, sds.NewFeed()
	v.agent, err = p.conf.Host.Agent(agent.Workload{Name: c.target.pod, ID: c.spiffeID, Token: v.currentToken, Feed: feed, Log: v.log})
	if err != nil {
		return err
	}
	v.server, err = sds.NewServer(sds.Config{Feed: feed, Log: v.log, Metrics: p.conf.Metrics, Now: p.conf.Now,
		MaxConnections: maxConnections, MaxStreams: maxCalls, Budget: p.budget})
	if err != nil {
		return err
	}
	// The folder stays the same and only the socket in it is new: containers have
	// the folder mounted. They could lock it; the state's lock, which they cannot
	// reach, keeps other agents away.
	v.listener, err = sds.Listen(c.target.socket(), socketMode, sds.LeaveInPlace(), sds.Alone())
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.volumes[c.id] = v
	return nil
}

// run has the identity kept and served until the volume is stopped.
func (v *volume) run() {
	ctx, cancel := context.WithCancel(context.Background())
	v.cancel = cancel
	g, running := errgroup.WithContext(ctx)
	g.Go(func() error { return v.agent.Run(running) })
	g.Go(func() error { return v.server.Serve(running, v.listener) })
	go func() {
		defer close(v.ended)
		if err := g.Wait(); err != nil {
			v.log.Error("a volume is not served any more; the kubelet brings it back within two minutes", "reason", err.Error())
		}
	}()
}

// admit refuses a pod that has its share.
func (p *Plugin) admit(c *claim) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, v := range p.volumes {
		if v.claim.target.pod == c.target.pod && v.claim.id != c.id {
			n++
		}
	}
	if n >= maxVolumesPerPod {
		return status.Errorf(codes.ResourceExhausted, "the pod has %d volumes of %s already, which is the most; one is enough for all of its containers", n, DriverName)
	}
	return nil
}

// stop ends a volume and waits for it.
func (p *Plugin) stop(v *volume) {
	v.cancel()
	<-v.ended
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.volumes[v.claim.id] == v {
		delete(p.volumes, v.claim.id)
	}
}

// save keeps a volume for the next process. Where that fails it is served all
// the same: the kubelet would bring it back after a restart, only later.
func (p *Plugin) save(v *volume) {
	token, _ := v.currentToken()
	c := v.claim
	err := p.store.save(entry{
		Volume: c.id, Target: c.target.path, Namespace: c.namespace, Pod: c.pod, PodUID: c.target.pod,
		ServiceAccount: c.serviceAccount, Token: token, Published: v.published, Made: v.made,
	})
	if err != nil {
		p.metrics.unsaved.Inc()
		v.log.Error("a volume cannot be written down; if this agent ends now, the pod waits for the kubelet to bring it back", "folder", p.conf.StateDir, "reason", err.Error())
	}
}

// locks has calls about one volume wait for each other.
type locks struct {
	mu   sync.Mutex
	held map[string]*lock
}

type lock struct {
	place chan struct{}
	users int
}

// acquire waits for the lock of an ID.
func (l *locks) acquire(ctx context.Context, id string) (release func(), err error) {
	l.mu.Lock()
	if l.held == nil {
		l.held = make(map[string]*lock)
	}
	k := l.held[id]
	if k == nil {
		k = &lock{place: make(chan struct{}, 1)}
		l.held[id] = k
	}
	k.users++
	l.mu.Unlock()
	forget := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(l.held, id)
		}
	}
	select {
	case k.place <- struct{}{}:
		return func() { <-k.place; forget() }, nil
	case <-ctx.Done():
		forget()
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}
