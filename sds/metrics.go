package sds

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// consumer is the kind of call that somebody takes secrets with.
type consumer string

const (
	consumerSotW     consumer = "sds_sotw"
	consumerDelta    consumer = "sds_delta"
	consumerFetch    consumer = "sds_fetch"
	consumerSVID     consumer = "x509_svid"
	consumerBundles  consumer = "x509_bundles"
	consumerWorkload consumer = "workload"
)

// result is what became of a response.
type result string

const (
	resultSent         result = "sent"
	resultAcknowledged result = "acknowledged"
	resultRejected     result = "rejected" // a NACK
	resultStale        result = "stale"    // an answer to a response that is not the last one
)

// refusal is why a call or a connection got nothing.
type refusal string

const (
	refusedHeader      refusal = "header"      // without workload.spiffe.io: true
	refusedStreams     refusal = "streams"     // too many calls at once
	refusedRate        refusal = "rate"        // too many calls in a short time
	refusedConnections refusal = "connections" // too many connections at once
	refusedRequest     refusal = "request"     // a malformed or boundless request
	refusedDenied      refusal = "denied"      // the CA refused this identity
	refusedNotReady    refusal = "not_ready"   // no SVID, or none that is still valid
	refusedSlow        refusal = "slow"        // the first request was not there in time
	refusedPanic       refusal = "panic"       // a bug of ours
)

// metrics have labels from closed sets only: nothing that a client sends
// becomes a label (T15).
type metrics struct {
	responses *prometheus.CounterVec
	streams   *prometheus.GaugeVec
	refused   *prometheus.CounterVec
	slowed    prometheus.Counter
}

// newMetrics registers the metrics, or joins those that another server of the
// same process has registered: a node's agent has one server for each pod.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		responses: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_sds_responses_total",
			Help: "Responses with secrets, and what clients said of them, by kind of consumer and result.",
		}, []string{"kind", "result"}),
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "meshca_sds_streams",
			Help: "Open streams on the agent's sockets, by kind of consumer.",
		}, []string{"kind"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_sds_refused_total",
			Help: "Calls and connections that ended without what they asked for, by reason.",
		}, []string{"reason"}),
		slowed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshca_sds_slowed_streams_total",
			Help: "Streams that were slowed down because their requests came too fast.",
		}),
	}
	if err := errors.Join(join(r, &m.responses), join(r, &m.streams), join(r, &m.refused), join(r, &m.slowed)); err != nil {
		return nil, fmt.Errorf("registering the metrics of SDS: %w", err)
	}
	return m, nil
}

// join registers *c, or puts in its place the equal collector that is there.
func join[C prometheus.Collector](r prometheus.Registerer, c *C) error {
	err := r.Register(*c)
	var there prometheus.AlreadyRegisteredError
	if errors.As(err, &there) {
		if existing, ok := there.ExistingCollector.(C); ok {
			*c = existing
			return nil
		}
	}
	return err
}

func (m *metrics) response(k consumer, r result) {
	m.responses.WithLabelValues(string(k), string(r)).Inc()
}

func (m *metrics) refuse(r refusal) { m.refused.WithLabelValues(string(r)).Inc() }
