package server

import (
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/meshca/meshca/wire"
)

type metrics struct {
	requests    *prometheus.CounterVec // outcome
	duration    prometheus.Histogram
	waited      prometheus.Histogram
	repeated    prometheus.Counter
	connections prometheus.Gauge
	refused     prometheus.Counter
	streams     prometheus.Gauge
	acks        *prometheus.CounterVec // result
	servingEnd  prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, q *queue) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_ca_requests_total",
			Help: "Calls to CreateCertificate, by outcome (ok, unauthenticated, permission_denied, invalid_argument, resource_exhausted, unavailable, canceled, internal).",
		}, []string{"outcome"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "meshca_ca_request_duration_seconds",
			Help:    "Duration of calls to CreateCertificate that reached the handler.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}),
		waited: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "meshca_ca_request_wait_seconds",
			Help:    "How long calls to CreateCertificate that were signed for had waited for their turn.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5},
		}),
		repeated: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshca_ca_requests_repeated_total",
			Help: "Calls to CreateCertificate that repeated another and were answered as it was, without a signature.",
		}),
		connections: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshca_ca_connections",
			Help: "Connections that are open.",
		}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshca_ca_connections_refused_total",
			Help: "Connections that were closed at once: too many were open, in all or of their address, or the CA was not ready yet.",
		}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshca_ca_streams",
			Help: "Delta xDS streams that are open.",
		}),
		acks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_ca_stream_acks_total",
			Help: "Agents' answers to xDS resources, by result (ack, nack, stale).",
		}, []string{"result"}),
		servingEnd: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshca_ca_serving_certificate_end_timestamp_seconds",
			Help: "When the CA's own TLS certificate ends, in Unix time.",
		}),
	}
	for _, c := range []codes.Code{codes.OK, codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument, codes.ResourceExhausted, codes.Unavailable, codes.Canceled, codes.Internal} {
		m.requests.WithLabelValues(outcome(c))
	}
	for _, answer := range []wire.Answer{wire.Acked, wire.Nacked, wire.Stale} {
		m.acks.WithLabelValues(string(answer))
	}
	if reg == nil {
		return m, nil
	}
	for c, label := range [classes]string{first: "first", renewal: "renewal"} {
		gauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "meshca_ca_requests_waiting",
			Help:        "Calls to CreateCertificate that wait for their turn, by class (first, renewal).",
			ConstLabels: prometheus.Labels{"class": label},
		}, func() float64 { return float64(q.lengths()[c]) })
		if err := reg.Register(gauge); err != nil {
			return nil, err
		}
	}
	for _, c := range []prometheus.Collector{m.requests, m.duration, m.waited, m.repeated, m.connections, m.refused, m.streams, m.acks, m.servingEnd} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// outcome names a code as a label value, of a closed set.
func outcome(c codes.Code) string {
	switch c {
	case codes.OK:
		return "ok"
	case codes.Unauthenticated:
		return "unauthenticated"
	case codes.PermissionDenied:
		return "permission_denied"
	case codes.InvalidArgument:
		return "invalid_argument"
	case codes.ResourceExhausted:
		return "resource_exhausted"
	case codes.Unavailable, codes.DeadlineExceeded:
		return "unavailable"
	case codes.Canceled:
		return "canceled"
	}
	return "internal"
}
