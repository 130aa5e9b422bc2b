package server

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
)

// class is how urgent a call is.
type class int

const (
	first   class = iota // nobody has seen a certificate of the caller's from here
	renewal              // the caller has one that still holds
	classes
)

const (
	// workersPerProcessor is more than one, since a worker also waits for the audit's
	// sink, which takes several records at once.
	workersPerProcessor = 4

	// longestWait is for how long calls are let wait for a worker. One that would wait
	// longer is told when to come back instead, while that is still cheap.
	longestWait = 1500 * time.Millisecond

	// crowded is from how many waiting calls on a node may have only its share of so many,
	// and perNode at least: the nodes that came first would else fill the line, and their
	// pods all be served before any of the others'.
	crowded = 256
	perNode = 8

	// renewalsLater is how much later than a first certificate a renewal is told to come
	// back: it has half of its life left, and the other has nothing.
	renewalsLater = 5 * time.Second

	// longestDelay bounds what it is told.
	longestDelay = 30 * time.Second

	// firstsPerRenewal keeps renewals going while first certificates wait: agents renew
	// with half of a lifetime left, but not with none.
	firstsPerRenewal = 8

	// lingers is how long a worker without work stays: its stack has grown to what
	// signing needs, which costs as much as a tenth of a signature each time.
	lingers = 100 * time.Millisecond

	// likelyInterval is how long a call takes before any has been timed.
	likelyInterval = 500 * time.Microsecond
)

// queue has calls worked on by a few workers: more would only make all of them late.
// First certificates come before renewals, and of each class the nodes take turns,
// so that a node with many pods does not keep the others waiting.
type queue struct {
	workers int

	mu       sync.Mutex  // guards what follows
	running  int         // workers at work
	idle     []chan *job // of workers without work, the last one to become so last
	waiting  [classes]line
	firsts   int           // taken since a renewal was
	interval time.Duration // between calls that end while others wait, averaged
	ended    time.Time     // when the last of these did; zero if none waited then
	slot     time.Time     // when the next who is refused should come back
}

// job is a call that waits.
type job struct {
	run  func()
	done chan struct{} // closed when run has returned
}

// busyError says that a call was not begun. After says when to make it again.
type busyError struct {
	Waiting int
	OfNode  int
	Wait    time.Duration
	After   time.Duration
}

func (e *busyError) Error() string {
	return fmt.Sprintf("%d calls wait already, %d of them of its node, and it would have its turn in %s; it was told to come back in %s: more replicas of the CA would take some of the load",
		e.Waiting, e.OfNode, e.Wait.Round(time.Millisecond), e.After.Round(time.Millisecond))
}

func newQueue() *queue {
	return &queue{workers: workersPerProcessor * runtime.GOMAXPROCS(0), interval: likelyInterval}
}

// do has a call worked on, and returns when run has returned. The error is ctx's if
// its turn did not come in time, and a [*busyError] if it would not; run is not
// called then. A panic of run is an error too.
func (q *queue) do(ctx context.Context, c class, node string, run func()) error {
	var panicked error
	j := &job{done: make(chan struct{}), run: func() { panicked = guard(func() error { run(); return nil }) }}
	q.mu.Lock()
	switch {
	case q.running < q.workers:
		q.beginLocked(j)
	default:
		if err := q.admitLocked(ctx, c, node); err != nil {
			q.mu.Unlock()
			return err
		}
		q.waiting[c].push(node, j)
	}
	q.mu.Unlock()
	select {
	case <-j.done:
	case <-ctx.Done():
		if q.abandon(c, node, j) {
			return ctx.Err()
		}
		<-j.done // run knows ctx too
	}
	return panicked
}

// beginLocked has a worker begin a job: one that lingers, or a new one.
func (q *queue) beginLocked(j *job) {
	q.running++
	if last := len(q.idle) - 1; last >= 0 {
		q.idle[last] <- j // holds one
		q.idle = q.idle[:last]
		return
	}
	go q.work(j)
}

// admitLocked refuses who would wait for too long.
func (q *queue) admitLocked(ctx context.Context, c class, node string) error {
	ahead := q.waiting[first].n + q.waiting[renewal].n
	before := ahead
	if c == first { // a renewal in between counts for little
		before = q.waiting[first].n
	}
	wait := time.Duration(before+1) * q.interval
	patience := longestWait
	if deadline, ok := ctx.Deadline(); ok {
		patience = min(patience, time.Until(deadline))
	}
	share := max(perNode, crowded/max(1, len(q.waiting[c].nodes)))
	if wait <= patience && (ahead < crowded || q.waiting[c].of(node) < share) {
		return nil
	}
	return &busyError{Waiting: ahead, OfNode: q.waiting[c].of(node), Wait: wait, After: q.delayLocked(c)}
}

// delay is when to come back for somebody who was refused before he reached the queue.
func (q *queue) delay(c class) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.delayLocked(c)
}

// delayLocked gives each who is refused an instant of his own, half as far behind the
// one before as a call takes: they come back twice as fast as they were served while
// all came at once, and those who are too early are told so again, for little.
func (q *queue) delayLocked(c class) time.Duration {
	now := time.Now()
	later := time.Duration(0)
	if c == renewal {
		later = renewalsLater
	}
	half := time.Duration(q.waiting[first].n+q.waiting[renewal].n) * q.interval / 2
	if soonest := now.Add(max(half, 50*time.Millisecond)); q.slot.Before(soonest) {
		q.slot = soonest
	}
	after := q.slot.Sub(now)
	if after >= longestDelay {
		// There are more than can be told apart; they are strewn.
		return longestDelay/2 + rand.N(longestDelay/2)
	}
	q.slot = q.slot.Add(q.interval / 2)
	return min(after+later, longestDelay)
}

// abandon takes a job out of the line, unless a worker has it.
func (q *queue) abandon(c class, node string, j *job) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.waiting[c].remove(node, j)
}

// work is a worker's life.
func (q *queue) work(j *job) {
	given := make(chan *job, 1)
	linger := time.NewTimer(lingers)
	defer linger.Stop()
	for {
		for ; j != nil; j = q.next(given) {
			j.run()
			close(j.done)
		}
		linger.Reset(lingers)
		select {
		case j = <-given:
		case <-linger.C:
			if q.leave(given) {
				return
			}
			j = <-given
		}
	}
}

// leave ends a worker's life, unless it has just been given a job.
func (q *queue) leave(given chan *job) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.idle, given)
	if i >= 0 {
		q.idle = slices.Delete(q.idle, i, i+1)
	}
	return i >= 0
}

// next ends a turn and begins the next one, if there is one; else the worker is idle.
func (q *queue) next(given chan *job) *job {
	q.mu.Lock()
	defer q.mu.Unlock()
	c := first
	if q.waiting[first].n == 0 || q.firsts >= firstsPerRenewal && q.waiting[renewal].n > 0 {
		c = renewal
	}
	j := q.waiting[c].pop()
	if j == nil {
		q.running--
		q.ended = time.Time{}
		q.idle = append(q.idle, given)
		return nil
	}
	if q.firsts++; c == renewal {
		q.firsts = 0
	}
	now := time.Now()
	if !q.ended.IsZero() {
		q.interval += (min(now.Sub(q.ended), time.Second) - q.interval) / 64
	}
	q.ended = now
	return j
}

// lengths are how many wait.
func (q *queue) lengths() (n [classes]int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for c := range q.waiting {
		n[c] = q.waiting[c].n
	}
	return n
}

// line is the calls of one class, with a line for each node. The zero line is empty.
type line struct {
	n     int
	nodes map[string]*nodeLine
	turns []*nodeLine // all of them; whose turn is next first
}

// nodeLine is never empty.
type nodeLine struct {
	node string
	jobs []*job
}

func (l *line) push(node string, j *job) {
	if l.nodes == nil {
		l.nodes = make(map[string]*nodeLine)
	}
	of := l.nodes[node]
	if of == nil {
		of = &nodeLine{node: node}
		l.nodes[node] = of
		l.turns = append(l.turns, of)
	}
	of.jobs = append(of.jobs, j)
	l.n++
}

// of is how many of a node wait.
func (l *line) of(node string) int {
	if of := l.nodes[node]; of != nil {
		return len(of.jobs)
	}
	return 0
}

// pop returns nil if nobody waits.
func (l *line) pop() *job {
	if l.n == 0 {
		return nil
	}
	l.n--
	of := l.turns[0]
	l.turns = l.turns[1:]
	j := of.jobs[0]
	of.jobs = of.jobs[1:]
	if len(of.jobs) > 0 {
		l.turns = append(l.turns, of)
	} else {
		delete(l.nodes, of.node)
	}
	return j
}

// remove takes a job out; false if it is not there.
func (l *line) remove(node string, j *job) bool {
	of := l.nodes[node]
	if of == nil {
		return false
	}
	i := slices.Index(of.jobs, j)
	if i < 0 {
		return false
	}
	l.n--
	of.jobs = slices.Delete(of.jobs, i, i+1)
	if len(of.jobs) == 0 {
		delete(l.nodes, node)
		l.turns = slices.DeleteFunc(l.turns, func(other *nodeLine) bool { return other == of })
	}
	return true
}

// busy is the refusal of a call that could not be begun.
func busy(err error, after time.Duration) error {
	return &callError{code: codes.ResourceExhausted, err: err, after: after}
}
