package logs

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Lines of one kind that are let through: a burst, then so many a second.
const (
	burst     = 200
	perSecond = 100
	// maxKinds bounds what is remembered. Messages are constants of the code
	// with few exceptions; what is beyond the bound shares one allowance.
	maxKinds = 1024
)

// kind is what lines are counted by: where a program says the same thing for
// many reasons, its attribute "code" tells them apart.
type kind struct {
	level slog.Level
	msg   string
	code  string
}

// allowance is a token bucket.
type allowance struct {
	tokens     float64
	last       time.Time
	suppressed int
}

// limiter is shared by all handlers that are derived from one.
type limiter struct {
	now   func() time.Time
	mu    sync.Mutex
	kinds map[kind]*allowance
}

// limited is a handler that lets at most [perSecond] lines of a kind through,
// and says how many it held back with the next one that passes.
type limited struct {
	slog.Handler
	*limiter
}

func newLimited(h slog.Handler) limited {
	return limited{h, &limiter{now: time.Now, kinds: make(map[kind]*allowance)}}
}

// Handle implements slog.Handler.
func (h limited) Handle(ctx context.Context, r slog.Record) error {
	k := kind{level: r.Level, msg: r.Message}
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "code" {
			k.code = a.Value.String()
			return false
		}
		return true
	})
	pass, suppressed := h.take(k)
	if !pass {
		return nil
	}
	if suppressed > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("suppressed", suppressed))
	}
	return h.Handler.Handle(ctx, r)
}

// take asks for one line of a kind.
func (l *limiter) take(k kind) (pass bool, suppressed int) {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.kinds[k]
	if a == nil {
		if len(l.kinds) >= maxKinds {
			k = kind{level: k.level}
			a = l.kinds[k]
		}
		if a == nil {
			a = &allowance{tokens: burst, last: now}
			l.kinds[k] = a
		}
	}
	a.tokens = min(burst, a.tokens+max(0, now.Sub(a.last).Seconds())*perSecond)
	a.last = now
	if a.tokens < 1 {
		a.suppressed++
		return false, 0
	}
	a.tokens--
	suppressed, a.suppressed = a.suppressed, 0
	return true, suppressed
}

// WithAttrs implements slog.Handler.
func (h limited) WithAttrs(attrs []slog.Attr) slog.Handler {
	return limited{h.Handler.WithAttrs(attrs), h.limiter}
}

// WithGroup implements slog.Handler.
func (h limited) WithGroup(name string) slog.Handler {
	return limited{h.Handler.WithGroup(name), h.limiter}
}
