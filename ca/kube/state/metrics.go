package state

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// cause is what is wrong with the objects in the cluster.
type cause string

const (
	causeUnreachable cause = "unreachable" // the API server does not answer, or says no
	causeMarker      cause = "marker"      // another's, or of a newer program
	causeState       cause = "state"       // likewise, or behind the marker
	causeRoot        cause = "root"        // a Secret holds another root
	causeLost        cause = "lost"        // at the start: see meshca restore
)

var causes = []cause{causeUnreachable, causeMarker, causeState, causeRoot, causeLost}

// metrics have labels from closed sets only (T15).
type metrics struct {
	trouble  *prometheus.GaugeVec
	restored *prometheus.CounterVec
	epoch    prometheus.Gauge
	sequence prometheus.Gauge
	read     prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		trouble: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "meshca_state_trouble", Help: "1 while something is wrong with the root or the shared state in the cluster.",
		}, []string{"cause"}),
		restored: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_state_restored_total", Help: "Objects that were deleted or edited and were put back from memory.",
		}, []string{"object"}),
		epoch: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshca_state_epoch", Help: "Epoch of the shared state that this replica goes by.",
		}),
		sequence: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshca_state_sequence", Help: "Sequence of the bundle in the shared state that this replica goes by.",
		}),
		read: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshca_state_last_read_timestamp_seconds", Help: "When the shared state was last read and found good.",
		}),
	}
	for _, c := range causes {
		m.trouble.WithLabelValues(string(c))
	}
	for _, o := range []string{"root", "marker", "state"} {
		m.restored.WithLabelValues(o)
	}
	if r == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.trouble, m.restored, m.epoch, m.sequence, m.read} {
		errs = append(errs, r.Register(c))
	}
	return m, errors.Join(errs...)
}

// troubles shows which of the causes hold now.
func (m *metrics) troubles(now map[cause]error) {
	for _, c := range causes {
		v := 0.0
		if now[c] != nil {
			v = 1
		}
		m.trouble.WithLabelValues(string(c)).Set(v)
	}
}
