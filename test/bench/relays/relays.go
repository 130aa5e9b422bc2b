// Package relays measures our proxy as the inbound side of a mesh, beside Envoy,
// HAProxy, nginx, and the least that one needs to write in Go.
package relays

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/meshca/meshca/test/bench/measure"
	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/bench/table"
)

// Title and Method head the part's section.
const (
	Title  = "Proxy"
	Method = `Each relay ends mutual TLS and carries what is inside to a plaintext backend that sends it back; all on loopback, client and
backend in the bench's own process, two threads or workers a relay. TLS is 1.3 with X25519, P-256 certificates of one CA (a leaf
and an intermediate from both sides) and AES-128-GCM; nobody gives tickets or resumes sessions; nobody writes an access log; whatever else is
at its default. That all do the same is checked before the first round. Our proxy gets its certificate from an agent and
checks SPIFFE IDs; it remembers the paths of clients that it believed, and the client here shows the same certificates each time, so of three signatures
it checks one. The others have the same certificate in files and check chains. The bare relay is ` + "`test/bench/relays/bare`" + `:
crypto/tls and io.Copy, nothing else. Processor time is that of all of a relay's processes.
A new connection is connecting, the handshake, 64 bytes there and back, and the close, by eight clients at once. Requests are 64
bytes there and back on 16 kept connections, each the next when the last was answered. Bulk is 64 KiB writes on four
connections with all of it read back meanwhile; a GB is 10⁹ bytes that went there and back; throughput is that of all together on this machine,
client and backend included. Latency is of 2,000 requests a second on 16 kept connections, started by the clock at instants that
are drawn and counted from when one should have started. Memory is anonymous memory (heaps, stacks, buffers; not program text,
not the kernel's sockets) of a fresh process, which has had 100 connections, before and after so many more have each
answered one request and gone idle, once it has settled.`
)

// Groups of figures, in the order of the page; those of idle connections are
// idleGroup's.
const (
	connectionGroup = "CPU of a new connection"
	connectionRatio = "CPU of a new connection, as a multiple of Envoy's"
	requestGroup    = "CPU of a request of 64 bytes"
	bulkGroup       = "CPU of a GB there and back"
	throughputGroup = "throughput, load beside it"
	p50Group        = "latency at 2,000 requests a second, p50"
	p99Group        = "latency at 2,000 requests a second, p99"
)

func idleGroup(n int) string {
	if n < 1000 {
		return fmt.Sprintf("memory of an idle connection, of %d", n)
	}
	return fmt.Sprintf("memory of an idle connection, of %d,%03d", n/1000, n%1000)
}

func idleRatio(n int) string { return idleGroup(n) + ", as a multiple of Envoy's" }

// Run measures into p.
func Run(ctx context.Context, r *rig.Run, p *table.Part) (err error) {
	counts, err := idleCounts(r, p)
	if err != nil {
		return err
	}
	m, err := startMesh(ctx, r)
	if err != nil {
		return err
	}
	b := &bench{run: r, part: p}
	defer func() {
		err = errors.Join(err, b.stop(), m.stop())
	}()
	kinds, err := peers(ctx, r, m, p, counts[len(counts)-1]+50)
	if err != nil {
		return err
	}
	if b.direct, err = newBackend(); err != nil {
		return err
	}
	for _, kind := range kinds {
		r.Say("starting %s", kind.name)
		s, err := start(ctx, r, kind, kind.file, m.client)
		if err != nil {
			return err
		}
		b.relays = append(b.relays, s)
		if err := s.check(ctx); err != nil {
			return err
		}
	}
	for round := range r.Rounds {
		if err := b.round(ctx, round); err != nil {
			return err
		}
		for _, kind := range turned(kinds, round) {
			if err := idle(ctx, r, p, m, kind, counts); err != nil {
				return err
			}
		}
	}
	goals(p, counts)
	for _, kind := range kinds {
		if kind.name == ours || kind.name == bare {
			if err := profiled(ctx, r, p, m, kind, counts[0]); err != nil {
				return err
			}
		}
	}
	return nil
}

// profiled takes profiles of a relay that serves them: while connections come, and of
// as many idle ones.
func profiled(ctx context.Context, r *rig.Run, p *table.Part, m *mesh, kind *relay, connections int) (err error) {
	ops, err := freeAddress(kind.host)
	if err != nil {
		return err
	}
	s, err := startWith(ctx, r, &running{relay: kind, ops: ops}, kind.file+"-profiled", m.client)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := r.Profile(ctx, p, ops, kind.file, kind.name+" with new connections", r.For(5*time.Second), func(ctx context.Context) error {
		return s.target.connections(ctx, r.Count(10_000))
	}); err != nil {
		return err
	}
	conns, err := s.target.open(ctx, connections)
	defer closeAll(conns)
	if err != nil {
		return err
	}
	return r.Heap(ctx, p, ops, kind.file, fmt.Sprintf("%s with %d idle connections", kind.name, connections))
}

// idleCounts are the numbers of idle connections to measure.
func idleCounts(r *rig.Run, p *table.Part) ([]int, error) {
	limit, err := descriptors(1 << 16)
	if err != nil {
		return nil, err
	}
	if r.Quick {
		return []int{200}, nil
	}
	most := 10_000
	if can := (limit - 200) / 200 * 100; can < most {
		p.Method += fmt.Sprintf("\nOf 10,000 idle connections there are %d: this machine allows a process no more than %d descriptors, two a connection.", can, limit)
		most = can
	}
	return []int{1000, most}, nil
}

// bench is the relays that all rounds measure.
type bench struct {
	run    *rig.Run
	part   *table.Part
	relays []*running
	direct *backend
}

func (b *bench) stop() error {
	var errs []error
	for _, s := range b.relays {
		errs = append(errs, s.stop())
	}
	if b.direct != nil {
		b.direct.close()
	}
	return errors.Join(errs...)
}

// turned is who is measured in which order: everybody is first some time.
func turned[T any](all []T, round int) []T {
	first := round % len(all)
	return slices.Concat(all[first:], all[:first])
}

func (b *bench) round(ctx context.Context, round int) error {
	b.run.Say("round %d of %d", round+1, b.run.Rounds)
	for _, m := range []func(context.Context, *running) error{b.connections, b.requests, b.bulk, b.latency} {
		for _, s := range turned(b.relays, round) {
			if err := m(ctx, s); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	return b.latencyAt(ctx, direct, target{address: b.direct.address()}, b.direct)
}

func (b *bench) connections(ctx context.Context, s *running) error {
	n := b.run.Count(2000)
	used, err := s.cpu(ctx, 0, func() error { return s.target.connections(ctx, n) })
	if err != nil {
		return err
	}
	b.part.Add(connectionGroup, s.name, "ms", measure.Milliseconds(used)/float64(n))
	return nil
}

func (b *bench) requests(ctx context.Context, s *running) error {
	return kept(ctx, s.target, s.backend, 16, func(conns []net.Conn) error {
		var count int64
		used, err := s.cpu(ctx, len(conns), func() (err error) {
			count, err = pingPong(ctx, conns, b.run.For(3*time.Second))
			return err
		})
		if err != nil {
			return err
		}
		b.part.Add(requestGroup, s.name, "µs", float64(used)/float64(time.Microsecond)/float64(count))
		return nil
	})
}

func (b *bench) bulk(ctx context.Context, s *running) error {
	return kept(ctx, s.target, s.backend, 4, func(conns []net.Conn) error {
		var bytes int64
		began := time.Now()
		used, err := s.cpu(ctx, len(conns), func() (err error) {
			bytes, err = bulk(ctx, conns, b.run.For(3*time.Second))
			return err
		})
		if err != nil {
			return err
		}
		b.part.Add(bulkGroup, s.name, "s", used.Seconds()/(float64(bytes)/1e9))
		b.part.Add(throughputGroup, s.name, "MB/s", float64(bytes)/1e6/time.Since(began).Seconds())
		return nil
	})
}

func (b *bench) latency(ctx context.Context, s *running) error {
	return b.latencyAt(ctx, s.name, s.target, s.backend)
}

func (b *bench) latencyAt(ctx context.Context, name string, t target, behind *backend) error {
	return kept(ctx, t, behind, 16, func(conns []net.Conn) error {
		took, err := openLoop(ctx, conns, 2000, b.run.For(4*time.Second))
		if err != nil {
			return err
		}
		b.part.Add(p50Group, name, "ms", measure.Milliseconds(took.Quantile(0.5)))
		b.part.Add(p99Group, name, "ms", measure.Milliseconds(took.Quantile(0.99)))
		return nil
	})
}

// kept calls f with n open connections, and returns when they are gone.
func kept(ctx context.Context, t target, behind *backend, n int, f func([]net.Conn) error) error {
	conns, err := t.open(ctx, n)
	if err == nil {
		err = f(conns)
	}
	closeAll(conns)
	return errors.Join(err, behind.awaitOpen(ctx, 0))
}

// goals sets them on our figures, once those that they come from are known, and
// puts the figures in order.
func goals(p *table.Part, counts []int) {
	of := func(group, name string) float64 { return p.Find(group, name).Median() }
	set := func(group string, goal *table.Goal, from string) {
		goal.From = from
		p.Find(group, ours).Goal = goal
	}
	set(connectionGroup, table.AtMost(of(connectionGroup, bare)), "the bare relay's")
	p.Add(connectionRatio, ours, "×", of(connectionGroup, ours)/of(connectionGroup, envoy)).Goal = table.AtMost(1.6)
	best := bestOfOthers(p, requestGroup)
	set(requestGroup, table.AtMost(best.Median()), "the best of the others, "+best.Of)
	set(bulkGroup, table.AtMost(of(bulkGroup, bare)/0.9), "0.9 of the bare relay's bytes a second of CPU")
	set(throughputGroup, table.AtLeast(0.9*of(throughputGroup, bare)), "0.9 of the bare relay's")
	set(p50Group, table.AtMost(of(p50Group, envoy)), "Envoy's")
	set(p99Group, table.AtMost(of(p99Group, envoy)), "Envoy's")
	order := []string{connectionGroup, connectionRatio, requestGroup, bulkGroup, throughputGroup, p50Group, p99Group}
	for _, n := range counts {
		set(idleGroup(n), table.AtMost(20), "")
		p.Add(idleRatio(n), ours, "×", of(idleGroup(n), ours)/of(idleGroup(n), envoy)).Goal = table.AtMost(1)
		order = append(order, idleGroup(n), idleRatio(n))
	}
	slices.SortStableFunc(p.Figures, func(a, b *table.Figure) int {
		return slices.Index(order, a.Group) - slices.Index(order, b.Group)
	})
}

func bestOfOthers(p *table.Part, group string) *table.Figure {
	var best *table.Figure
	for _, f := range p.Figures {
		if f.Group == group && f.Of != ours && (best == nil || f.Median() < best.Median()) {
			best = f
		}
	}
	return best
}
