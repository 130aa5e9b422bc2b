package storms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/test/bench/measure"
	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/bench/table"
)

// FleetTitle and FleetMethod head the section of RunFleet.
const (
	FleetTitle  = "Agents that lose the CA"
	FleetMethod = `10,000 of our agents' hosts, the code that the agent runs, in this process, each with an address, a connection and a
stream of its own to one ` + "`meshca serve`" + ` over a real API server. The CA is killed and started again, and the time counts from its death
until, by its own count, it serves a stream to every agent. All share two cores, and the agents take most of them: each makes a TLS handshake with
X25519MLKEM768 and a gRPC connection anew.`
)

// agentCount is how many agents lose their stream.
const agentCount = 10_000

// fleet is agents in this process, each with a pod on a node of its own.
type fleet struct {
	hosts []*agent.Host
	conns []*caclient.Client
}

// RunFleet measures how long a fleet takes to be back after the CA has died.
func RunFleet(ctx context.Context, r *rig.Run, p *table.Part) (err error) {
	m, err := r.StartMesh(ctx, rig.Profiled()...)
	if err != nil {
		return err
	}
	w := &world{mesh: m}
	defer func() {
		if died := m.CA.Exited(); died != nil {
			err = errors.Join(err, died)
		}
		if stop := m.Stop(); err == nil {
			err = stop
		}
	}()
	n := r.Count(agentCount)
	of := count(n) + " agents"
	pods, err := w.mesh.Pods(ctx, "agent", n, 1, true)
	if err != nil {
		return err
	}
	if err := w.restart(ctx); err != nil {
		return err
	}
	idle, err := measure.MemoryOf(w.mesh.CA.PID())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	f := &fleet{}
	defer func() {
		cancel()
		wg.Wait()
		for _, c := range f.conns {
			c.Close()
		}
	}()
	r.Say("starting %d agents", n)
	for i, pod := range pods {
		h, err := f.add(w, i, pod)
		if err != nil {
			return err
		}
		wg.Go(func() { _ = h.Run(ctx) }) // nil always
	}
	if err := f.wait(ctx, w, 2*time.Minute); err != nil {
		return err
	}
	full, err := measure.MemoryOf(w.mesh.CA.PID())
	if err != nil {
		return err
	}
	p.Add("the CA's resident memory before any stream, with as many pods in its informer", of, "MiB", float64(idle.Resident())/(1<<20))
	p.Add("agents: memory of a stream at the CA", of, "KiB", float64(full.Resident()-idle.Resident())/1024/float64(n))
	for round := range r.Rounds {
		r.Say("dropping %d agents, round %d of %d", n, round+1, r.Rounds)
		began := time.Now()
		if err := w.mesh.CA.Kill(); err != nil {
			return err
		}
		if err := w.mesh.StartCA(ctx); err != nil {
			return err
		}
		ready := time.Since(began)
		if err := f.wait(ctx, w, 2*time.Minute); err != nil {
			return err
		}
		used, err := measure.CPU(w.mesh.CA.PID())
		if err != nil {
			return err
		}
		p.Add("agents dropped at once: CPU of the CA since its start, an agent", of, "ms", used.Seconds()*1000/float64(n))
		p.Add("agents dropped at once: until the CA is ready again", of, "s", ready.Seconds())
		p.Add("agents dropped at once: until all are back", of, "s", time.Since(began).Seconds())
		r.Say("ready after %v, all back after %v", ready.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	}
	p.Find("agents dropped at once: until all are back", of).Goal = table.AtMost(15)
	if err := r.Heap(ctx, p, w.mesh.Ops, "fleet", "CA with all agents' streams"); err != nil {
		return err
	}
	if err := w.mesh.CA.Kill(); err != nil {
		return err
	}
	if err := w.mesh.StartCA(ctx); err != nil {
		return err
	}
	return r.Profile(ctx, p, w.mesh.Ops, "fleet", "CA while agents come back", r.For(10*time.Second), func(ctx context.Context) error {
		return f.wait(ctx, w, 2*time.Minute)
	})
}

func (f *fleet) add(w *world, i int, pod rig.Pod) (*agent.Host, error) {
	td, err := identity.ParseTrustDomain("cluster.local")
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(w.mesh.Address)
	if err != nil {
		return nil, err
	}
	client, err := caclient.New(caclient.Config{
		Addresses: []string{w.mesh.Address}, TrustDomain: td, AnchorFile: w.mesh.Anchor, Now: time.Now, Shared: true,
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{LocalAddr: address(i)}).DialContext(ctx, "tcp", "127.0.0.1:"+port)
		},
	})
	if err != nil {
		return nil, err
	}
	f.conns = append(f.conns, client)
	h, err := agent.NewHost(agent.HostConfig{
		CA: client, Token: func() (string, error) { return pod.Token, nil }, Now: time.Now,
		Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		return nil, err
	}
	f.hosts = append(f.hosts, h)
	return h, nil
}

// wait waits until the CA serves a stream to every agent, by its own count.
func (f *fleet) wait(ctx context.Context, w *world, within time.Duration) error {
	return rig.Poll(ctx, "the agents' streams", within, func() error {
		streams, err := w.mesh.Metric(ctx, "meshca_ca_streams")
		if err != nil {
			return err
		}
		if int(streams) < len(f.hosts) {
			return fmt.Errorf("%.0f of %d are open", streams, len(f.hosts))
		}
		return nil
	})
}
