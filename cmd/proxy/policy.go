package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/cmd/internal/agentpolicy"
	"github.com/meshca/meshca/proxy"
	"github.com/meshca/meshca/sds/client"
)

// live reports whether the agent is asked for policies. Without an inbound
// listener there is nothing that they could be about.
func (s settings) live() bool { return s.modes == nil && len(s.inbound) > 0 }

// modesFrom says in the log what decides.
func (s settings) modesFrom() string {
	if s.modes == nil {
		return "the agent's policies"
	}
	return "--mode " + s.modes.all.String()
}

// modesOf returns what decides about ports.
func modesOf(s settings, agent *client.PolicySource) proxy.Policy {
	switch {
	case s.modes != nil:
		return s.modes
	case s.live():
		return agentpolicy.Policy{Agent: agent}
	}
	return nil
}

// registerPolicy adds what tells a proxy that is behind from one that is not.
func registerPolicy(metrics prometheus.Registerer, agent *client.PolicySource) error {
	return metrics.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "meshca_proxy_policy_version",
		Help: "Version of the policy in force, as the CA's meshca_policy_version; 0 while there is none, or none that is known.",
	}, func() float64 {
		p, err := agent.Policy()
		if err != nil {
			return 0
		}
		return float64(p.Version)
	}))
}
