package logs

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// queueLines is how many lines may wait for a reader that is slow.
	queueLines = 4096
	// flushPatience is how long the end of the program waits for one that has
	// stopped.
	flushPatience = time.Second
)

// queue is a writer that never waits: one goroutine writes the lines out, and
// what does not fit is dropped and counted. A log that is a pipe whose reader
// hangs then costs lines and not the program.
type queue struct {
	out   io.Writer
	lines chan []byte
	done  chan struct{}

	mu      sync.Mutex
	closed  bool
	dropped int
}

func newQueue(out io.Writer) *queue {
	q := &queue{out: out, lines: make(chan []byte, queueLines), done: make(chan struct{})}
	go q.run()
	return q
}

// Write takes one line. Handlers of log/slog write a record by one call.
func (q *queue) Write(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return len(p), nil
	}
	select {
	case q.lines <- bytes.Clone(p):
	default:
		q.dropped++
	}
	return len(p), nil
}

func (q *queue) run() {
	defer close(q.done)
	for line := range q.lines {
		// A log that cannot be written is not a reason to stop; there is nowhere
		// left to say so either.
		_, _ = q.out.Write(line)
		if n := q.takeDropped(); n > 0 {
			_, _ = fmt.Fprintf(q.out, `{"time":%q,"level":"WARN","msg":"log lines were dropped; whoever reads the log is too slow","lines":%d}`+"\n",
				time.Now().UTC().Format(time.RFC3339Nano), n)
		}
	}
}

func (q *queue) takeDropped() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := q.dropped
	q.dropped = 0
	return n
}

// close writes out what is waiting, for as long as the patience lasts.
func (q *queue) close() {
	q.mu.Lock()
	if !q.closed {
		q.closed = true
		close(q.lines)
	}
	q.mu.Unlock()
	timer := time.NewTimer(flushPatience)
	defer timer.Stop()
	select {
	case <-q.done:
	case <-timer.C:
	}
}
