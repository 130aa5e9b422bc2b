// Package delivery measures a node's agent: what each pod and each stream costs it, and
// how soon programs have their identity, and a new bundle.
package delivery

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/meshca/meshca/test/bench/measure"
	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/bench/table"
)

// Title and Method head the part's section.
const (
	Title  = "Delivery on a node"
	Method = `` + "`agent node`" + ` in a process of its own, under a CA in another, for one node with 250 pods. What the kubelet would do is
done here: it registers the plugin and publishes each pod's volume with a ServiceAccount token from a real API server. Each
round has a new agent. Each pod then holds four streams, each on a connection of its own: two of FetchX509SVID, one of
FetchX509Bundles, one of Envoy's StreamSecrets for ` + "`default` and `ROOTCA`" + `. All clients are in this process, on the same processors,
and their time is in every figure.

Memory is the kernel's resident size, once it changes by less than 1 % in a second; an idle stream's includes its
connection's. A first answer is the time from before there is a connection to the first SVID. The bundle changes for real: the
CA is one in an operator's files, to which a root is added while all streams are open. The time counts from the CA's own
log line that it has agreed on the new roots, which comes before it puts them into force, to when the last of all streams
has brought the new root; the agent's CPU is that from before the files are changed until half a second after that. For growth, a
quarter more connects come first, so that the heap has what it needs for them; what a collection of garbage left of the heap
is half of the size at which the next is due.`
)

// What there is on a full node.
const (
	workloads = 250
	answers   = 500 // whose first is measured, in each round
	// A socket takes 50 calls a second, and 200 at once. In a quick run, with a tenth of
	// the sockets, more would be refused.
	connectsEach, connectsEachQuick = 400, 140
)

const (
	mb  = 1e6
	kb  = 1e3
	mib = 1 << 20
)

// bench is what all rounds have.
type bench struct {
	run      *rig.Run
	part     *table.Part
	operator *operator
	mesh     *rig.Mesh
	self     rig.Pod // the agent's
	pods     []rig.Pod
}

// Run measures into p.
func Run(ctx context.Context, r *rig.Run, p *table.Part) (err error) {
	b := &bench{run: r, part: p}
	if b.operator, err = newOperator(r); err != nil {
		return err
	}
	if b.mesh, err = r.StartMesh(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.mesh.Stop()) }()
	if b.pods, err = b.mesh.Pods(ctx, "cart", 1, r.Count(workloads), false); err != nil {
		return err
	}
	if b.self, err = b.mesh.AgentPod(ctx, b.pods[0].Node); err != nil {
		return err
	}
	for round := range r.Rounds {
		r.Say("round %d of %d", round+1, r.Rounds)
		if err := b.round(ctx, round); err != nil {
			return err
		}
	}
	goals(p)
	return nil
}

func goals(p *table.Part) {
	p.Find("memory of a workload", "agent").Goal = table.AtMost(0.2)
	p.Find("memory of an idle stream", "agent").Goal = table.AtMost(30)
	p.Find("first answer, 8 at once, p99", "agent").Goal = table.AtMost(50)
	p.Find("a new root, from the CA to the last stream", "agent").Goal = table.AtMost(500)
	p.Find("memory that many connects leave", "agent").Goal = table.AtMost(2)
	p.Find("goroutines that many connects leave", "agent").Goal = table.AtMost(0)
}

// round measures one agent from its start to its end. The last also bears the many
// connects.
func (b *bench) round(ctx context.Context, round int) (err error) {
	n, err := startNode(ctx, b.run, b.mesh, b.self, round)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.stop()) }()
	s, err := b.memory(ctx, n)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	last := round == b.run.Rounds-1
	if last {
		if err := b.run.Heap(ctx, b.part, n.ops, "delivery", "agent with all its streams idle"); err != nil {
			return err
		}
	}
	c := &connects{volumes: n.volumes}
	if err := b.firstAnswers(ctx, c); err != nil {
		return err
	}
	if err := b.newRoot(ctx, n, s); err != nil {
		return err
	}
	if !last {
		return nil
	}
	if err := b.growth(ctx, n, c); err != nil {
		return err
	}
	return b.run.Profile(ctx, b.part, n.ops, "delivery", "agent while streams come and go", b.run.For(5*time.Second), func(ctx context.Context) error {
		return c.run(ctx, b.run.Count(5000), 16, nil)
	})
}

// memory measures the agent with nothing, with all workloads, and with all streams,
// which it leaves open.
func (b *bench) memory(ctx context.Context, n *node) (*streams, error) {
	alone, err := n.settled(ctx)
	if err != nil {
		return nil, err
	}
	if err := n.publish(ctx, b.pods); err != nil {
		return nil, err
	}
	loaded, err := n.settled(ctx)
	if err != nil {
		return nil, err
	}
	s, err := openStreams(ctx, n.volumes)
	if err != nil {
		return nil, err
	}
	streaming, err := n.settled(ctx)
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	b.part.Add("resident memory", "agent, no workload", "MiB", alone/mib)
	b.part.Add("resident memory", fmt.Sprintf("agent, %d workloads", len(b.pods)), "MiB", loaded/mib)
	b.part.Add("resident memory", fmt.Sprintf("agent, %d workloads with %d streams", len(b.pods), s.count), "MiB", streaming/mib)
	b.part.Add("memory of a workload", "agent", "MB", (loaded-alone)/float64(len(b.pods))/mb)
	b.part.Add("memory of an idle stream", "agent", "KB", (streaming-loaded)/float64(s.count)/kb)
	return s, nil
}

func (b *bench) firstAnswers(ctx context.Context, c *connects) error {
	var (
		mu  sync.Mutex
		all measure.Latencies
	)
	err := c.run(ctx, b.run.Count(answers), 8, func(took time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, took)
	})
	if err != nil {
		return err
	}
	b.part.Add("first answer, 8 at once, p50", "agent", "ms", measure.Milliseconds(all.Quantile(0.5)))
	b.part.Add("first answer, 8 at once, p99", "agent", "ms", measure.Milliseconds(all.Quantile(0.99)))
	return nil
}

// newRoot measures how one more root gets from the CA to every stream.
func (b *bench) newRoot(ctx context.Context, n *node, s *streams) error {
	root, err := b.operator.newRoot()
	if err != nil {
		return err
	}
	c := s.await(root)
	before, err := measure.CPU(n.agent.PID())
	if err != nil {
		return err
	}
	if err := b.operator.believe(root); err != nil {
		return err
	}
	at, err := s.wait(ctx, c)
	if err != nil {
		return fmt.Errorf("%w; the last of the CA's log:\n%s", err, b.mesh.CA.LogTail(5))
	}
	// Acknowledgements to the CA, and from Envoys, are on their way.
	if err := pause(ctx, 500*time.Millisecond); err != nil {
		return err
	}
	after, err := measure.CPU(n.agent.PID())
	if err != nil {
		return err
	}
	var changed time.Time
	for l := range logged(b.mesh.CA, "roots of the mesh") {
		if l.Roots == len(b.operator.roots) {
			changed = l.Time
		}
	}
	if changed.IsZero() {
		return fmt.Errorf("the CA's log does not say when it had %d roots", len(b.operator.roots))
	}
	slices.SortFunc(at, time.Time.Compare)
	b.part.Add("a new root, from the CA to the first stream", "agent", "ms", measure.Milliseconds(at[0].Sub(changed)))
	b.part.Add("a new root, from the CA to half of the streams", "agent", "ms", measure.Milliseconds(at[len(at)/2].Sub(changed)))
	b.part.Add("a new root, from the CA to the last stream", "agent", "ms", measure.Milliseconds(at[len(at)-1].Sub(changed)))
	b.part.Add("CPU of one new root", fmt.Sprintf("agent, %d streams", s.count), "ms", measure.Milliseconds(after-before))
	return nil
}

// growth measures what many connects leave behind, while all streams stay open.
func (b *bench) growth(ctx context.Context, n *node, c *connects) error {
	each := connectsEach
	if b.run.Quick {
		each = connectsEachQuick
	}
	total := each * len(b.pods)
	b.run.Say("%d connects", total)
	if err := c.run(ctx, total/4, 16, nil); err != nil {
		return err
	}
	before, err := b.left(ctx, n, nil)
	if err != nil {
		return err
	}
	curve := table.Line{Name: "agent"}
	const steps = 20
	for step := range steps {
		if err := c.run(ctx, total/steps, 16, nil); err != nil {
			return err
		}
		m, err := measure.MemoryOf(n.agent.PID())
		if err != nil {
			return err
		}
		curve.X = append(curve.X, float64((step+1)*(total/steps)))
		curve.Y = append(curve.Y, float64(m.Resident())/mib)
	}
	after, err := b.left(ctx, n, before)
	if err != nil {
		return err
	}
	done := fmt.Sprintf("agent, after %d connects", total)
	for _, f := range []struct {
		group, unit   string
		before, after float64
	}{
		{"resident memory around many connects", "MiB", before.memory / mib, after.memory / mib},
		{"heap after the last collection, around many connects", "MiB", before.nextGC / 2 / mib, after.nextGC / 2 / mib},
		{"goroutines around many connects", "", before.goroutines, after.goroutines},
		{"open files around many connects", "", before.files, after.files},
	} {
		b.part.Add(f.group, "agent, before", f.unit, f.before)
		b.part.Add(f.group, done, f.unit, f.after)
	}
	b.part.Add("memory that many connects leave", "agent", "MiB", (after.memory-before.memory)/mib)
	b.part.Add("heap that many connects leave", "agent", "MiB", (after.nextGC-before.nextGC)/2/mib)
	b.part.Add("goroutines that many connects leave", "agent", "", after.goroutines-before.goroutines)
	b.part.Add("open files that many connects leave", "agent", "", after.files-before.files)
	b.part.Series = append(b.part.Series, table.Series{
		Name: "delivery-growth", Title: "The agent's memory over connects", X: "connects", Y: "resident MiB", Lines: []table.Line{curve},
	})
	return nil
}

// leftover is what the agent holds, with its resident memory.
type leftover struct {
	held
	memory float64
}

// left measures what the agent holds once its memory has settled and it has noticed that
// clients are gone: when it holds no more than before, or after some seconds.
func (b *bench) left(ctx context.Context, n *node, before *leftover) (*leftover, error) {
	l := &leftover{}
	var err error
	if l.memory, err = n.settled(ctx); err != nil {
		return nil, err
	}
	for range 10 {
		if l.held, err = n.held(ctx); err != nil {
			return nil, err
		}
		if before != nil && l.goroutines <= before.goroutines && l.files <= before.files {
			return l, nil
		}
		if err := pause(ctx, 500*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return l, nil
}
