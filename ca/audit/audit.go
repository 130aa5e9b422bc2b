package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshca/meshca/ca"
)

// Patience is how long a sink may take for one record. Longer than that, and
// callers would hang instead of being told to ask another CA.
const Patience = time.Second

// maxText bounds each text in a record that somebody else chose. SPIFFE IDs are
// never cut: they are checked, bounded, and what a trail is searched for.
const maxText = 256

// BlockedError says that the sink has not taken a record in time. Until it has
// taken it, every further record fails at once.
type BlockedError struct {
	Sink  string
	Since time.Time
}

func (e *BlockedError) Error() string {
	return fmt.Sprintf("the audit sink %q has blocked since %s; whatever reads it must go on", e.Sink, e.Since.UTC().Format(time.RFC3339))
}

// Log is an audit trail over one sink. It is safe for concurrent use; records
// reach the sink whole and one after another. Those that come while a write goes on
// share the next one: under load the sink is asked once for many.
type Log struct {
	name string
	sink io.WriteCloser
	now  func() time.Time

	mu      sync.Mutex // guards what follows
	waiting []*line    // of the next write
	writing bool       // the only goroutine that this type ever has is there
	stuck   time.Time  // since when a write has been overdue; zero if none is

	torn bool   // the last write may have left half a line; the writer's
	buf  []byte // what is written; the writer's
}

// line is a record on its way.
type line struct {
	text  []byte
	began time.Time
	done  chan error // holds one
}

// maxBatch bounds the lines of one write, and with them the writer's memory.
const maxBatch = 256

// New returns a trail over sink, which name describes in errors. The Log owns
// the sink. now may be nil.
func New(name string, sink io.WriteCloser, now func() time.Time) (*Log, error) {
	if sink == nil {
		return nil, errors.New("audit: no sink is given")
	}
	if now == nil {
		now = time.Now
	}
	return &Log{name: name, sink: sink, now: now}, nil
}

// Open returns a trail that appends to the file at path, which is made (0600) if
// it is not there, and again when it has been rotated away. A FIFO must have a
// reader by now.
func Open(path string, now func() time.Time) (*Log, error) {
	f, err := openFile(path)
	if err != nil {
		return nil, fmt.Errorf("opening the audit sink: %w", err)
	}
	return New(path, &file{path: path, f: f}, now)
}

// Close closes the sink.
func (l *Log) Close() error { return l.sink.Close() }

// Record writes one line and returns when the sink has taken it.
func (l *Log) Record(ctx context.Context, e ca.Event) error {
	w, err := l.enter(encode(&e))
	if err != nil {
		return err
	}
	patience := time.NewTimer(Patience)
	defer patience.Stop()
	canceled := ctx.Done()
	for {
		select {
		case err := <-w.done:
			return err
		case <-patience.C:
			return l.overdue(w)
		case <-canceled:
			if l.withdraw(w) {
				return ctx.Err()
			}
			canceled = nil // it is being written, and the answer says whether it was
		}
	}
}

// enter has a line written with the next ones, unless the sink is stuck.
func (l *Log) enter(text []byte) (*line, error) {
	w := &line{text: text, began: l.now(), done: make(chan error, 1)}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.stuck.IsZero() {
		return nil, &BlockedError{Sink: l.name, Since: l.stuck}
	}
	l.waiting = append(l.waiting, w)
	if !l.writing {
		l.writing = true
		go l.write()
	}
	return w, nil
}

// withdraw takes a line back, if it is not being written.
func (l *Log) withdraw(w *line) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.withdrawLocked(w)
}

func (l *Log) withdrawLocked(w *line) bool {
	i := slices.Index(l.waiting, w)
	if i >= 0 {
		l.waiting = slices.Delete(l.waiting, i, i+1)
	}
	return i >= 0
}

// overdue is the end of a caller's patience. A line that is being written makes the
// sink stuck until the write returns after all; if it has just done so, the record
// came too late, and no more.
func (l *Log) overdue(w *line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.withdrawLocked(w) && len(w.done) == 0 && (l.stuck.IsZero() || w.began.Before(l.stuck)) {
		l.stuck = w.began
	}
	return &BlockedError{Sink: l.name, Since: w.began}
}

// write writes what waits until nothing does. It stays in a write that never
// returns.
func (l *Log) write() {
	for {
		l.mu.Lock()
		n := min(len(l.waiting), maxBatch)
		batch := slices.Clone(l.waiting[:n])
		l.waiting = slices.Delete(l.waiting, 0, n)
		l.writing = n > 0
		l.mu.Unlock()
		if n == 0 {
			return
		}
		err := l.writeLines(batch)
		l.mu.Lock()
		l.stuck = time.Time{}
		for _, w := range batch {
			w.done <- err
		}
		l.mu.Unlock()
	}
}

// writeLines writes lines at once: all of them count, or none does.
func (l *Log) writeLines(batch []*line) error {
	l.buf = l.buf[:0]
	if l.torn {
		l.buf = append(l.buf, '\n')
	}
	for _, w := range batch {
		l.buf = append(l.buf, w.text...)
	}
	_, err := l.sink.Write(l.buf)
	l.torn = err != nil
	if err != nil {
		return fmt.Errorf("writing to the audit sink %q: %w", l.name, err)
	}
	return nil
}

func cut(s string) string {
	if len(s) <= maxText {
		return s
	}
	return strings.ToValidUTF8(s[:maxText], "") + "…"
}
