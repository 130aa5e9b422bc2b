package token

import (
	"context"
	"crypto"
	"crypto/sha256"
	"slices"
	"sync"
	"time"
)

// mostRemembered bounds the tokens that are remembered, of about half a KiB each.
const mostRemembered = 32_768

// memo remembers tokens that were good, by the digest of every byte of them: a pod
// shows its token for its first certificate and again to renew it, and the signature
// under it stays what it was. What can change is judged each time: the time, whether
// the issuer still publishes the key, and by others whether the pod lives. The zero
// memo is ready.
type memo struct {
	mu         sync.Mutex
	young, old map[digest]remembered // all go from young to old, and are forgotten there
}

type digest [sha256.Size]byte

type remembered struct {
	claims *Claims
	issuer *issuer
	header *header
	key    crypto.PublicKey // by which it was verified, as the source holds it
}

func (m *memo) get(d digest) (remembered, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.young[d]
	if !ok {
		if r, ok = m.old[d]; ok {
			m.addLocked(d, r)
		}
	}
	return r, ok
}

func (m *memo) add(d digest, r remembered) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addLocked(d, r)
}

func (m *memo) addLocked(d digest, r remembered) {
	if m.young == nil || len(m.young) >= mostRemembered/2 {
		m.young, m.old = make(map[digest]remembered), m.young
	}
	m.young[d] = r
}

// remembered returns the claims of a token that was good before and is now; nil if it
// has to be verified.
func (v *Verifier) remembered(ctx context.Context, d digest, now time.Time) *Claims {
	r, ok := v.memo.get(d)
	if !ok || r.claims.times(now) != nil {
		return nil
	}
	keys, err := r.issuer.keys.Keys(ctx, r.header.kid)
	if err != nil {
		return nil
	}
	published := slices.ContainsFunc(keys, func(k Key) bool {
		return k.ID == r.header.kid && k.Public == r.key && k.allows(r.header.alg)
	})
	if !published {
		return nil
	}
	return r.claims
}
