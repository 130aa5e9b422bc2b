package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	core "k8s.io/api/core/v1"
	"k8s.io/client-go/dynamic"
)

// Limits. Each object has its own, so that one that fails without end silences no
// other; and all together spare the API server.
const (
	maxQueue  = 1000             // different events that wait
	maxSeries = 4096             // events that are remembered for their count
	maxKnown  = 4096             // objects whose rate is known
	perSecond = 10               // writes
	burst     = 50               //
	objects   = 10               // different events of one object at once,
	refill    = time.Minute      // and one more each
	again     = time.Minute      // between two counts of one event
	lifetime  = 50 * time.Minute // after which an event is begun anew; the API server keeps it for 60
)

// Config is what [New] takes. Everything is required.
type Config struct {
	Client dynamic.Interface
	// Instance is the name of the replica's pod.
	Instance string
	Now      func() time.Time
	Log      *slog.Logger
	Metrics  prometheus.Registerer
}

// Writer writes events. Its methods are safe for concurrent use. Use [New], then
// [Writer.Run].
type Writer struct {
	conf    Config
	written *prometheus.CounterVec
	woken   chan struct{} // holds one: something waits

	mu    sync.Mutex
	queue []key       // that wait, in their order
	waits map[key]int // how often each was said since it was taken from the queue

	// Owned by Run.
	global *rate.Limiter
	series map[key]series
	known  map[object]*rate.Limiter
	said   string // the last trouble that is in the log
}

// object is what an event is about.
type object struct{ apiVersion, kind, namespace, name, uid string }

// key is what makes two events the same one.
type key struct {
	object
	kind                 string // core.EventTypeNormal or Warning
	reason, action, note string
}

// series is an event that was written.
type series struct {
	name  string
	count int32
	first time.Time
	last  time.Time // written
}

// New makes a Writer. It writes nothing before Run.
func New(c Config) (*Writer, error) {
	if c.Client == nil || c.Instance == "" || c.Now == nil || c.Log == nil || c.Metrics == nil {
		return nil, errors.New("events: Client, Instance, Now, Log and Metrics must all be given")
	}
	w := &Writer{
		conf: c, woken: make(chan struct{}, 1), global: rate.NewLimiter(perSecond, burst),
		waits: make(map[key]int), series: make(map[key]series), known: make(map[object]*rate.Limiter),
		written: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_events_total",
			Help: "Kubernetes events by what became of them: written, counted (in one that is there), queue_full, too_often (for one object), failed.",
		}, []string{"result"}),
	}
	for _, r := range []string{resultWritten, resultCounted, resultFull, resultOften, resultFailed} {
		w.written.WithLabelValues(r)
	}
	if err := c.Metrics.Register(w.written); err != nil {
		return nil, fmt.Errorf("events: registering metrics: %w", err)
	}
	return w, nil
}

const (
	resultWritten = "written"
	resultCounted = "counted"
	resultFull    = "queue_full"
	resultOften   = "too_often"
	resultFailed  = "failed"
)

// Refused tells the owner of a pod that it is refused a certificate. The reason may
// hold what others wrote, and should say what to do.
func (w *Writer) Refused(podNamespace, podName, podUID, reason string) {
	w.say(key{
		object: object{"v1", "Pod", podNamespace, podName, podUID},
		kind:   core.EventTypeWarning, reason: "CertificateRefused", action: "Issue",
		note: clean("meshca refuses this pod a certificate: " + reason + "; what it has stays until it ends"),
	})
}

// Policy tells the owner of a PeerAuthentication what becomes of it. The reason is one
// word in CamelCase.
func (w *Writer) Policy(apiVersion, namespace, name, uid string, warning bool, reason, text string) {
	kind := core.EventTypeNormal
	if warning {
		kind = core.EventTypeWarning
	}
	w.say(key{
		object: object{apiVersion, "PeerAuthentication", namespace, name, uid},
		kind:   kind, reason: reason, action: "Resolve", note: clean(text),
	})
}

// say puts an event into the queue, if there is room.
func (w *Writer) say(k key) {
	w.mu.Lock()
	_, waits := w.waits[k]
	full := !waits && len(w.queue) >= maxQueue
	switch {
	case waits:
		w.waits[k]++
	case !full:
		w.waits[k] = 1
		w.queue = append(w.queue, k)
	}
	w.mu.Unlock()
	if full {
		w.written.WithLabelValues(resultFull).Inc()
		return
	}
	select {
	case w.woken <- struct{}{}:
	default: // it has been told already
	}
}

// Run writes until ctx ends. What waits then is dropped.
func (w *Writer) Run(ctx context.Context) error {
	for {
		k, times, ok := w.next()
		if !ok {
			select {
			case <-ctx.Done():
				return nil
			case <-w.woken:
			}
			continue
		}
		if err := w.handle(ctx, k, times); err != nil {
			return nil // ctx has ended
		}
	}
}

func (w *Writer) next() (k key, times int, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) == 0 {
		w.queue = nil // lets go of what it grew to
		return key{}, 0, false
	}
	k, w.queue = w.queue[0], w.queue[1:]
	times = w.waits[k]
	delete(w.waits, k)
	return k, times, true
}

// handle writes an event, or counts it in the one that is there. It returns an
// error only when ctx has ended.
func (w *Writer) handle(ctx context.Context, k key, times int) error {
	now := w.conf.Now()
	s, known := w.series[k]
	if known && now.Sub(s.first) > lifetime {
		delete(w.series, k)
		known = false
	}
	s.count += int32(min(times, 1<<20))
	if known && now.Sub(s.last) < again {
		w.series[k] = s // its count is written with a later one
		w.written.WithLabelValues(resultCounted).Inc()
		return nil
	}
	if !known {
		s = series{count: int32(min(times, 1<<20)), first: now}
		if !w.allowed(k.object, now) {
			w.written.WithLabelValues(resultOften).Inc()
			return nil
		}
	}
	if err := w.global.Wait(ctx); err != nil {
		return err
	}
	s.last = now
	name, err := w.write(ctx, k, s)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		w.written.WithLabelValues(resultFailed).Inc()
		w.trouble(err)
		return nil
	}
	s.name, w.said = name, ""
	w.written.WithLabelValues(resultWritten).Inc()
	w.keep(k, s)
	return nil
}

// allowed reports whether an object may have one more event.
func (w *Writer) allowed(o object, now time.Time) bool {
	l := w.known[o]
	if l == nil {
		if len(w.known) >= maxKnown {
			forget(w.known, func(l *rate.Limiter) bool { return l.TokensAt(now) >= objects })
		}
		l = rate.NewLimiter(rate.Every(refill), objects)
		w.known[o] = l
	}
	return l.AllowN(now, 1)
}

// keep remembers what was written, for its count.
func (w *Writer) keep(k key, s series) {
	if _, known := w.series[k]; !known && len(w.series) >= maxSeries {
		forget(w.series, func(old series) bool { return s.last.Sub(old.first) > lifetime })
	}
	w.series[k] = s
}

// forget makes room: it drops what means nothing any more, and if there is none of
// that, anything. What is forgotten is written as if it were new.
func forget[K comparable, V any](m map[K]V, stale func(V) bool) {
	before := len(m)
	for k, v := range m {
		if stale(v) {
			delete(m, k)
		}
	}
	for k := range m {
		if len(m) < before {
			return
		}
		delete(m, k)
	}
}

func (w *Writer) trouble(err error) {
	if err.Error() == w.said {
		return
	}
	w.said = err.Error()
	w.conf.Log.Warn("an event could not be written, and is dropped", "error", err)
}
