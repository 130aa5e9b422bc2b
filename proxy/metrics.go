package proxy

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics count what connections became. Their labels come from closed sets.
type metrics struct {
	connections *prometheus.CounterVec
	bytes       *prometheus.CounterVec
	failures    *prometheus.CounterVec
	active      *prometheus.GaugeVec
	acceptFails prometheus.Counter
}

func newMetrics(p *Proxy) (*metrics, error) {
	m := &metrics{
		connections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_proxy_connections_total",
			Help: "Connections that have ended, by direction (inbound, outbound), what protected them (none: nothing was carried) and why they ended.",
		}, []string{"direction", "security", "end"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_proxy_bytes_total",
			Help: "Bytes carried by connections that have ended, without TLS's own, by direction, what protected them, and whether to the app or to the peer.",
		}, []string{"direction", "security", "to"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_proxy_handshake_failures_total",
			Help: "TLS handshakes that failed, by direction and reason.",
		}, []string{"direction", "reason"}),
		active: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "meshca_proxy_connections_active",
			Help: "Connections that are open now, by direction.",
		}, []string{"direction"}),
		acceptFails: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshca_proxy_accept_failures_total",
			Help: "Times that no connection could be accepted because the process or the machine had run out of something.",
		}),
	}
	for _, way := range []direction{inbound, outbound} {
		m.active.WithLabelValues(string(way))
		for _, f := range failures() {
			m.failures.WithLabelValues(string(way), string(f))
		}
	}
	for _, c := range []prometheus.Collector{
		m.connections, m.bytes, m.failures, m.active, m.acceptFails,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "meshca_proxy_svid_not_after_timestamp_seconds",
			Help: "When the certificate in use ends; 0 while there is none.",
		}, func() float64 {
			svid, err := p.conf.Identity.SVID()
			if err != nil || svid == nil {
				return 0
			}
			return float64(svid.NotAfter().Unix())
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "meshca_proxy_ready",
			Help: "1 while the proxy listens and has a certificate that has not ended.",
		}, func() float64 {
			if p.Ready() != nil {
				return 0
			}
			return 1
		}),
	} {
		if err := p.conf.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("proxy: registering metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) ended(way direction, s security, o outcome, toApp, toPeer int64) {
	m.connections.WithLabelValues(string(way), string(s), string(o.end)).Inc()
	if o.failure != "" {
		m.failures.WithLabelValues(string(way), string(o.failure)).Inc()
	}
	if toApp > 0 {
		m.bytes.WithLabelValues(string(way), string(s), "app").Add(float64(toApp))
	}
	if toPeer > 0 {
		m.bytes.WithLabelValues(string(way), string(s), "peer").Add(float64(toPeer))
	}
}
