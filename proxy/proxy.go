package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Proxy carries connections between a workload and its peers. Use [New], then
// [Proxy.Run].
type Proxy struct {
	conf    Config
	server  *tls.Config   // inbound
	clients []*tls.Config // outbound, as conf.Outbound
	buffers *buffers
	metrics *metrics

	handshakers *workers

	notReady atomic.Pointer[string] // why; nil while connections are accepted
	open     sync.WaitGroup         // connections

	dialsWaiting chan struct{} // holds one for each; see maxDialsWaiting

	mu          sync.Mutex
	live        map[*connection]struct{}
	handshakes  map[netip.Addr]int      // slots of MaxHandshakes in use
	told        map[netip.Addr]struct{} // clients that were given the hint
	limitLogged time.Time
	reclaimed   time.Time // when a shortage last had the memory collected
}

// remindEvery is how often a proxy that cannot do its work says so again.
const remindEvery = time.Minute

// maxTold bounds the clients that are remembered as told. Beyond it all are
// forgotten, and told once more.
const maxTold = 1024

// New makes a proxy that does not listen yet.
func New(c Config) (*Proxy, error) {
	if err := c.complete(); err != nil {
		return nil, err
	}
	p := &Proxy{
		conf: c, buffers: newBuffers(),
		live:       make(map[*connection]struct{}),
		handshakes: make(map[netip.Addr]int),
		told:       make(map[netip.Addr]struct{}),

		dialsWaiting: make(chan struct{}, maxDialsWaiting),
	}
	p.setNotReady("not started")
	var err error
	if p.server, err = serverTLS(c.Identity, c); err != nil {
		return nil, err
	}
	for _, out := range c.Outbound {
		conf, err := clientTLS(c.Identity, out.Peer, c)
		if err != nil {
			return nil, err
		}
		p.clients = append(p.clients, conf)
	}
	p.metrics, err = newMetrics(p)
	return p, err
}

// Ready returns nil while the proxy accepts connections and has a certificate
// that peers will take, and otherwise what is missing.
func (p *Proxy) Ready() error {
	if why := p.notReady.Load(); why != nil {
		return errors.New(*why)
	}
	return p.checkSVID()
}

func (p *Proxy) setNotReady(why string) { p.notReady.Store(&why) }

// Run waits until there are a certificate, a bundle and a decision for each
// inbound port, then listens until ctx ends. It accepts nothing more from then
// on, and returns when the last connection has ended, or been cut after
// DrainTime. An error means that it could not listen.
func (p *Proxy) Run(ctx context.Context) error {
	if !p.awaitSources(ctx) {
		return nil
	}
	// Connections are judged for as long as there are any.
	judging, stopJudging := context.WithCancel(context.WithoutCancel(ctx))
	var judge sync.WaitGroup
	judge.Go(func() { p.judge(judging) })
	judge.Go(func() { p.watchCertificate(judging) })
	defer judge.Wait()
	defer stopJudging()

	p.handshakers = newWorkers()
	defer p.handshakers.end()
	err := p.listen(ctx)
	p.drain()
	return err
}

// listen opens all listeners and accepts until ctx ends.
func (p *Proxy) listen(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	var doors []door
	closeAll := func() {
		for _, d := range doors {
			_ = d.Close()
		}
	}
	defer closeAll()
	open := func(address string, d door) error {
		l, err := p.conf.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("listening on %q (%s): %w; choose another address", address, d.way, err)
		}
		d.Listener, d.address = l, address
		doors = append(doors, d)
		return nil
	}
	for _, in := range p.conf.Inbound {
		if err := open(in.Listen, door{way: inbound, far: in.App, port: in.AppPort()}); err != nil {
			return err
		}
	}
	for i, out := range p.conf.Outbound {
		if err := open(out.Listen, door{way: outbound, far: out.Target, client: p.clients[i]}); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { closeAll() })
	defer stop()
	for _, d := range doors {
		p.conf.Log.Info("listening", "direction", string(d.way), "address", d.Addr().String(), "to", d.far)
		g.Go(func() error { return p.accept(ctx, d) })
	}
	p.notReady.Store(nil)
	return g.Wait()
}

// awaitSources blocks until everything is there that listening needs; false
// means that ctx ended before.
func (p *Proxy) awaitSources(ctx context.Context) bool {
	said := ""
	remind := time.NewTicker(remindEvery)
	defer remind.Stop()
	for {
		identityChanged := p.conf.Identity.Changed()
		var policyChanged <-chan struct{}
		if p.conf.Policy != nil {
			policyChanged = p.conf.Policy.Changed()
		}
		err := p.checkSources()
		if err == nil {
			return true
		}
		p.setNotReady(err.Error())
		if why := err.Error(); why != said {
			said = why
			p.conf.Log.Info("not listening yet", "reason", why)
		}
		select {
		case <-ctx.Done():
			return false
		case <-identityChanged:
		case <-policyChanged:
		case <-remind.C:
			p.conf.Log.Warn("still not listening", "reason", err.Error())
		}
	}
}

func (p *Proxy) checkSources() error {
	if err := p.checkSVID(); err != nil {
		return err
	}
	for _, in := range p.conf.Inbound {
		if _, err := p.conf.Policy.Decide(in.AppPort()); err != nil {
			return fmt.Errorf("no policy for port %d: %w", in.AppPort(), err)
		}
	}
	return nil
}

// checkSVID holds that there is an SVID that has not ended, and a bundle of its
// trust domain that is not empty.
func (p *Proxy) checkSVID() error {
	svid, err := p.conf.Identity.SVID()
	switch {
	case err != nil:
		return fmt.Errorf("no certificate: %w", err)
	case svid == nil:
		return errors.New("no certificate")
	case !p.conf.Now().Before(svid.NotAfter()):
		return fmt.Errorf("the certificate ended at %s", svid.NotAfter().UTC().Format(time.RFC3339))
	}
	td := svid.ID().TrustDomain()
	bundle, err := p.conf.Identity.Bundle(td)
	switch {
	case err != nil:
		return err
	case bundle == nil || len(bundle.Authorities()) == 0:
		return fmt.Errorf("the trust bundle of %q holds no authority: nobody could be believed", td)
	}
	return nil
}

// judge looks at all live connections again whenever a policy changes.
func (p *Proxy) judge(ctx context.Context) {
	if p.conf.Policy == nil {
		return
	}
	for {
		changed := p.conf.Policy.Changed() // before judging, or a change could fall between
		p.eachLive((*connection).rejudge)
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// watchCertificate says when the certificate has ended without a newer one: from
// then on peers refuse it, and only their logs would tell.
func (p *Proxy) watchCertificate(ctx context.Context) {
	for {
		changed := p.conf.Identity.Changed()
		wait := remindEvery
		if svid, err := p.conf.Identity.SVID(); err == nil && svid != nil {
			left := svid.NotAfter().Sub(p.conf.Now().Round(0))
			if left <= 0 {
				p.conf.Log.Error("the certificate has ended and the agent has no newer one; peers refuse it: see the agent's log and /readyz",
					"spiffe_id", svid.ID().String(), "serial", svid.Serial(), "not_after", svid.NotAfter().UTC().Format(time.RFC3339))
			} else {
				wait = min(wait, left)
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// eachLive calls f for the connections that are open, outside the lock.
func (p *Proxy) eachLive(f func(*connection)) {
	p.mu.Lock()
	all := make([]*connection, 0, len(p.live))
	for c := range p.live {
		all = append(all, c)
	}
	p.mu.Unlock()
	for _, c := range all {
		f(c)
	}
}

// drain waits for the connections that are open, and cuts those that outlast
// DrainTime.
func (p *Proxy) drain() {
	p.setNotReady("draining: no new connections are accepted")
	done := make(chan struct{})
	go func() { p.open.Wait(); close(done) }()
	timer := time.NewTimer(p.conf.DrainTime)
	defer timer.Stop()
	select {
	case <-done:
		return
	case <-timer.C:
	}
	p.eachLive(func(c *connection) { c.cut(endDrain, nil) })
	<-done
}

// hinted notes that source is told the hint; false if it was before.
func (p *Proxy) hinted(source netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.told[source]; ok {
		return false
	}
	if len(p.told) == maxTold {
		clear(p.told)
	}
	p.told[source] = struct{}{}
	return true
}

// door is an open listener.
type door struct {
	net.Listener
	way     direction
	address string      // as configured
	far     string      // where its connections go
	port    uint16      // the app's; inbound only
	client  *tls.Config // outbound only
}
