package proxy

import (
	"sync"
	"time"
)

// lingers is how long a worker without work stays, so that whoever comes next finds a
// stack that has grown to what a handshake needs.
const lingers = 100 * time.Millisecond

// workers call functions on goroutines of their own. A handshake makes a stack grow
// to many times of what carrying bytes needs, and a stack shrinks late: that of an
// idle connection would be most of its memory. There are as many as calls at once.
type workers struct {
	next  chan func() // unbuffered: only a worker that waits takes one
	ended chan struct{}
	all   sync.WaitGroup
}

func newWorkers() *workers { return &workers{next: make(chan func()), ended: make(chan struct{})} }

// call returns when f has. It must not be called once end has been.
func (w *workers) call(f func()) {
	done := make(chan struct{})
	job := func() { defer close(done); f() }
	select {
	case w.next <- job:
	default:
		w.all.Go(func() { w.work(job) })
	}
	<-done
}

func (w *workers) work(job func()) {
	linger := time.NewTimer(lingers)
	defer linger.Stop()
	for {
		job()
		linger.Reset(lingers)
		select {
		case job = <-w.next:
		case <-linger.C:
			return
		case <-w.ended:
			return
		}
	}
}

// end sends away those without work and waits for the others.
func (w *workers) end() {
	close(w.ended)
	w.all.Wait()
}
