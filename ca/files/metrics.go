package files

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// States of an [Upstream], as Report gives them.
const (
	StateOK       = "ok"
	StateRefused  = "refused"  // what lies there now is not used; what was read before is
	StateMissing  = "missing"  // the files are gone; what was read before is used
	StateExpiring = "expiring" // the path ends soon
	StateExpired  = "expired"  // nothing can be signed any more
)

var states = []string{StateOK, StateRefused, StateMissing, StateExpiring, StateExpired}

type metrics struct {
	looks *prometheus.CounterVec
	state *prometheus.GaugeVec
	end   prometheus.Gauge
}

func (m *metrics) register(r prometheus.Registerer) error {
	m.looks = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshca_upstream_files_looks_total",
		Help: "Looks at the CA's files, by what was found (ok, refused, missing); ok is the set in use, or one that came into use.",
	}, []string{"result"})
	m.state = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "meshca_upstream_files_state",
		Help: "1 for the state that the CA's files are in (ok, refused, missing, expiring, expired), 0 for the others.",
	}, []string{"state"})
	m.end = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "meshca_upstream_files_end_timestamp_seconds",
		Help: "When the CA in use, or what is above it, ends, in Unix time.",
	})
	for _, result := range []string{StateOK, StateRefused, StateMissing} {
		m.looks.WithLabelValues(result)
	}
	if r == nil {
		return nil
	}
	for _, c := range []prometheus.Collector{m.looks, m.state, m.end} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}

func (m *metrics) show(state string, end time.Time) {
	for _, s := range states {
		value := 0.0
		if s == state {
			value = 1
		}
		m.state.WithLabelValues(s).Set(value)
	}
	m.end.Set(float64(end.Unix()))
}
