package sds

import (
	"sync"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
)

// State is everything that the socket serves at one instant. It is immutable:
// neither it nor what it points to may be changed once it has been published.
// The zero State means that nothing is known yet, and callers wait.
type State struct {
	// SVID is the workload's identity; nil while there is none. An SVID whose
	// NotAfter has passed may stay here: the server does not hand it out.
	SVID *identity.SVID
	// Bundle is the trust bundle of the workload's own trust domain; nil while
	// it is unknown.
	Bundle *identity.Bundle
	// Federated are the bundles of other trust domains, in any order. A second
	// one for the same domain, or one for the own domain, is left out.
	Federated []*identity.Bundle
	// Policy is the PeerAuthentication that holds for the workload, resolved; nil
	// while it is unknown. Once there has been one it stays: who is behind must not
	// make a proxy forget.
	Policy *policy.Resolved
	// Denied is the CA's definite refusal of this identity; nil otherwise. The
	// Workload API answers PermissionDenied with it, whatever SVID is left. SDS
	// goes on serving the SVID while it is valid: an Envoy whose certificate
	// vanished would only drop its traffic earlier than its peers demand. The
	// text goes to the log and never to the wire.
	Denied error
}

// Feed carries the current [State] from one publisher to any number of
// readers. Readers see the newest state and may miss those in between. It is
// safe for concurrent use. Use [NewFeed].
type Feed struct {
	mu      sync.Mutex
	state   State
	changed chan struct{}
}

// NewFeed returns a feed that holds the zero [State].
func NewFeed() *Feed { return &Feed{changed: make(chan struct{})} }

// Publish replaces the state and wakes all readers. It never blocks. Whether a
// state may follow the one before (a bundle's sequence must not fall) is for
// the publisher to check.
func (f *Feed) Publish(s State) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = s
	close(f.changed)
	f.changed = make(chan struct{})
}

// State returns the current state, and a channel that is closed at the next
// Publish.
func (f *Feed) State() (State, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state, f.changed
}
