package ca

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"time"

	"github.com/meshca/meshca/identity"
)

// Limits and defaults of a leaf's life.
const (
	DefaultLeafLifetime = time.Hour
	DefaultLeafFloor    = 5 * time.Minute
	DefaultLeafCeiling  = 24 * time.Hour
	TestLeafFloor       = 10 * time.Second // with [LeafConfig.TestLifetimes]

	// Backdate is how far before its issue a certificate begins, so that a peer
	// whose clock is a little behind believes it.
	Backdate = 2 * time.Minute
)

// LeafConfig bounds the life of leaves. Zero fields take the defaults.
type LeafConfig struct {
	Lifetime time.Duration // for a caller that asks for none; 1 h
	Floor    time.Duration // less than this is raised to it; 5 min
	Ceiling  time.Duration // more than this is lowered to it; 24 h
	// TestLifetimes lets Floor be as low as 10 s, and makes that its default.
	// It is for demonstrations and tests: such certificates do not outlive a
	// short hiccup of the CA.
	TestLifetimes bool
}

func (c *LeafConfig) complete() error {
	least := DefaultLeafFloor
	if c.TestLifetimes {
		least = TestLeafFloor
	}
	if c.Floor == 0 {
		c.Floor = least
	}
	if c.Ceiling == 0 {
		c.Ceiling = DefaultLeafCeiling
	}
	if c.Lifetime == 0 {
		c.Lifetime = min(max(DefaultLeafLifetime, c.Floor), c.Ceiling)
	}
	switch {
	case c.Floor < least:
		return fmt.Errorf("leaf floor %v is below %v", c.Floor, least)
	case c.Ceiling > DefaultLeafCeiling:
		return fmt.Errorf("leaf ceiling %v is above %v", c.Ceiling, DefaultLeafCeiling)
	case c.Floor > c.Ceiling:
		return fmt.Errorf("leaf floor %v is above the ceiling %v", c.Floor, c.Ceiling)
	case c.Lifetime < c.Floor || c.Lifetime > c.Ceiling:
		return fmt.Errorf("leaf lifetime %v is not between the floor %v and the ceiling %v", c.Lifetime, c.Floor, c.Ceiling)
	}
	return nil
}

// clamp turns the lifetime that somebody asks for into the one that is given:
// nothing or less means the default, and the limits hold. X.509 counts whole
// seconds.
func (c *LeafConfig) clamp(asked time.Duration) time.Duration {
	if asked <= 0 {
		return c.Lifetime
	}
	return max(min(asked, c.Ceiling), c.Floor).Truncate(time.Second)
}

// leastLeft is what a leaf of this lifetime must have left when its issuer ends
// early: below that its holder could not renew it in time.
func leastLeft(lifetime time.Duration) time.Duration {
	return min(5*time.Minute, lifetime/4)
}

// validity is the time from NotBefore to NotAfter, both in whole seconds.
type validity struct {
	notBefore, notAfter time.Time
	lifetime            time.Duration // from issue to notAfter
}

// validityAt gives a leaf that is issued at now its life under an issuer: never
// beyond the issuer's on either side. ok is false if what is left is too short.
func validityAt(now time.Time, lifetime time.Duration, issuerBegin, issuerEnd time.Time) (v validity, ok bool) {
	now = now.UTC().Truncate(time.Second)
	v.notBefore = now.Add(-Backdate)
	if v.notBefore.Before(issuerBegin) {
		v.notBefore = issuerBegin
	}
	v.notAfter = now.Add(lifetime)
	if v.notAfter.After(issuerEnd) {
		v.notAfter = issuerEnd
	}
	v.lifetime = v.notAfter.Sub(now)
	return v, v.lifetime >= leastLeft(lifetime)
}

// newSerial draws a serial number: 16 random bytes with the top bit clear (so
// that the DER is 16 bytes at most, and positive), and not zero. 127 random
// bits need no memory of what was given before.
func newSerial(random io.Reader) (*big.Int, error) {
	for range 4 {
		var b [16]byte
		if _, err := io.ReadFull(random, b[:]); err != nil {
			return nil, fmt.Errorf("drawing a serial number: %w", err)
		}
		b[0] &= 0x7f
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n, nil
		}
	}
	return nil, errors.New("drawing a serial number: the random source yields only zeros")
}

// NewSerial draws a serial number for a certificate.
func NewSerial() (*big.Int, error) { return newSerial(rand.Reader) }

// svidTemplate is the whole of what an X509-SVID may contain (X509-SVID §2–§4).
// Nothing of it comes from a request but the public key: the ID is the
// caller's, and the rest is fixed. The subject is empty, which makes
// crypto/x509 mark the subject alternative name critical (RFC 5280 §4.2.1.6).
func svidTemplate(id identity.ID, pub publicKey, serial *big.Int, v validity) *x509.Certificate {
	t := leafTemplate(pub, serial, v)
	t.URIs = []*url.URL{id.SPIFFE().URL()}
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	return t
}

// servingTemplate is the CA's own TLS certificate: names of hosts, for servers
// only, and no SPIFFE ID, so that it proves no identity of the mesh.
func servingTemplate(names ServingNames, pub publicKey, serial *big.Int, v validity) *x509.Certificate {
	t := leafTemplate(pub, serial, v)
	t.DNSNames = names.DNS
	t.IPAddresses = names.IPs
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	return t
}

func leafTemplate(pub publicKey, serial *big.Int, v validity) *x509.Certificate {
	usage := x509.KeyUsageDigitalSignature
	if _, ok := pub.key.(*rsa.PublicKey); ok {
		usage |= x509.KeyUsageKeyEncipherment // means something for RSA keys only
	}
	return &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             v.notBefore,
		NotAfter:              v.notAfter,
		KeyUsage:              usage,
		SubjectKeyId:          pub.id,
		BasicConstraintsValid: true,
	}
}
