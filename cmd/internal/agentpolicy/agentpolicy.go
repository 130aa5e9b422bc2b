// Package agentpolicy lets a proxy obey the policy that the agent hands on: the
// one place where packages sds/client and proxy meet, which do not know of each
// other.
package agentpolicy

import (
	"github.com/meshca/meshca/proxy"
	"github.com/meshca/meshca/sds/client"
)

// Policy is a [proxy.Policy] of what the agent hands on.
type Policy struct{ Agent *client.PolicySource }

// Decide names the PeerAuthentication that decided.
func (p Policy) Decide(port uint16) (proxy.Decision, error) {
	r, err := p.Agent.Policy()
	if err != nil {
		return proxy.Decision{}, err
	}
	return proxy.Decision{Mode: r.ForPort(port), Source: r.SourceForPort(port).String()}, nil
}

// Changed is closed when the next policy is in force.
func (p Policy) Changed() <-chan struct{} { return p.Agent.Changed() }
