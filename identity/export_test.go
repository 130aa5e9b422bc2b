package identity

import (
	"crypto/x509"
	"time"
)

// SANURIs lets tests feed the parser what crypto/x509 would not let through.
var SANURIs = sanURIs

// Peers is what the other side of a TLS configuration is verified by.
type Peers struct{ *paths }

// NewPeers remembers nobody yet.
func NewPeers(role Role) Peers { return Peers{newPaths(role)} }

// Verify verifies who is not known.
func (p Peers) Verify(certs []*x509.Certificate, bundles BundleSource, now time.Time) (ID, error) {
	return p.verify(certs, bundles, now)
}

// Known says how many are remembered.
func (p Peers) Known() int { return p.known.len() }
