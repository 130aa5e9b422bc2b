package csi

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics have labels from closed sets only: methods of the protocol, and codes
// of gRPC.
type metrics struct {
	calls   *prometheus.CounterVec
	first   prometheus.Histogram
	unsaved prometheus.Counter
}

func newMetrics(r prometheus.Registerer, p *Plugin) (*metrics, error) {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_csi_calls_total",
			Help: "Calls of the kubelet, by method and gRPC code.",
		}, []string{"method", "code"}),
		first: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "meshca_csi_first_svid_seconds",
			Help:    "From the kubelet's first call for a volume to its first certificate; volumes published without one are not in it.",
			Buckets: []float64{0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 3},
		}),
		unsaved: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshca_csi_unsaved_volumes_total",
			Help: "Times that a volume could not be written down for the next process.",
		}),
	}
	for _, c := range []prometheus.Collector{
		m.calls, m.first, m.unsaved,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "meshca_csi_volumes",
			Help: "Volumes that are served.",
		}, func() float64 { return float64(p.count()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "meshca_csi_registered",
			Help: "1 once the kubelet has registered the plugin.",
		}, func() float64 {
			if p.registry.ready() != nil {
				return 0
			}
			return 1
		}),
	} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("CSI plugin: registering metrics: %w", err)
		}
	}
	return m, nil
}
