package caller

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/token"
)

// Config is what an [Authenticator] is made from.
type Config struct {
	Tokens      *token.Verifier      // required
	TrustDomain identity.TrustDomain // required: of the identities that tokens prove
	// ByCertificate lists the identities that may also be proved by an SVID
	// that has not ended: machines without a source of tokens. Empty means that
	// certificates prove nothing. All must be of TrustDomain.
	ByCertificate []identity.ID
	// Bundles verifies those SVIDs; required if ByCertificate is not empty.
	Bundles identity.BundleSource
	Now     func() time.Time // nil means time.Now
}

// Authenticator authenticates callers. It is safe for concurrent use.
type Authenticator struct {
	tokens        *token.Verifier
	td            identity.TrustDomain
	byCertificate []identity.ID
	bundles       identity.BundleSource
	now           func() time.Time
}

// New checks the configuration and makes an authenticator.
func New(c Config) (*Authenticator, error) {
	if c.Tokens == nil || c.TrustDomain.IsZero() {
		return nil, errors.New("authenticating callers: Tokens and TrustDomain must both be given")
	}
	if len(c.ByCertificate) > 0 && c.Bundles == nil {
		return nil, errors.New("authenticating callers: ByCertificate needs Bundles to verify certificates with")
	}
	for _, id := range c.ByCertificate {
		if id.TrustDomain() != c.TrustDomain || id.Path() == "" {
			return nil, fmt.Errorf("authenticating callers: %q cannot renew by certificate: it is no workload of trust domain %q", id, c.TrustDomain)
		}
	}
	a := &Authenticator{
		tokens: c.Tokens, td: c.TrustDomain,
		byCertificate: slices.Clone(c.ByCertificate), bundles: c.Bundles, now: c.Now,
	}
	if a.now == nil {
		a.now = time.Now
	}
	return a, nil
}

// TakesCertificates reports whether a client certificate can prove anything.
func (a *Authenticator) TakesCertificates() bool { return len(a.byCertificate) > 0 }

// Credentials are what a connection or a call showed. Nothing in them has been
// verified but that the peer holds the first certificate's key.
type Credentials struct {
	Bearer       string              // a token; empty if none was sent
	Certificates []*x509.Certificate // the TLS client's, leaf first
	Peer         string              // the address they came from, for the record; may be empty
}

// RefusedError says that credentials prove nothing here.
type RefusedError struct {
	// Subject is what the credentials name, where that is known for certain
	// although they were refused; mostly empty.
	Subject string
	Err     error
}

func (e *RefusedError) Error() string { return fmt.Sprintf("authenticating the caller: %v", e.Err) }

func (e *RefusedError) Unwrap() error { return e.Err }

// UnavailableError says that it cannot be told now what credentials prove. The
// same ones may be good in a moment, so the caller must not be told to fetch
// others.
type UnavailableError struct{ Err error }

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("authenticating the caller, not possible now: %v", e.Err)
}

func (e *UnavailableError) Unwrap() error { return e.Err }

// Authenticate says who showed the credentials. A token decides alone: a bad
// one is not made good by a certificate, and a bad certificate does not stand
// in the way of a good token. Only without a token is the certificate looked
// at.
//
// The error is a [*RefusedError] or an [*UnavailableError].
func (a *Authenticator) Authenticate(ctx context.Context, c Credentials) (*Caller, error) {
	switch {
	case c.Bearer != "":
		return a.byToken(ctx, c)
	case len(c.Certificates) > 0:
		return a.byCert(c)
	}
	return nil, &RefusedError{Err: errors.New("no token and no client certificate were shown")}
}

func (a *Authenticator) byToken(ctx context.Context, c Credentials) (*Caller, error) {
	claims, err := a.tokens.Verify(ctx, c.Bearer)
	if err != nil {
		var invalid *token.InvalidError
		if errors.As(err, &invalid) {
			return nil, &RefusedError{Subject: invalid.Subject, Err: err}
		}
		// Whatever the verifier could not find out is no statement about the token.
		return nil, &UnavailableError{Err: err}
	}
	id, err := identity.WorkloadID(a.td, claims.Namespace(), claims.ServiceAccount())
	if err != nil {
		return nil, &RefusedError{Err: err}
	}
	caller := &Caller{
		id: id, method: ByToken, issuer: claims.Issuer(), audience: claims.Audience(),
		tokenID: claims.ID(), peer: c.Peer, expires: claims.Expires(),
	}
	caller.podName, caller.podUID = claims.Pod()
	caller.node, _ = claims.Node()
	return caller, nil
}

// byCert renews a listed identity by its own current SVID.
func (a *Authenticator) byCert(c Credentials) (*Caller, error) {
	certs := c.Certificates
	if !a.TakesCertificates() {
		return nil, &RefusedError{Err: errors.New("no token was shown, and client certificates prove nothing here: no identity is listed for renewal by certificate")}
	}
	// What is only claimed is enough to turn somebody away, and costs nothing like
	// a chain of signatures that a stranger chose.
	claimed, err := identity.ClaimedID(certs[0])
	if err != nil {
		return nil, &RefusedError{Err: fmt.Errorf("no token was shown, and the client certificate proves nothing: %w", err)}
	}
	if !slices.Contains(a.byCertificate, claimed) {
		return nil, &RefusedError{Err: fmt.Errorf("no token was shown, and the client certificate claims %s, which is not listed for renewal by certificate", claimed)}
	}
	// The bundle is taken first, and alone: without one nothing is known about
	// the certificate, and no other domain's may vouch for it.
	bundle, err := a.bundles.Bundle(a.td)
	if err != nil {
		return nil, &UnavailableError{Err: err}
	}
	id, err := identity.Verify(certs, identity.Client, bundle, a.now().Round(0))
	if err != nil {
		return nil, &RefusedError{Err: fmt.Errorf("no token was shown, and the client certificate proves nothing: %w", err)}
	}
	end := certs[0].NotAfter
	for _, link := range certs[1:] {
		if link.NotAfter.Before(end) {
			end = link.NotAfter
		}
	}
	return &Caller{id: id, method: ByCertificate, peer: c.Peer, expires: end}, nil
}
