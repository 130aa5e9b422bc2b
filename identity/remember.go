package identity

import (
	"crypto/sha256"
	"sync"
)

// digest is of every byte of what is remembered.
type digest [sha256.Size]byte

// memo remembers what was found out about bytes that come again and again: values by
// the digest of what they are of. It holds no more than a number, and what was not
// asked for goes first. It may be used by many goroutines.
//
// identity/token has one of its own, since it imports nothing of ours.
type memo[V any] struct {
	most int

	mu         sync.Mutex
	young, old map[digest]V // all go from young to old, and are forgotten there
}

// newMemo returns a memo of at most so many values.
func newMemo[V any](most int) *memo[V] { return &memo[V]{most: most} }

// get returns the value for a digest, and remembers it for longer.
func (m *memo[V]) get(d digest) (V, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.young[d]
	if !ok {
		if v, ok = m.old[d]; ok {
			m.addLocked(d, v)
		}
	}
	return v, ok
}

// add remembers a value.
func (m *memo[V]) add(d digest, v V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addLocked(d, v)
}

func (m *memo[V]) addLocked(d digest, v V) {
	if m.young == nil || len(m.young) >= m.most/2 {
		m.young, m.old = make(map[digest]V), m.young
	}
	m.young[d] = v
}

// len is how many are remembered.
func (m *memo[V]) len() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.young) + len(m.old)
}
