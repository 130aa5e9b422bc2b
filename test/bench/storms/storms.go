// Package storms measures a CA that everybody asks at once: pods of many nodes that
// start together, renewals at a steady rate on one core, and agents that all lose
// their stream.
package storms

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/test/bench/measure"
	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/bench/table"
)

// Title and Method head the part's section.
const (
	Title  = "Storms"
	Method = `One ` + "`meshca serve`" + ` over a real API server; simulated nodes are clients in this process, each with an address and a
connection of its own, on the same two cores. **Cold start**: the CA has just started; 10,000 pods on 200 nodes ask at once, each with its own
ServiceAccount token and CSR, over connections that are made then. A pod that is told that the CA is busy comes back when it was told
to, as our agent does, and its latency counts from its first try. **Half renewals**: the same, where half of the nodes' pods have certificates
already.`
)

// RenewalsTitle and RenewalsMethod head the section of RunRenewals.
const (
	RenewalsTitle  = "Renewals at a steady rate"
	RenewalsMethod = `1,000 a second at instants that are drawn, as 10,000 pods on 200 nodes that know nothing of each other, each with a new key; the CA
is held to one core, the load has the other.`
)

// Nodes and pods on each, of a cold start.
const (
	nodes   = 200
	perNode = 50
)

// Run measures into p.
func Run(ctx context.Context, r *rig.Run, p *table.Part) error {
	return inWorld(ctx, r, func(w *world) error { return w.storms(ctx, r, p) })
}

// RunRenewals measures into p.
func RunRenewals(ctx context.Context, r *rig.Run, p *table.Part) error {
	return inWorld(ctx, r, func(w *world) error {
		if err := w.steady(ctx, r, p, r.For(r.Renewals)); err != nil {
			return err
		}
		p.Find(p99Group, oneCore).Goal = table.AtMost(50)
		p.Find(refusedGroup, oneCore).Goal = table.AtMost(0)
		p.Find(growthGroup, oneCore).Goal = table.AtMost(5)
		return nil
	})
}

// inWorld runs f with a CA and the pods that are to ask it.
func inWorld(ctx context.Context, r *rig.Run, f func(*world) error) (err error) {
	m, err := r.StartMesh(ctx, rig.Profiled()...)
	if err != nil {
		return err
	}
	defer func() {
		if died := m.CA.Exited(); died != nil {
			err = errors.Join(err, died)
		}
		if stop := m.Stop(); err == nil {
			err = stop
		}
	}()
	pods, err := m.Pods(ctx, "cart", r.Count(nodes), perNode, false)
	if err != nil {
		return err
	}
	w, err := newWorld(m, pods)
	if err != nil {
		return err
	}
	return f(w)
}

func (w *world) storms(ctx context.Context, r *rig.Run, p *table.Part) error {
	for round := range r.Rounds {
		r.Say("cold start, round %d of %d", round+1, r.Rounds)
		if err := w.coldStart(ctx, p); err != nil {
			return err
		}
		r.Say("half renewals, round %d of %d", round+1, r.Rounds)
		if err := w.halfRenewals(ctx, p); err != nil {
			return err
		}
	}
	p.Find("cold start: until all have a certificate", w.of()).Goal = table.AtMost(10)
	p.Find("cold start: pods without a certificate", w.of()).Goal = table.AtMost(0)
	p.Find("cold start: p99 of a pod's first certificate", w.of()).Goal = table.AtMost(2)
	return w.profiled(ctx, r, p)
}

// of names the pods in figures: a quick run has fewer.
func (w *world) of() string { return count(len(w.pods)) + " pods" }

// world is the pods, with what they ask with.
type world struct {
	mesh     *rig.Mesh
	pods     []rig.Pod
	contexts []context.Context // with a pod's token
	csrs     []string
	nodes    [][]int // pods by node
}

func newWorld(m *rig.Mesh, pods []rig.Pod) (*world, error) {
	w := &world{mesh: m, pods: pods}
	last := ""
	for i, pod := range pods {
		if pod.Node != last {
			last = pod.Node
			w.nodes = append(w.nodes, nil)
		}
		w.nodes[len(w.nodes)-1] = append(w.nodes[len(w.nodes)-1], i)
		w.contexts = append(w.contexts, metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+pod.Token))
		csr, err := rig.CSR()
		if err != nil {
			return nil, err
		}
		w.csrs = append(w.csrs, csr)
	}
	return w, nil
}

// address is that of a node: the CA bounds connections by where they come from.
func address(node int) *net.TCPAddr {
	return &net.TCPAddr{IP: net.IPv4(127, byte(1+node>>16), byte(node>>8), byte(node))}
}

// dial connects as a node.
func (w *world) dial(node int) (*grpc.ClientConn, error) {
	_, port, err := net.SplitHostPort(w.mesh.Address)
	if err != nil {
		return nil, err
	}
	return w.mesh.Dial(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{LocalAddr: address(node)}).DialContext(ctx, "tcp", "127.0.0.1:"+port)
	}))
}

// restart has the CA forget whom it has seen.
func (w *world) restart(ctx context.Context) error {
	if err := w.mesh.CA.Stop(20 * time.Second); err != nil {
		return err
	}
	runtime.GC() // what the last storm left is not the next one's
	return w.mesh.StartCA(ctx)
}

// renew makes the CSRs of some pods anew, as agents do for each certificate.
func (w *world) renew(pods []int) error {
	for _, i := range pods {
		csr, err := rig.CSR()
		if err != nil {
			return err
		}
		w.csrs[i] = csr
	}
	return nil
}

func (w *world) all() []int {
	all := make([]int, len(w.pods))
	for i := range all {
		all[i] = i
	}
	return all
}

func (w *world) coldStart(ctx context.Context, p *table.Part) error {
	if err := w.restart(ctx); err != nil {
		return err
	}
	if err := w.renew(w.all()); err != nil {
		return err
	}
	before, err := measure.CPU(w.mesh.CA.PID())
	if err != nil {
		return err
	}
	s := w.storm(ctx)
	after, err := measure.CPU(w.mesh.CA.PID())
	if err != nil {
		return err
	}
	of := w.of()
	memory, err := measure.MemoryOf(w.mesh.CA.PID())
	if err != nil {
		return err
	}
	p.Add("cold start: until all have a certificate", of, "s", s.took.Seconds())
	p.Add("cold start: pods without a certificate", of, "", float64(s.failed))
	p.Add("cold start: p50 of a pod's first certificate", of, "s", s.latencies(w.all()).Quantile(0.5).Seconds())
	p.Add("cold start: p99 of a pod's first certificate", of, "s", s.latencies(w.all()).Quantile(0.99).Seconds())
	p.Add("cold start: told to come back later, a pod", of, "times", float64(s.refused)/float64(len(w.pods)))
	fastest, slowest := w.byNode(s)
	p.Add("cold start: mean of the slowest node, as a multiple of the fastest's", of, "×", slowest/fastest)
	p.Add("cold start: CPU of a certificate, connections included", "meshca", "ms", (after-before).Seconds()*1000/float64(len(w.pods)))
	p.Add("cold start: resident memory after it", "meshca", "MiB", float64(memory.Resident())/(1<<20))
	if s.err != nil {
		return fmt.Errorf("cold start: %w", s.err)
	}
	return nil
}

// profiled is one more cold start, for its profile.
func (w *world) profiled(ctx context.Context, r *rig.Run, p *table.Part) error {
	if err := w.restart(ctx); err != nil {
		return err
	}
	if err := w.renew(w.all()); err != nil {
		return err
	}
	return r.Profile(ctx, p, w.mesh.Ops, "cold-start", "cold start", r.For(5*time.Second), func(ctx context.Context) error { return w.storm(ctx).err })
}

// byNode is the mean latency of the fastest and of the slowest node, in seconds.
func (w *world) byNode(s *storm) (fastest, slowest float64) {
	for _, pods := range w.nodes {
		var sum time.Duration
		for _, l := range s.latencies(pods) {
			sum += l
		}
		mean := sum.Seconds() / float64(len(pods))
		if fastest == 0 || mean < fastest {
			fastest = mean
		}
		slowest = max(slowest, mean)
	}
	return fastest, slowest
}

// halfRenewals has the pods of every other node come with a certificate.
func (w *world) halfRenewals(ctx context.Context, p *table.Part) error {
	if err := w.restart(ctx); err != nil {
		return err
	}
	var old, young []int
	for n, pods := range w.nodes {
		if n%2 == 0 {
			old = append(old, pods...)
		} else {
			young = append(young, pods...)
		}
	}
	if len(young) == 0 {
		return errors.New("half renewals: there is one node only")
	}
	if err := w.calmly(ctx, old); err != nil {
		return err
	}
	if err := w.renew(w.all()); err != nil {
		return err
	}
	s := w.storm(ctx)
	if s.err != nil {
		return fmt.Errorf("half renewals: %w", s.err)
	}
	p.Add("half renewals: p50", "first certificates", "s", s.latencies(young).Quantile(0.5).Seconds())
	p.Add("half renewals: p50", "renewals", "s", s.latencies(old).Quantile(0.5).Seconds())
	p.Add("half renewals: p99", "first certificates", "s", s.latencies(young).Quantile(0.99).Seconds())
	p.Add("half renewals: p99", "renewals", "s", s.latencies(old).Quantile(0.99).Seconds())
	return nil
}

func count(n int) string {
	if n < 1000 {
		return strconv.Itoa(n)
	}
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}

// ask makes one call as a pod.
func (w *world) ask(ctx context.Context, client istio.IstioCertificateServiceClient, pod int, csr string) error {
	with, cancel := context.WithTimeout(w.contexts[pod], 10*time.Second)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	resp, err := client.CreateCertificate(with, &istio.IstioCertificateRequest{Csr: csr})
	if err != nil {
		return err
	}
	if len(resp.GetCertChain()) < 2 {
		return fmt.Errorf("a chain of %d elements came", len(resp.GetCertChain()))
	}
	return nil
}
