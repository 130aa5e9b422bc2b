package jwks

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	loads *prometheus.CounterVec
	good  prometheus.Gauge
}

// register makes the metrics and registers them if there is a registry. The
// issuer's name comes from the configuration, so the label's values are few.
func (m *metrics) register(r prometheus.Registerer, issuer string) error {
	labels := prometheus.Labels{"issuer": issuer}
	m.loads = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name:        "meshca_token_key_loads_total",
		Help:        "Attempts to read a token issuer's public keys, by result (ok, error).",
		ConstLabels: labels,
	}, []string{"result"})
	m.good = prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "meshca_token_keys_read_timestamp_seconds",
		Help:        "When a token issuer's public keys were last read successfully, in seconds since 1970; 0 if never.",
		ConstLabels: labels,
	})
	for _, result := range []string{"ok", "error"} {
		m.loads.WithLabelValues(result)
	}
	if r == nil {
		return nil
	}
	for _, c := range []prometheus.Collector{m.loads, m.good} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}

func (m *metrics) loaded(err error, now time.Time) {
	if err != nil {
		m.loads.WithLabelValues("error").Inc()
		return
	}
	m.loads.WithLabelValues("ok").Inc()
	m.good.Set(float64(now.Unix()))
}
