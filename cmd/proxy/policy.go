package main

import (
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
