package trust

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"

	"github.com/meshca/meshca/identity"
)

const (
	requestTimeout = 10 * time.Second
	workers        = 4

	// DefaultQPS bounds writes, so that a new root in a cluster of thousands of
	// namespaces is no load that its API server notices.
	DefaultQPS = 50
)

// Config is what a [Distributor] is made from.
type Config struct {
	Client    kubernetes.Interface // required
	Namespace string               // required: the agents' namespace, which needs no label
	Replica   string               // required: this replica's name, such as its pod's
	// Bundle returns the bundle, nil if there is none yet, and a channel that is
	// closed when there is another; as [ca.Authority.Bundle] does. Required.
	Bundle func() (*identity.Bundle, <-chan struct{})
	// IstioCompatibility has istio-ca-root-cert written where nobody else does.
	IstioCompatibility bool
	QPS                float32               // writes a second; zero means [DefaultQPS]
	Discovery          time.Duration         // zero means [DefaultDiscovery]
	Now                func() time.Time      // nil means time.Now
	Log                *slog.Logger          // nil means no log
	Metrics            prometheus.Registerer // nil means none
}

// Distributor keeps the objects that carry the bundle. [Distributor.Run] is for
// one replica at a time, see package leader, and right with several.
type Distributor struct {
	conf    Config
	log     *slog.Logger
	limit   flowcontrol.RateLimiter
	metrics *metrics

	mu       sync.Mutex
	standing map[key]standing
	sources  map[string]fault // lists and watches that failed, by what they are of
}

// standing is how one object stands.
type standing struct {
	condition condition
	reason    string
}

// fault is a source that failed.
type fault struct {
	err    error
	at     time.Time
	stands func() bool // whether it has not gone on since
}

// sayAgain is how long a source may be silent before the same fault is logged again.
const sayAgain = 2 * time.Minute

// DefaultDiscovery is how often a kind is looked for that the API server lacks.
const DefaultDiscovery = time.Minute

// New checks the configuration.
func New(c Config) (*Distributor, error) {
	if c.Client == nil || c.Namespace == "" || c.Replica == "" || c.Bundle == nil {
		return nil, errors.New("distributing the bundle: Client, Namespace, Replica and Bundle must all be given")
	}
	if c.Discovery == 0 {
		c.Discovery = DefaultDiscovery
	}
	if c.QPS == 0 {
		c.QPS = DefaultQPS
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	m, err := newMetrics(c.Metrics)
	if err != nil {
		return nil, fmt.Errorf("distributing the bundle: metrics: %w", err)
	}
	return &Distributor{
		conf: c, log: c.Log, metrics: m, limit: flowcontrol.NewTokenBucketRateLimiter(c.QPS, int(c.QPS)),
		standing: make(map[key]standing), sources: make(map[string]fault),
	}, nil
}

// Problem is an object that does not carry the bundle, or a source that fails.
type Problem struct {
	Object    string `json:"object"`
	Condition string `json:"condition"` // foreign, conflict, newer, failing
	Reason    string `json:"reason"`
}

// Problems returns what keeps the bundle from somebody, sorted; none if all is
// well or this replica does not lead.
func (d *Distributor) Problems() []Problem {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []Problem
	for k, s := range d.standing {
		if s.condition != current {
			all = append(all, Problem{k.String(), string(s.condition), s.reason})
		}
	}
	for what, f := range d.sources {
		if f.stands() {
			all = append(all, Problem{what, string(failing), f.err.Error()})
		}
	}
	slices.SortFunc(all, func(a, b Problem) int { return strings.Compare(a.Object, b.Object) })
	return all
}

// Run distributes the bundle until ctx is done, and returns nil then.
func (d *Distributor) Run(ctx context.Context) error {
	defer d.forget()
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(d.log.Handler())) // of the informers
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[key](100*time.Millisecond, 30*time.Second))
	w := &watched{d: d, queue: queue}
	if err := w.prepare(); err != nil {
		queue.ShutDown()
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer queue.ShutDown()
	defer cancel()
	broken := make(chan error, 1)
	wg.Go(func() { broken <- w.run(ctx) })
	for range workers {
		wg.Go(func() {
			for {
				k, stop := queue.Get()
				if stop {
					return
				}
				if err := d.sync(ctx, w, k); err != nil && ctx.Err() == nil {
					queue.AddRateLimited(k)
				} else {
					queue.Forget(k)
				}
				queue.Done(k)
			}
		})
	}
	for {
		_, changed := d.conf.Bundle()
		w.enqueueAll()
		select {
		case err := <-broken:
			return err
		case <-changed:
		}
	}
}

// forget takes back what is known, which holds no more when others lead.
func (d *Distributor) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.standing)
	clear(d.sources)
	d.metrics.show(d.standing)
}

// sync brings one object to where it should be. An error means: again, later.
func (d *Distributor) sync(ctx context.Context, w *watched, k key) error {
	bundle, _ := d.conf.Bundle()
	if bundle == nil || len(bundle.Authorities()) == 0 {
		return nil // an empty anchor would cut off everybody; all are enqueued when there is a bundle
	}
	have, wanted, known := w.find(k)
	if !known {
		return nil // it is enqueued when it is
	}
	if have == nil && !wanted {
		d.note(k, unwritten, "")
		return nil
	}
	if k.kind == kindIstio && have != nil && d.is(k, conflict) {
		return nil // until it is gone
	}
	how, why := judge(have, bundle)
	if how == foreign && !wanted {
		d.note(k, unwritten, "") // nobody asked for one here
		return nil
	}
	if how != unwritten {
		d.note(k, how, why)
		return nil
	}
	err := d.write(ctx, k, have, bundle)
	switch {
	case err == nil:
		d.note(k, current, "")
	case gone(err):
		d.note(k, unwritten, "")
		return nil
	case held(err) && k.kind == kindIstio:
		d.note(k, conflict, "another program writes it, istiod as it seems; it is left alone until it is deleted: "+err.Error())
		return nil
	case ctx.Err() == nil && !outrun(err):
		d.note(k, failing, err.Error())
	}
	return err
}

func (d *Distributor) is(k key, c condition) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.standing[k].condition == c
}

// note keeps how an object stands, and logs what is new about it.
func (d *Distributor) note(k key, c condition, reason string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	was := d.standing[k]
	if c == unwritten {
		delete(d.standing, k)
	} else {
		d.standing[k] = standing{c, reason}
	}
	d.metrics.show(d.standing)
	switch {
	case was.condition == c && was.reason == reason:
	case c != current && c != unwritten:
		d.log.Warn("the trust bundle is not distributed", "object", k.String(), "condition", string(c), "reason", reason)
	case was.condition != "" && was.condition != current:
		d.log.Info("the trust bundle is distributed again", "object", k.String())
	}
}
