package report

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// Slots is how many replicas can report.
const Slots = 16

const (
	interval      = 5 * time.Second
	slowInterval  = 10 * time.Second
	large         = 64 << 10 // bytes
	abandoned     = time.Minute
	writeTimeout  = 4 * time.Second
	goodbye       = 2 * time.Second // for giving the slot up at the end
	fieldManager  = "meshca-report"
	key           = "report.json"
	labelName     = "meshca.dev/report"
	labelSelector = labelName + "=replica"
)

// SlotName is the name of a slot's ConfigMap, from 1.
func SlotName(n int) string { return "meshca-replica-" + strconv.Itoa(n) }

// Config is what a [Publisher] is made from.
type Config struct {
	Client    typedcorev1.ConfigMapInterface // required: of the CA's own namespace
	Sources   Sources                        // required
	Replica   string                         // required: this replica's pod
	About     Document                       // its TrustDomain, RootNamespace and Agents
	Now       func() time.Time               // nil means time.Now
	Log       *slog.Logger                   // nil means no log
	Intervals time.Duration                  // zero means 5 s
}

// Publisher writes the documents of one replica. Use [New], then [Publisher.Run].
type Publisher struct {
	conf Config
	slot int               // 0: none yet
	have *corev1.ConfigMap // what is in it, as far as we know
	said string            // the last trouble that is in the log
}

// New checks the configuration.
func New(c Config) (*Publisher, error) {
	if s := c.Sources; c.Client == nil || c.Replica == "" || s.Authority == nil || s.Ready == nil || s.Census == nil || s.Pod == nil || s.Policy == nil || s.Problems == nil {
		return nil, errors.New("reporting: Client, Replica and all Sources must be given")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Intervals == 0 {
		c.Intervals = interval
	}
	c.About.Replica, c.About.Began = c.Replica, c.Now().Round(0).UTC()
	return &Publisher{conf: c}, nil
}

// Run reports until ctx is done, gives its slot up and returns nil.
func (p *Publisher) Run(ctx context.Context) error {
	for {
		size, err := p.publish(ctx, p.document())
		if ctx.Err() != nil {
			break
		}
		p.tell(err)
		wait := pause(p.conf.Intervals, size, err)
		timer := time.NewTimer(wait - rand.N(wait/10+1))
		select {
		case <-ctx.Done():
			timer.Stop()
		case <-timer.C:
			continue
		}
		break
	}
	p.leave(context.WithoutCancel(ctx))
	return nil
}

// pause is how long to wait after a document, by its size and what came of it.
func pause(usual time.Duration, size int, err error) time.Duration {
	switch {
	case err != nil:
		return usual / 2 // a document that is missed twice does not count any more
	case size > large:
		return usual * (slowInterval / interval)
	}
	return usual
}

func (p *Publisher) document() *Document {
	return p.conf.Sources.compose(p.conf.About, p.conf.Now().Round(0).UTC())
}

// leave lets the next replica have the slot at once, and readers know that nobody is
// behind it.
func (p *Publisher) leave(ctx context.Context) {
	if p.slot == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, goodbye)
	defer cancel()
	// It is abandoned in a minute otherwise.
	_ = p.put(ctx, []byte(fmt.Sprintf(`{"version":%d,"replica":""}`, version)))
}

// tell logs what is new.
func (p *Publisher) tell(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text == p.said {
		return
	}
	p.said = text
	if err == nil {
		p.conf.Log.Info("what this replica knows can be read by meshca status", "configmap", SlotName(p.slot))
		return
	}
	p.conf.Log.Warn("meshca status does not see this replica; nothing else depends on that", "error", err)
}

// publish writes a document into the replica's slot, or one that it finds.
func (p *Publisher) publish(ctx context.Context, d *Document) (size int, err error) {
	data, err := d.Encode()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if p.slot != 0 {
		err := p.put(ctx, data)
		if err == nil || !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			return len(data), err
		}
		// Somebody else has it, or has removed it.
		p.slot, p.have = 0, nil
	}
	for n := 1; n <= Slots; n++ {
		if taken, err := p.claim(ctx, n, data); taken || err != nil {
			return len(data), err
		}
	}
	return len(data), fmt.Errorf("reporting: all of %s to %s are other replicas'; so many are foreseen", SlotName(1), SlotName(Slots))
}

// claim takes a slot if it is free.
func (p *Publisher) claim(ctx context.Context, n int, data []byte) (taken bool, err error) {
	o, err := p.conf.Client.Get(ctx, SlotName(n), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		o = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: SlotName(n)}}
		fill(o, data)
		o, err = p.conf.Client.Create(ctx, o, metav1.CreateOptions{FieldManager: fieldManager})
		if apierrors.IsAlreadyExists(err) {
			return false, nil
		}
	case err != nil:
		return false, fmt.Errorf("reading ConfigMap %s: %w", SlotName(n), err)
	case !p.free(o):
		return false, nil
	default:
		p.slot, p.have = n, o
		if err = p.put(ctx, data); err == nil {
			return true, nil
		}
		p.slot, p.have = 0, nil
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			return false, nil
		}
		return false, err
	}
	if err != nil {
		return false, fmt.Errorf("creating ConfigMap %s: %w", SlotName(n), err)
	}
	p.slot, p.have = n, o
	return true, nil
}

// free reports whether nobody else reports in a slot.
func (p *Publisher) free(o *corev1.ConfigMap) bool {
	d, err := Parse([]byte(o.Data[key]))
	if err != nil { // of a newer program, or not a report: the API server knows when
		return p.conf.Now().Sub(writtenAt(o, time.Time{})) > abandoned
	}
	return d.Replica == "" || d.Replica == p.conf.Replica || p.conf.Now().Sub(d.Written) > abandoned
}

// put replaces exactly what we know to be there.
func (p *Publisher) put(ctx context.Context, data []byte) error {
	o := p.have.DeepCopy()
	fill(o, data)
	o, err := p.conf.Client.Update(ctx, o, metav1.UpdateOptions{FieldManager: fieldManager})
	if err != nil {
		return fmt.Errorf("updating ConfigMap %s: %w", SlotName(p.slot), err)
	}
	p.have = o
	return nil
}

func fill(o *corev1.ConfigMap, data []byte) {
	if o.Labels == nil {
		o.Labels = make(map[string]string)
	}
	o.Labels["app.kubernetes.io/managed-by"], o.Labels[labelName] = "meshca", "replica"
	o.Data = map[string]string{key: string(data)}
}

// writtenAt is when the API server wrote the document.
func writtenAt(o *corev1.ConfigMap, otherwise time.Time) time.Time {
	at := time.Time{}
	for _, f := range o.ManagedFields {
		if f.Manager == fieldManager && f.Time != nil && f.Time.After(at) {
			at = f.Time.Time
		}
	}
	if at.IsZero() {
		return otherwise
	}
	return at
}
