package agent

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Values of the label result of meshca_agent_renewals_total.
const (
	resultOK              = "ok"
	resultUnreachable     = "unreachable"     // no CA gave an answer
	resultUnauthenticated = "unauthenticated" // the token was not taken
	resultDenied          = "denied"          // definite refusal
	resultBusy            = "busy"            // the CA asked to back off
	resultBadAnswer       = "bad_answer"      // no answer survived verification
	resultClock           = "clock"           // the new certificate is not yet valid here
	resultLocal           = "local"           // token or anchor file, or the key
)

func results() []string {
	return []string{
		resultOK, resultUnreachable, resultUnauthenticated, resultDenied,
		resultBusy, resultBadAnswer, resultClock, resultLocal,
	}
}

// metrics are the agent's counters; what is a fact of its state is read from
// there when somebody asks.
type metrics struct {
	renewals *prometheus.CounterVec
	bundles  *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_agent_renewals_total",
			Help: "Rounds of asking the CAs for a certificate, by result.",
		}, []string{"result"}),
		bundles: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_agent_bundle_updates_total",
			Help: "Messages of the CA with bundle and policy, by whether they were taken (ack) or refused, if only in part (nack).",
		}, []string{"result"}),
	}
	for _, result := range results() {
		m.renewals.WithLabelValues(result)
	}
	for _, result := range []string{"ack", "nack"} {
		m.bundles.WithLabelValues(result)
	}
	return m, register(r, m.renewals, m.bundles)
}

// registerGauges adds what is a fact of this one identity.
func (a *Agent) registerGauges(r prometheus.Registerer) error {
	gauge := func(name, help string, f func(*state) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			a.mu.Lock()
			defer a.mu.Unlock()
			return f(&a.state)
		})
	}
	return register(r,
		gauge("meshca_agent_svid_not_after_timestamp_seconds",
			"When the certificate in use ends; 0 while there is none.",
			func(s *state) float64 { return s.unixIfHeld(s.term.end) }),
		gauge("meshca_agent_svid_renew_at_timestamp_seconds",
			"When the certificate in use is to be renewed; 0 while there is none.",
			func(s *state) float64 { return s.unixIfHeld(s.term.renewAt) }),
		gauge("meshca_agent_svid_alarm",
			"1 while less than a quarter of the lifetime is left, or nothing.",
			func(s *state) float64 { return number(s.svid != nil && s.term.alarming(a.now())) }),
		gauge("meshca_agent_bundle_sequence",
			"Sequence of the trust bundle in use; 0 until the CA's stream brought one.",
			func(s *state) float64 { return float64(s.sequence()) }),
		gauge("meshca_agent_policy_version",
			"Version of the policy in use; 0 while there is none, or none that is known.",
			func(s *state) float64 {
				if s.policy == nil {
					return 0
				}
				return float64(s.policy.Version)
			}),
		gauge("meshca_agent_ca_connected",
			"1 while a stream to a CA is open.",
			func(s *state) float64 { return number(s.connected) }),
	)
}

func register(r prometheus.Registerer, collectors ...prometheus.Collector) error {
	for _, c := range collectors {
		if err := r.Register(c); err != nil {
			return fmt.Errorf("agent: registering metrics: %w", err)
		}
	}
	return nil
}

func (s *state) unixIfHeld(t time.Time) float64 {
	if s.svid == nil {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
