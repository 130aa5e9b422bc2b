package agent

import "github.com/prometheus/client_golang/prometheus"

// How a workload of a host is; values of the label state.
const (
	stateServing = "serving" // it has a valid certificate
	stateWaiting = "waiting" // it never had one
	stateRefused = "refused" // the CA will not have it, and there is nothing left to serve
	stateEnded   = "ended"   // its certificate has ended, and no other came
)

// registerGauges adds what is a fact of all workloads together: how many there
// are does not change how many series there are (T15).
func (h *Host) registerGauges(r prometheus.Registerer) error {
	gauge := func(name, help string, f func() float64, labels prometheus.Labels) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, f)
	}
	locked := func(f func() float64) func() float64 {
		return func() float64 {
			h.mu.Lock()
			defer h.mu.Unlock()
			return f()
		}
	}
	collectors := []prometheus.Collector{
		gauge("meshca_agent_svid_alarms",
			"Workloads with less than a quarter of their certificate's lifetime left, or nothing.",
			func() float64 { return h.count(func(a *Agent) bool { _, alarm := a.condition(); return alarm }) }, nil),
		gauge("meshca_agent_bundle_sequence",
			"Sequence of the trust bundle in use; 0 until the CA's stream brought one.",
			locked(func() float64 { return float64(h.sequence) }), nil),
		gauge("meshca_agent_policy_version",
			"Version of the policy in use; 0 while there is none, or none that is known.",
			locked(func() float64 {
				if h.policy == nil {
					return 0
				}
				return float64(h.policy.Version)
			}), nil),
		gauge("meshca_agent_ca_connected",
			"1 while a stream to a CA is open.",
			locked(func() float64 { return number(h.connected) }), nil),
	}
	for _, state := range []string{stateServing, stateWaiting, stateRefused, stateEnded} {
		collectors = append(collectors, gauge("meshca_agent_workloads",
			"Volumes whose workload has a valid certificate (serving), never had one (waiting), is refused by the CA (refused), or has one that ended (ended).",
			func() float64 { return h.count(func(a *Agent) bool { is, _ := a.condition(); return is == state }) },
			prometheus.Labels{"state": state}))
	}
	return register(r, collectors...)
}

func (h *Host) count(f func(*Agent) bool) float64 {
	n := 0.0
	for _, a := range h.all() {
		n += number(f(a))
	}
	return n
}

// condition says how the agent's identity is, and whether somebody should look.
func (a *Agent) condition() (state string, alarm bool) {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.state
	switch {
	case s.valid(now):
		return stateServing, s.term.alarming(now)
	case s.denied != nil:
		return stateRefused, true
	case s.svid != nil:
		return stateEnded, true
	}
	return stateWaiting, false
}
