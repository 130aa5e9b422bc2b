package caclient

import (
	"maps"
	"sync"
)

// Names is a set of resource names to subscribe to. It may change while a
// stream is open, and outlives streams. The zero value is the empty set. It is
// safe for concurrent use.
type Names struct {
	mu      sync.Mutex
	held    map[string]uint64 // name → which addition brought it
	added   uint64
	changed chan struct{} // closed at the next change; nil until somebody waits
}

// Add subscribes to a name. One that is there already is asked for again:
// whoever added it needs what the CA has to say of it from the start.
func (n *Names) Add(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.held == nil {
		n.held = make(map[string]uint64)
	}
	n.added++
	n.held[name] = n.added
	n.tellLocked()
}

// Remove ends the subscription to a name.
func (n *Names) Remove(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.held[name]; !ok {
		return
	}
	delete(n.held, name)
	n.tellLocked()
}

func (n *Names) tellLocked() {
	if n.changed != nil {
		close(n.changed)
		n.changed = nil
	}
}

func (n *Names) has(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.held[name]
	return ok
}

// snapshot returns the set as it is, and a channel that is closed at the next
// change.
func (n *Names) snapshot() (held map[string]uint64, changed <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.changed == nil {
		n.changed = make(chan struct{})
	}
	return maps.Clone(n.held), n.changed
}
