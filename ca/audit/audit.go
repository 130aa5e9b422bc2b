package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
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
// reach the sink whole and one after another.
type Log struct {
	name string
	sink io.WriteCloser
	now  func() time.Time

	// turn is held by whoever writes. A write that never returns keeps it, and
	// with it the only goroutine that this type ever has.
	turn  chan struct{}
	torn  bool                      // the last write may have left half a line; owned by turn
	stuck atomic.Pointer[time.Time] // since when a write has been overdue; nil if none is
}

// New returns a trail over sink, which name describes in errors. The Log owns
// the sink. now may be nil.
func New(name string, sink io.WriteCloser, now func() time.Time) (*Log, error) {
	if sink == nil {
		return nil, errors.New("audit: no sink is given")
	}
	if now == nil {
		now = time.Now
	}
	return &Log{name: name, sink: sink, now: now, turn: make(chan struct{}, 1)}, nil
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
	line, err := encode(e)
	if err != nil {
		return fmt.Errorf("encoding an audit record: %w", err)
	}
	if since := l.stuck.Load(); since != nil {
		return &BlockedError{Sink: l.name, Since: *since}
	}
	began := l.now()
	patience := time.NewTimer(Patience)
	defer patience.Stop()
	select {
	case l.turn <- struct{}{}:
	case <-patience.C:
		return &BlockedError{Sink: l.name, Since: began}
	case <-ctx.Done():
		return ctx.Err()
	}
	done := make(chan error, 1)
	go l.write(line, done)
	select {
	case err := <-done:
		return err
	case <-patience.C:
		// The goroutine clears this when its write returns after all; if it
		// has just done so, say that the record came too late, and no more.
		l.stuck.Store(&began)
		select {
		case <-done:
			l.stuck.CompareAndSwap(&began, nil)
		default:
		}
		return &BlockedError{Sink: l.name, Since: began}
	}
}

// write writes one line, passes on the turn and reports. It runs beside the
// caller so that a sink that blocks does not hold the caller with it.
func (l *Log) write(line []byte, done chan<- error) {
	if l.torn {
		line = append([]byte{'\n'}, line...)
	}
	_, err := l.sink.Write(line)
	l.torn = err != nil
	if err != nil {
		err = fmt.Errorf("writing to the audit sink %q: %w", l.name, err)
	}
	done <- err
	l.stuck.Store(nil)
	<-l.turn
}

// record is the form of a line. Times are UTC with seconds' fractions, the
// lifetime is in seconds.
type record struct {
	Time      time.Time         `json:"time"`
	Stage     ca.Stage          `json:"stage"`
	Kind      ca.Kind           `json:"kind"`
	SPIFFEID  string            `json:"spiffe_id,omitempty"`
	Names     []string          `json:"names,omitempty"`
	Caller    map[string]string `json:"caller,omitempty"`
	Serial    string            `json:"serial,omitempty"`
	Authority string            `json:"authority,omitempty"`
	Key       string            `json:"key_sha256"`
	Lifetime  float64           `json:"lifetime_seconds"`
	NotAfter  *time.Time        `json:"not_after,omitempty"`
	Error     string            `json:"error,omitempty"`
}

// encode makes one line. JSON is the quoting: no text from outside can end the
// line or the string that it stands in.
func encode(e ca.Event) ([]byte, error) {
	r := record{
		Time: e.Time.UTC(), Stage: e.Stage, Kind: e.Kind, SPIFFEID: e.SPIFFEID,
		Serial: e.Serial, Authority: e.Authority, Key: e.Key, Lifetime: e.Lifetime.Seconds(),
	}
	for _, n := range e.Names {
		r.Names = append(r.Names, cut(n))
	}
	if !e.NotAfter.IsZero() {
		t := e.NotAfter.UTC()
		r.NotAfter = &t
	}
	if e.Err != nil {
		r.Error = cut(e.Err.Error())
	}
	if e.Caller != nil {
		r.Caller = make(map[string]string)
		for _, a := range e.Caller.LogValue().Group() {
			if a.Key != "spiffe_id" || a.Value.String() != e.SPIFFEID {
				r.Caller[a.Key] = cut(a.Value.String())
			}
		}
	}
	line, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return append(line, '\n'), nil
}

func cut(s string) string {
	if len(s) <= maxText {
		return s
	}
	return strings.ToValidUTF8(s[:maxText], "") + "…"
}
