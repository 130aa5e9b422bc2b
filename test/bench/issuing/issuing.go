// Package issuing measures CreateCertificate: over TLS, with a real ServiceAccount
// token checked offline, pods followed at a real API server, and the audit on.
package issuing

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
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
	Title  = "Issuing"
	Method = `CreateCertificate against ` + "`meshca serve`" + ` in a process of its own, over TLS 1.3, with P-256 keys made beforehand.
Each call carries one of 2,000 pods' ServiceAccount tokens (RS256, from a real API server, which is asked nothing
meanwhile); the CA checks the token offline, finds the pod in its informer, checks the CSR, writes both audit records to a
file and signs. Each token was shown once before, as when a pod renews, and the CA remembers it; tokens that are new are those of the cold
start below, at 0.1 ms more. Callers share connections, eight to one. The library loop is what Go's crypto/x509 alone needs, in this
process, to parse a CSR, check it, and make and sign a P-256 leaf; crypto/x509 verifies each signature that it makes, in both.
Latency is measured at 70 % of the highest rate of the same round; calls start by the clock, whether others have ended or
not, and the time counts from when a call should have started.`
)

// callers are the numbers of concurrent callers that are measured.
var callers = []int{1, 4, 16, 64}

// callersPerConnection is as with Istio's agents behind a proxy; ours have one a node.
const callersPerConnection = 8

// Run measures into p.
func Run(ctx context.Context, r *rig.Run, p *table.Part) (err error) {
	m, err := r.StartMesh(ctx, rig.Profiled()...)
	if err != nil {
		return err
	}
	defer func() {
		if stop := m.Stop(); err == nil {
			err = stop
		}
	}()
	pods, err := m.Pods(ctx, "cart", max(1, r.Count(100)), 20, false)
	if err != nil {
		return err
	}
	l, err := newLoad(m, pods, 64)
	if err != nil {
		return err
	}
	defer l.close()
	lib, err := newLibrary(l.csrs[0])
	if err != nil {
		return err
	}
	if _, err := l.closedLoop(ctx, 64, r.For(2*time.Second)); err != nil { // warm
		return err
	}
	for round := range r.Rounds {
		r.Say("round %d of %d", round+1, r.Rounds)
		if err := lib.round(p, r.For(3*time.Second)); err != nil {
			return err
		}
		best := 0.0
		for _, n := range callers {
			rate, err := l.round(ctx, p, n, r.For(5*time.Second))
			if err != nil {
				return err
			}
			best = max(best, rate)
		}
		if err := l.latency(ctx, p, 0.7*best, r.For(10*time.Second)); err != nil {
			return err
		}
		memory, err := measure.MemoryOf(m.CA.PID())
		if err != nil {
			return err
		}
		p.Add("resident memory after each round", "meshca", "MiB", float64(memory.Resident())/(1<<20))
	}
	goals(p)
	return r.Profile(ctx, p, m.Ops, "issuing", "64 callers", r.For(5*time.Second), func(ctx context.Context) error {
		_, err := l.closedLoop(ctx, 64, r.For(5*time.Second))
		return err
	})
}

func goals(p *table.Part) {
	lib := p.Find("CPU of one certificate", "Go's library alone").Median()
	most := p.Find("CPU of one certificate", "meshca, 64 callers")
	most.Goal = table.AtMost(0.38)
	ratio := p.Add("CPU of one certificate, as a multiple of the library's", "meshca, 64 callers", "×", most.Median()/lib)
	ratio.Goal = table.AtMost(1.6)
	p.Find("certificates a second, load beside it", "meshca, 64 callers").Goal = table.AtLeast(3000)
	p.Find("latency at 70 % load, p99", "meshca").Goal = table.AtMost(40)
	curve := table.Series{Name: "issuing-rate", Title: "Certificates a second by callers", X: "callers", Y: "certificates a second", LogX: true}
	line := table.Line{Name: "meshca"}
	for _, n := range callers {
		line.X = append(line.X, float64(n))
		line.Y = append(line.Y, p.Find("certificates a second, load beside it", of(n)).Median())
	}
	curve.Lines = []table.Line{line}
	p.Series = append(p.Series, curve)
}

func of(n int) string {
	if n == 1 {
		return "meshca, 1 caller"
	}
	return fmt.Sprintf("meshca, %d callers", n)
}

// load is the callers. Their CSRs are made beforehand: a caller's key is not the
// CA's work.
type load struct {
	mesh     *rig.Mesh
	clients  []istio.IstioCertificateServiceClient
	conns    []*grpc.ClientConn
	contexts []context.Context // each with a pod's token
	csrs     []string
	next     atomic.Uint64
}

func newLoad(m *rig.Mesh, pods []rig.Pod, most int) (*load, error) {
	l := &load{mesh: m}
	for range max(1, most/callersPerConnection) {
		conn, err := m.Dial()
		if err != nil {
			return nil, err
		}
		l.conns = append(l.conns, conn)
		l.clients = append(l.clients, istio.NewIstioCertificateServiceClient(conn))
	}
	for _, pod := range pods {
		l.contexts = append(l.contexts, metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+pod.Token))
	}
	for range 256 {
		csr, err := rig.CSR()
		if err != nil {
			return nil, err
		}
		l.csrs = append(l.csrs, csr)
	}
	return l, nil
}

func (l *load) close() {
	for _, c := range l.conns {
		_ = c.Close()
	}
}

// call makes one call, as the next pod. Any error fails the benchmark.
func (l *load) call(ctx context.Context, connection int) error {
	i := l.next.Add(1)
	with, cancel := context.WithTimeout(l.contexts[i%uint64(len(l.contexts))], 30*time.Second)
	defer cancel()
	resp, err := l.clients[connection%len(l.clients)].CreateCertificate(with, &istio.IstioCertificateRequest{Csr: l.csrs[i%uint64(len(l.csrs))]})
	if err != nil {
		return fmt.Errorf("asking for a certificate: %w", err)
	}
	if len(resp.GetCertChain()) < 2 {
		return fmt.Errorf("a chain of %d elements came", len(resp.GetCertChain()))
	}
	return ctx.Err()
}

// closedLoop has n callers call again and again for a while, and returns how many
// calls they made.
func (l *load) closedLoop(ctx context.Context, n int, d time.Duration) (calls int64, err error) {
	var (
		count atomic.Int64
		once  sync.Once
		wg    sync.WaitGroup
	)
	end := time.Now().Add(d)
	for c := range n {
		wg.Go(func() {
			for time.Now().Before(end) {
				if e := l.call(ctx, c/callersPerConnection); e != nil {
					once.Do(func() { err = e })
					return
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	return count.Load(), err
}

// round measures n callers, and returns their rate.
func (l *load) round(ctx context.Context, p *table.Part, n int, d time.Duration) (rate float64, err error) {
	before, err := measure.CPU(l.mesh.CA.PID())
	if err != nil {
		return 0, err
	}
	began, own := time.Now(), measure.Own()
	calls, err := l.closedLoop(ctx, n, d)
	if err != nil {
		return 0, err
	}
	took, used := time.Since(began), measure.Own()-own
	after, err := measure.CPU(l.mesh.CA.PID())
	if err != nil {
		return 0, err
	}
	rate = float64(calls) / took.Seconds()
	p.Add("CPU of one certificate", of(n), "ms", measure.Milliseconds(after-before)/float64(calls))
	p.Add("certificates a second, load beside it", of(n), "", rate)
	if n == callers[len(callers)-1] {
		p.Add("CPU of the load, each call", "the callers", "ms", measure.Milliseconds(used)/float64(calls))
	}
	return rate, nil
}

// latency has calls begin by the clock at a rate, at instants that are drawn, as of
// callers who know nothing of each other.
func (l *load) latency(ctx context.Context, p *table.Part, rate float64, d time.Duration) error {
	var (
		mu  sync.Mutex
		all measure.Latencies
		err error
		wg  sync.WaitGroup
	)
	c := 0
	_ = measure.OpenLoop(rate, d, func(due time.Time) error {
		connection := c
		c++
		wg.Go(func() {
			e := l.call(ctx, connection)
			took := time.Since(due)
			mu.Lock()
			defer mu.Unlock()
			if e != nil {
				err = e
			}
			all = append(all, took)
		})
		return nil
	})
	wg.Wait()
	if err != nil {
		return err
	}
	p.Add("latency at 70 % load, p50", "meshca", "ms", measure.Milliseconds(all.Quantile(0.5)))
	p.Add("latency at 70 % load, p99", "meshca", "ms", measure.Milliseconds(all.Quantile(0.99)))
	return nil
}

// round measures the library on one thread.
func (l *library) round(p *table.Part, d time.Duration) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	end := time.Now().Add(d)
	before, n := measure.Own(), 0
	for ; time.Now().Before(end); n++ {
		if err := l.one(); err != nil {
			return err
		}
	}
	p.Add("CPU of one certificate", "Go's library alone", "ms", measure.Milliseconds(measure.Own()-before)/float64(n))
	return nil
}
