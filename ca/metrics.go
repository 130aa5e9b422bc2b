package ca

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	signatures *prometheus.CounterVec // kind, result
	upstream   *prometheus.CounterVec // result
	end        prometheus.Gauge
	sequence   prometheus.Gauge
	ready      prometheus.GaugeFunc
}

func newMetrics(reg prometheus.Registerer, ready func() error) (*metrics, error) {
	m := &metrics{
		signatures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_ca_signatures_total",
			Help: "Certificates asked of the authority, by kind (svid, serving, proof) and result (ok, refused, failed).",
		}, []string{"kind", "result"}),
		upstream: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_ca_intermediates_total",
			Help: "Intermediates asked of the upstream authority, by result (ok, failed).",
		}, []string{"result"}),
		end: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshca_ca_intermediate_end_timestamp_seconds",
			Help: "When the active intermediate ends, in Unix time.",
		}),
		sequence: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshca_ca_bundle_sequence",
			Help: "Sequence number of the trust bundle.",
		}),
		ready: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "meshca_ca_ready",
			Help: "1 if the authority can sign now.",
		}, func() float64 {
			if ready() != nil {
				return 0
			}
			return 1
		}),
	}
	// Every series is there from the start: an alert on a counter that has
	// not yet been counted would otherwise see nothing.
	for _, kind := range []Kind{KindSVID, KindServing, KindProof} {
		for _, result := range []string{"ok", "refused", "failed"} {
			m.signatures.WithLabelValues(string(kind), result)
		}
	}
	for _, result := range []string{"ok", "failed"} {
		m.upstream.WithLabelValues(result)
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.signatures, m.upstream, m.end, m.sequence, m.ready} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// signed counts one outcome. Refused is what a caller's key or the clock is to
// blame for, failed what we are.
func (m *metrics) signed(kind Kind, err error) {
	result := "ok"
	var key *KeyError
	switch {
	case errors.As(err, &key):
		result = "refused"
	case err != nil:
		result = "failed"
	}
	m.signatures.WithLabelValues(string(kind), result).Inc()
}

func (m *metrics) upstreamed(err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	m.upstream.WithLabelValues(result).Inc()
}
