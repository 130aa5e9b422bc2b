package demo

import (
	"context"
	"io"
	"log"
	"log/slog"
	"sync"
)

// refusals is a log handler that keeps the reason of each refusal under the
// reference that went over the wire with it. That is how an operator gets from
// a client's opaque error to its cause, done by machine.
type refusals struct {
	slog.Handler
	mu      *sync.Mutex
	reasons map[string]string
}

func newRefusals(next slog.Handler) *refusals {
	return &refusals{Handler: next, mu: new(sync.Mutex), reasons: map[string]string{}}
}

// Enabled implements slog.Handler: refusals are kept even when the log itself
// is quiet.
func (r *refusals) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements slog.Handler.
func (r *refusals) Handle(ctx context.Context, rec slog.Record) error {
	var ref, reason string
	rec.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "ref":
			ref = a.Value.String()
		case "reason":
			reason = a.Value.String()
		}
		return true
	})
	if ref != "" && reason != "" {
		r.mu.Lock()
		r.reasons[ref] = reason
		r.mu.Unlock()
	}
	if !r.Handler.Enabled(ctx, rec.Level) {
		return nil
	}
	return r.Handler.Handle(ctx, rec)
}

// WithAttrs implements slog.Handler.
func (r *refusals) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &refusals{Handler: r.Handler.WithAttrs(attrs), mu: r.mu, reasons: r.reasons}
}

// WithGroup implements slog.Handler.
func (r *refusals) WithGroup(name string) slog.Handler {
	return &refusals{Handler: r.Handler.WithGroup(name), mu: r.mu, reasons: r.reasons}
}

// reason returns what the log says under a reference.
func (r *refusals) reason(ref string) (string, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, ok := r.reasons[ref]
	return s, ok
}

func discardLog() *log.Logger { return log.New(io.Discard, "", 0) }
