package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"time"
	"weak"
)

// mostPaths bounds the peers that are remembered, of about 200 bytes each.
const mostPaths = 4096

// paths remembers the certificates of peers that were believed, for one role. A peer
// connects again and again with the same ones, and what signed them stays what it was:
// two signatures of the three that its handshake would have checked. What can change
// is judged each time: the time, the bundle, and by others whether the ID may pass. That
// the peer holds the leaf's key, crypto/tls has it prove in every handshake.
type paths struct {
	role  Role
	known *memo[path]
}

// path says that certificates lead to an authority of a bundle from an instant until
// another, both included.
type path struct {
	id          ID
	bundle      weak.Pointer[Bundle] // bundles are immutable: another one is another answer
	from, until time.Time
}

func newPaths(role Role) *paths { return &paths{role: role, known: newMemo[path](mostPaths)} }

// verify is [Verify]. Certificates that were refused are not remembered.
func (p *paths) verify(certs []*x509.Certificate, bundles BundleSource, now time.Time) (ID, error) {
	if err := checkChainCost(certs); err != nil {
		return ID{}, &VerifyError{Err: err}
	}
	d := digestOf(certs)
	if known, ok := p.known.get(d); ok && !now.Before(known.from) && !now.After(known.until) {
		// An error is told by whoever verifies anew.
		if b, err := bundles.Bundle(known.id.TrustDomain()); err == nil && b != nil && weak.Make(b) == known.bundle {
			return known.id, nil
		}
	}
	found, err := verifyBounded(certs, p.role, bundles, now)
	if err != nil {
		return ID{}, err
	}
	next := path{id: found.id, bundle: weak.Make(found.bundle)}
	for i, c := range found.chains[0] {
		if i == 0 || c.NotBefore.After(next.from) {
			next.from = c.NotBefore
		}
		if i == 0 || c.NotAfter.Before(next.until) {
			next.until = c.NotAfter
		}
	}
	p.known.add(d, next)
	return found.id, nil
}

// digestOf is of all that a peer showed, in its order.
func digestOf(certs []*x509.Certificate) (d digest) {
	h := sha256.New()
	var length [8]byte
	for _, c := range certs {
		binary.BigEndian.PutUint64(length[:], uint64(len(c.Raw)))
		h.Write(length[:])
		h.Write(c.Raw)
	}
	h.Sum(d[:0])
	return d
}
