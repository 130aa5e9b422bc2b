package identity

import (
	"crypto/tls"
	"errors"
	"fmt"
	"time"
)

// Authorize decides whether a peer whose certificates have been verified may go
// on. It returns nil for yes, and otherwise the reason, for our log.
//
// crypto/tls asks before the peer has proved that it holds the certificate's
// key; that comes next and ends the handshake if it fails. So an Authorize
// judges and does nothing else: it must not note down that the peer was here.
type Authorize func(ID) error

// AuthorizeAny lets every verified peer pass. The peer is still a member of a
// trust domain whose bundle the configuration holds.
func AuthorizeAny() Authorize { return func(ID) error { return nil } }

// AuthorizeIDs lets exactly the listed IDs pass; an empty list lets nobody.
func AuthorizeIDs(ids ...ID) Authorize {
	return func(peer ID) error {
		for _, id := range ids {
			if id == peer {
				return nil
			}
		}
		return fmt.Errorf("peer is %s; expected %q", peer, ids)
	}
}

// AuthorizeTrustDomain lets every member of td pass.
func AuthorizeTrustDomain(td TrustDomain) Authorize {
	return func(peer ID) error {
		if peer.TrustDomain() == td {
			return nil
		}
		return fmt.Errorf("peer %s is not of trust domain %q", peer, td)
	}
}

// TLSConfig is what [ServerTLS] and [ClientTLS] are made from. Every field but
// NextProtos is required.
type TLSConfig struct {
	SVIDs      SVIDSource   // whom to be; asked at each handshake
	Bundles    BundleSource // whom to believe; asked at each handshake
	Authorize  Authorize    // whom to let pass among the believed
	Now        func() time.Time
	NextProtos []string // ALPN
}

func (c *TLSConfig) validate() error {
	if c.SVIDs == nil || c.Bundles == nil || c.Authorize == nil || c.Now == nil {
		return errors.New("TLS configuration: SVIDs, Bundles, Authorize and Now must all be given")
	}
	return nil
}

// ServerTLS returns the mutual-TLS configuration for the accepting side: TLS
// 1.3, a client certificate required and verified as an X509-SVID, tickets off.
//
// The peer is judged in VerifyConnection, which crypto/tls calls on every
// handshake, resumed ones included; VerifyPeerCertificate is not called when a
// session is resumed, and more than one mesh has served a removed identity
// that way (CVE-2022-21654, SPIRE before 1.14.3). Tickets are off besides, so
// that a session never outlives the SVIDs that opened it.
//
// Use [PeerID] to learn who the peer is.
func ServerTLS(c TLSConfig) (*tls.Config, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             c.NextProtos,
		SessionTicketsDisabled: true,
		// crypto/tls must only insist on a certificate: its own verification
		// wants host names and knows one pool of roots for all trust domains.
		ClientAuth: tls.RequireAnyClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return c.certificate()
		},
		VerifyConnection: c.verifier(Client),
	}, nil
}

// ClientTLS returns the mutual-TLS configuration for the dialling side; see
// [ServerTLS]. The server's name is not looked at: its SPIFFE ID is.
func ClientTLS(c TLSConfig) (*tls.Config, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             c.NextProtos,
		SessionTicketsDisabled: true,
		// Not insecure: it turns off the check of host names only, and
		// VerifyConnection below does the X509-SVID's in its place.
		InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return c.certificate()
		},
		VerifyConnection: c.verifier(Server),
	}, nil
}

func (c *TLSConfig) certificate() (*tls.Certificate, error) {
	svid, err := c.SVIDs.SVID()
	if err != nil {
		return nil, fmt.Errorf("no SVID to present: %w", err)
	}
	if svid == nil {
		return nil, errors.New("no SVID to present: its source has none and does not say why")
	}
	return &svid.tls, nil
}

// verifier returns the check of a peer that stands on the given side.
func (c *TLSConfig) verifier(peer Role) func(tls.ConnectionState) error {
	bundles, authorize, now := c.Bundles, c.Authorize, c.Now
	known := newPaths(peer)
	return func(cs tls.ConnectionState) error {
		id, err := known.verify(cs.PeerCertificates, bundles, now())
		if err != nil {
			return err
		}
		if err := authorize(id); err != nil {
			return &VerifyError{ID: id, Err: err}
		}
		return nil
	}
}

// PeerID returns the ID of the other end of a finished handshake that was made
// with [ServerTLS] or [ClientTLS]. It fails on a connection without a peer
// certificate. It verifies nothing again: on a connection made with other
// configurations its answer proves nothing.
func PeerID(cs tls.ConnectionState) (ID, error) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return ID{}, errors.New("the connection has no verified peer certificate")
	}
	return leafID(cs.PeerCertificates[0])
}
