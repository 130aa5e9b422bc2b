package main

import (
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
		return livePolicy{agent}
	}
	return nil
}

// livePolicy is a [proxy.Policy] of what the agent hands on.
type livePolicy struct{ agent *client.PolicySource }

// Decide names the PeerAuthentication that decided.
func (l livePolicy) Decide(port uint16) (proxy.Decision, error) {
	r, err := l.agent.Policy()
	if err != nil {
		return proxy.Decision{}, err
	}
	return proxy.Decision{Mode: r.ForPort(port), Source: r.SourceForPort(port).String()}, nil
}

// Changed is closed when the next policy is in force.
func (l livePolicy) Changed() <-chan struct{} { return l.agent.Changed() }
