package storms

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/test/bench/measure"
	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/bench/table"
)

// storm is what came of one.
type storm struct {
	took    time.Duration
	after   []time.Duration // by pod, from the beginning; 0 without a certificate
	failed  int
	refused int64
	err     error // of a pod that has failed
}

func (s *storm) latencies(pods []int) measure.Latencies {
	var all measure.Latencies
	for _, i := range pods {
		if s.after[i] > 0 {
			all = append(all, s.after[i])
		}
	}
	return all
}

// patience is how long a pod tries.
const patience = 30 * time.Second

// storm has all pods ask at once.
func (w *world) storm(ctx context.Context) *storm {
	s := &storm{after: make([]time.Duration, len(w.pods))}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var (
		refused atomic.Int64
		mu      sync.Mutex
		wg      sync.WaitGroup
	)
	began := time.Now()
	for n, pods := range w.nodes {
		conn, err := w.dial(n)
		if err != nil {
			s.err = err
			return s
		}
		defer conn.Close()
		client := istio.NewIstioCertificateServiceClient(conn)
		for _, pod := range pods {
			wg.Go(func() {
				err := w.obtain(ctx, client, pod, &refused)
				took := time.Since(began)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					s.failed++
					s.err = fmt.Errorf("pod %s: %w", w.pods[pod].Name, err)
					return
				}
				s.after[pod] = took
				s.took = max(s.took, took)
			})
		}
	}
	wg.Wait()
	s.refused = refused.Load()
	return s
}

// obtain asks until there is a certificate: again when the CA said, and where it said
// nothing after a moment that is drawn. Anything but a busy CA is an error.
func (w *world) obtain(ctx context.Context, client istio.IstioCertificateServiceClient, pod int, refused *atomic.Int64) error {
	for tries := 1; ; tries++ {
		err := w.ask(ctx, client, pod, w.csrs[pod])
		if err == nil || status.Code(err) != codes.ResourceExhausted {
			return err
		}
		refused.Add(1)
		ceiling := min(time.Second<<(tries-1), time.Minute)
		delay := time.Duration(rand.Float64() * float64(ceiling))
		for _, detail := range status.Convert(err).Details() {
			if info, ok := detail.(*errdetails.RetryInfo); ok {
				asked := info.GetRetryDelay().AsDuration()
				delay = asked + time.Duration(rand.Float64()*float64(asked)/10)
			}
		}
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("in %v, after %d tries: %w", patience, tries, err)
		}
	}
}

// calmly gives some pods certificates, a few at once.
func (w *world) calmly(ctx context.Context, pods []int) error {
	conn, err := w.dial(0)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := istio.NewIstioCertificateServiceClient(conn)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for _, pod := range pods {
		group.Go(func() error { return w.ask(ctx, client, pod, w.csrs[pod]) })
	}
	return group.Wait()
}

// steadyRate is how many renew in a second.
const steadyRate = 1000

// What steady measures, and of whom.
const (
	oneCore      = "meshca on one core"
	p99Group     = "latency of a renewal, p99"
	refusedGroup = "refused"
	growthGroup  = "memory's growth, from the second quarter to the last"
)

// steady has pods renew at a rate, at a CA that has one core.
func (w *world) steady(ctx context.Context, r *rig.Run, p *table.Part, d time.Duration) error {
	if err := w.restart(ctx); err != nil {
		return err
	}
	if err := pin(ctx, w.mesh.CA.PID()); err != nil {
		return err
	}
	if err := w.calmly(ctx, w.all()); err != nil { // from here on all are renewals
		return err
	}
	var clients []istio.IstioCertificateServiceClient
	for n := range w.nodes {
		conn, err := w.dial(n)
		if err != nil {
			return err
		}
		defer conn.Close()
		clients = append(clients, istio.NewIstioCertificateServiceClient(conn))
	}
	pid := w.mesh.CA.PID()
	used, err := measure.CPU(pid)
	if err != nil {
		return err
	}
	f := &flow{world: w, clients: clients, csrs: make(chan string, 4*steadyRate)}
	ctx, cancel := context.WithCancel(ctx)
	var maker sync.WaitGroup
	maker.Go(func() { f.makeCSRs(ctx) })
	defer maker.Wait()
	defer cancel()
	r.Say("renewals for %v", d)
	began := time.Now()
	if err := f.run(ctx, d); err != nil {
		return err
	}
	took := time.Since(began)
	after, err := measure.CPU(pid)
	if err != nil {
		return err
	}
	p.Add("seconds of it", oneCore, "s", took.Seconds())
	p.Add("latency of a renewal, p50", oneCore, "ms", f.all.Quantile(0.5).Seconds()*1000)
	p.Add(p99Group, oneCore, "ms", f.all.Quantile(0.99).Seconds()*1000)
	p.Add(refusedGroup, oneCore, "", float64(f.refused))
	p.Add("share of the core", oneCore, "%", 100*(after-used).Seconds()/took.Seconds())
	p.Add(growthGroup, oneCore, "%", f.growth())
	f.picture(p)
	return nil
}

// pin holds a process to the first core that this one may use.
func pin(ctx context.Context, pid int) error {
	out, err := exec.CommandContext(ctx, "taskset", "--all-tasks", "--cpu-list", "--pid", "0", strconv.Itoa(pid)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("holding the CA to one core with taskset: %w: %s", err, out)
	}
	return nil
}

// flow is renewals that begin by the clock.
type flow struct {
	world   *world
	clients []istio.IstioCertificateServiceClient
	csrs    chan string // a new one for each renewal, made ahead

	mu      sync.Mutex // guards what follows
	all     measure.Latencies
	refused int
	err     error
	memory  []float64 // MiB, twice a second
}

func (f *flow) run(ctx context.Context, d time.Duration) error {
	var wg sync.WaitGroup
	i, sampled := 0, time.Now()
	err := measure.OpenLoop(steadyRate, d, func(due time.Time) error {
		if time.Since(sampled) > 500*time.Millisecond {
			sampled = time.Now()
			memory, err := measure.MemoryOf(f.world.mesh.CA.PID())
			if err != nil {
				return err
			}
			f.memory = append(f.memory, float64(memory.Resident())/(1<<20))
		}
		node := i % len(f.clients)
		pods := f.world.nodes[node]
		pod := pods[i/len(f.clients)%len(pods)]
		i++
		csr := <-f.csrs
		wg.Go(func() { f.one(ctx, f.clients[node], pod, csr, due) })
		return nil
	})
	wg.Wait()
	return errors.Join(err, f.err)
}

// makeCSRs makes requests until ctx ends.
func (f *flow) makeCSRs(ctx context.Context) {
	for {
		csr, err := rig.CSR()
		if err != nil {
			return // and whoever waits for one does so until the end: it cannot fail
		}
		select {
		case f.csrs <- csr:
		case <-ctx.Done():
			return
		}
	}
}

func (f *flow) one(ctx context.Context, client istio.IstioCertificateServiceClient, pod int, csr string, due time.Time) {
	err := f.world.ask(ctx, client, pod, csr)
	took := time.Since(due)
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case status.Code(err) == codes.ResourceExhausted:
		f.refused++
	case err != nil:
		f.err = fmt.Errorf("renewing: %w", err)
	default:
		f.all = append(f.all, took)
	}
}

// growth is by how many per cent the mean memory of the last quarter is above that of
// the second: the first is the heap's growing to its size.
func (f *flow) growth() float64 {
	quarter := len(f.memory) / 4
	if quarter == 0 {
		return 0
	}
	mean := func(values []float64) (sum float64) {
		for _, v := range values {
			sum += v
		}
		return sum / float64(len(values))
	}
	return 100 * (mean(f.memory[3*quarter:])/mean(f.memory[quarter:2*quarter]) - 1)
}

// points are as many as a picture shows.
const points = 360

func (f *flow) picture(p *table.Part) {
	line := table.Line{Name: "resident"}
	for i := 0; i < len(f.memory); i += 1 + len(f.memory)/points {
		line.X, line.Y = append(line.X, float64(i)/2), append(line.Y, f.memory[i])
	}
	if len(line.X) > 0 {
		p.Series = append(p.Series, table.Series{Name: "renewals-memory", Title: "Memory at 1,000 renewals a second", X: "seconds", Y: "MiB", Lines: []table.Line{line}})
	}
}
