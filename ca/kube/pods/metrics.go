package pods

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	lookups *prometheus.CounterVec // resource, result
}

// The labels' values are the four resources.
var (
	ageDesc = prometheus.NewDesc("meshca_kube_watch_age_seconds",
		"Time since the API server last said anything on the watch of a resource, which while all is well is little more than a minute; absent before the first list.",
		[]string{"resource"}, nil)
	objectsDesc = prometheus.NewDesc("meshca_kube_objects",
		"Objects of a resource that are known.", []string{"resource"}, nil)
)

func newMetrics(reg prometheus.Registerer, p *Pods) (*metrics, error) {
	m := &metrics{lookups: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshca_kube_lookups_total",
		Help: "Objects that were looked up at the API server because the watch had not reported them, by resource and result (found, not_found, error).",
	}, []string{"resource", "result"})}
	for _, resource := range []string{"pods", "nodes", "serviceaccounts", "namespaces"} {
		for _, result := range []string{"found", "not_found", "error"} {
			m.lookups.WithLabelValues(resource, result)
		}
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.lookups, collector{p}} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// collector shows the tables as they are when somebody looks.
type collector struct{ p *Pods }

func (c collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- ageDesc
	ch <- objectsDesc
}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	for _, s := range c.p.states() {
		ch <- prometheus.MustNewConstMetric(objectsDesc, prometheus.GaugeValue, float64(s.objects), s.resource)
		if s.synced {
			ch <- prometheus.MustNewConstMetric(ageDesc, prometheus.GaugeValue, s.age.Seconds(), s.resource)
		}
	}
}
