package trust

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics have labels from closed sets only (T15): no namespace is among them.
type metrics struct {
	objects *prometheus.GaugeVec
	writes  *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		objects: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "meshca_trust_objects", Help: "Objects that carry the trust bundle, by how they stand; the leader alone counts them.",
		}, []string{"kind", "condition"}),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_trust_writes_total", Help: "Attempts to write an object that carries the trust bundle.",
		}, []string{"kind", "result"}),
	}
	for _, k := range []kind{kindConfigMap, kindTrustBundle, kindIstio} {
		for _, c := range conditions {
			m.objects.WithLabelValues(string(k), string(c))
		}
		for _, r := range []string{"written", "outrun", "failed"} {
			m.writes.WithLabelValues(string(k), r)
		}
	}
	if r == nil {
		return m, nil
	}
	return m, errors.Join(r.Register(m.objects), r.Register(m.writes))
}

// show counts how all objects stand.
func (m *metrics) show(all map[key]standing) {
	counts := make(map[key]map[condition]int)
	for k, s := range all {
		of := key{kind: k.kind}
		if counts[of] == nil {
			counts[of] = make(map[condition]int)
		}
		counts[of][s.condition]++
	}
	for _, k := range []kind{kindConfigMap, kindTrustBundle, kindIstio} {
		for _, c := range conditions {
			m.objects.WithLabelValues(string(k), string(c)).Set(float64(counts[key{kind: k}][c]))
		}
	}
}
