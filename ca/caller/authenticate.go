package caller

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
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
	// Clusters holds, for issuers of Tokens by URL, what else is known of those
	// whose tokens they are. Tokens of an issuer that is not among them prove an
	// identity for as long as they hold, and nobody is an agent by them.
	Clusters map[string]Cluster
	Now      func() time.Time // nil means time.Now
}

// Cluster is a Kubernetes cluster, whose API server is a token issuer.
type Cluster struct {
	// Liveness, if any, is asked about each token that is good in itself.
	Liveness Liveness
	// Agents are the ServiceAccounts of node agents. A caller that runs under one of
	// them, in a pod on a node, is the agent of that node.
	Agents []ServiceAccount
}

// Liveness knows whether what a token was made for still exists. It is safe for
// concurrent use.
type Liveness interface {
	// Check returns nil if it does. An error that wraps an [*UnavailableError] says
	// that this cannot be told now; every other one, that it does not.
	Check(context.Context, *token.Claims) error
}

// ServiceAccount names one.
type ServiceAccount struct{ Namespace, Name string }

// Authenticator authenticates callers. It is safe for concurrent use.
type Authenticator struct {
	tokens        *token.Verifier
	td            identity.TrustDomain
	byCertificate []identity.ID
	bundles       identity.BundleSource
	clusters      map[string]Cluster
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
	for url, cluster := range c.Clusters {
		if err := cluster.check(c.Tokens, c.TrustDomain, url); err != nil {
			return nil, fmt.Errorf("authenticating callers: cluster of token issuer %q: %w", url, err)
		}
	}
	a := &Authenticator{
		tokens: c.Tokens, td: c.TrustDomain, clusters: maps.Clone(c.Clusters),
		byCertificate: slices.Clone(c.ByCertificate), bundles: c.Bundles, now: c.Now,
	}
	if a.now == nil {
		a.now = time.Now
	}
	return a, nil
}

// check finds mistakes that would leave a cluster's tokens unchecked, or its agents
// unknown, without a word.
func (c Cluster) check(tokens *token.Verifier, td identity.TrustDomain, url string) error {
	if !tokens.Knows(url) {
		return errors.New("no such issuer is configured")
	}
	for _, sa := range c.Agents {
		if _, err := identity.WorkloadID(td, sa.Namespace, sa.Name); err != nil {
			return fmt.Errorf("its agents' service account %q: %w", sa.Namespace+"/"+sa.Name, err)
		}
	}
	return nil
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
	// Claims are those of a token that is good in itself; nil for everything else.
	Claims *token.Claims
	Err    error
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
	cluster := a.clusters[claims.Issuer()] // of the token that was verified, and no other's
	if err := cluster.live(ctx, claims); err != nil {
		return nil, err
	}
	caller := &Caller{
		id: id, method: ByToken, issuer: claims.Issuer(), audience: claims.Audience(),
		tokenID: claims.ID(), peer: c.Peer, expires: claims.Expires(),
	}
	caller.podName, caller.podUID = claims.Pod()
	caller.node, _ = claims.Node()
	account := ServiceAccount{claims.Namespace(), claims.ServiceAccount()}
	caller.agent = caller.podUID != "" && caller.node != "" && slices.Contains(cluster.Agents, account)
	return caller, nil
}

// live asks whether what a token was made for still exists.
func (c Cluster) live(ctx context.Context, claims *token.Claims) error {
	if c.Liveness == nil {
		return nil
	}
	err := c.Liveness.Check(ctx, claims)
	if err == nil {
		return nil
	}
	subject := "system:serviceaccount:" + claims.Namespace() + ":" + claims.ServiceAccount()
	var unavailable *UnavailableError
	if errors.As(err, &unavailable) {
		return &UnavailableError{Err: fmt.Errorf("whether the token of %q is still good: %w", subject, unavailable.Err)}
	}
	return &RefusedError{Subject: subject, Claims: claims, Err: fmt.Errorf("token of %q: %w", subject, err)}
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
