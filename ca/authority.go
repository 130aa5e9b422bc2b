package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/identity"
)

// DefaultIntermediateLifetime is how long an intermediate lives; it is replaced
// at half of that.
const DefaultIntermediateLifetime = 72 * time.Hour

// Config is what an [Authority] is made from.
type Config struct {
	TrustDomain identity.TrustDomain // required
	Upstream    Upstream             // required
	// Roots keeps the bundle if Upstream counts no versions of its roots; nil for one
	// that does.
	Roots RootKeeper
	Audit Auditor // required: nothing is signed without a trail
	Leaf  LeafConfig
	// IntermediateLifetime is what the upstream is asked for; zero means 72 h.
	// It must be at least twice the leaf ceiling: an intermediate is replaced at
	// half of its life, and until then no leaf shall be cut short by its end.
	IntermediateLifetime time.Duration
	// MaySign is asked before each certificate and by [Authority.Ready]: while it
	// returns an error, nothing is signed. A replica that may have missed that
	// another issuer is to be used says so here. It must answer at once; nil means
	// always.
	MaySign func() error
	Now     func() time.Time      // nil means time.Now
	Log     *slog.Logger          // nil means no log
	Metrics prometheus.Registerer // nil means none
}

// Authority signs for one trust domain. Its methods are safe for concurrent
// use; the signing path takes no lock.
type Authority struct {
	td                   identity.TrustDomain
	upstream             Upstream
	roots                RootKeeper // nil if the upstream keeps its roots itself
	audit                Auditor
	leaf                 LeafConfig
	intermediateLifetime time.Duration
	clock                func() time.Time
	maySign              func() error
	log                  *slog.Logger
	metrics              *metrics
	random               io.Reader                     // of serial numbers
	newKey               func() (crypto.Signer, error) // of intermediates

	// Run's own.
	changes Changer         // nil if the upstream is none
	changed <-chan struct{} // of changes
	stale   bool            // the upstream has changed since it was last asked with success
	rooted  <-chan struct{} // of roots; nil, which never is ready, without one

	// Written by Run only; read by anybody.
	active  atomic.Pointer[issuer]
	bundle  atomic.Pointer[bundleState]
	trouble atomic.Pointer[trouble] // with the upstream; nil if there is none
	proof   proofState
}

// bundleState is a bundle with the channel that tells of the next one.
type bundleState struct {
	bundle  *identity.Bundle
	changed chan struct{}
}

// New checks the configuration and returns an authority that cannot sign until
// [Authority.Run] has had an intermediate signed.
func New(c Config) (*Authority, error) {
	if c.TrustDomain.IsZero() || c.Upstream == nil || c.Audit == nil {
		return nil, errors.New("authority: TrustDomain, Upstream and Audit must all be given")
	}
	if err := c.Leaf.complete(); err != nil {
		return nil, fmt.Errorf("authority of %s: %w", c.TrustDomain, err)
	}
	if c.IntermediateLifetime == 0 {
		c.IntermediateLifetime = DefaultIntermediateLifetime
	}
	if c.IntermediateLifetime < 2*c.Leaf.Ceiling {
		return nil, fmt.Errorf("authority of %s: intermediate lifetime %v is too short for leaves of up to %v; it must be at least %v, since an intermediate is replaced at half of its life",
			c.TrustDomain, c.IntermediateLifetime, c.Leaf.Ceiling, 2*c.Leaf.Ceiling)
	}
	a := &Authority{
		td: c.TrustDomain, upstream: c.Upstream, roots: c.Roots, audit: c.Audit, leaf: c.Leaf,
		intermediateLifetime: c.IntermediateLifetime, maySign: c.MaySign,
		clock: c.Now, log: c.Log, random: rand.Reader, newKey: newP256,
	}
	if a.clock == nil {
		a.clock = time.Now
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	a.bundle.Store(&bundleState{changed: make(chan struct{})})
	m, err := newMetrics(c.Metrics, a.Ready)
	if err != nil {
		return nil, fmt.Errorf("authority of %s: metrics: %w", c.TrustDomain, err)
	}
	a.metrics = m
	return a, nil
}

// now is the wall clock: certificates end by it, and a monotonic reading stands
// still while a machine sleeps.
func (a *Authority) now() time.Time { return a.clock().Round(0) }

// TrustDomain returns the domain that the authority signs for.
func (a *Authority) TrustDomain() identity.TrustDomain { return a.td }

// Bundle returns the current bundle, nil before the first intermediate, and a
// channel that is closed when there is another.
func (a *Authority) Bundle() (*identity.Bundle, <-chan struct{}) {
	s := a.bundle.Load()
	return s.bundle, s.changed
}

// Bundles returns the current bundle as a source that vouches for this
// authority's trust domain and no other.
func (a *Authority) Bundles() identity.BundleSource { return bundles{a} }

type bundles struct{ authority *Authority }

// Bundle implements [identity.BundleSource].
func (b bundles) Bundle(td identity.TrustDomain) (*identity.Bundle, error) {
	bundle, _ := b.authority.Bundle()
	return bundle.Bundle(td)
}

// activate puts an issuer into force. Only Run calls it. The bundle goes first:
// nobody may hold a leaf whose root is not to be had yet. Who waits for the
// bundle is told last, and can then have a certificate too.
func (a *Authority) activate(is *issuer) {
	old := a.bundle.Load()
	if old.bundle != is.bundle {
		a.bundle.Store(&bundleState{bundle: is.bundle, changed: make(chan struct{})})
	}
	a.active.Store(is)
	a.metrics.end.Set(float64(is.end.Unix()))
	a.metrics.sequence.Set(float64(is.bundle.Sequence()))
	if old.bundle != is.bundle {
		close(old.changed)
	}
}

// current returns the issuer to sign with.
func (a *Authority) current() (*issuer, error) {
	if a.maySign != nil {
		if err := a.maySign(); err != nil {
			return nil, &NotReadyError{Reason: "it may not sign now", Err: err}
		}
	}
	is := a.active.Load()
	if is == nil {
		return nil, a.noIssuer()
	}
	return is, nil
}

func (a *Authority) noIssuer() error {
	if t := a.trouble.Load(); t != nil {
		return &NotReadyError{Reason: "it has no intermediate yet", Err: t.err}
	}
	return &NotReadyError{Reason: "it has no intermediate yet; one is being made"}
}

// record writes one audit record.
func (a *Authority) record(ctx context.Context, stage Stage, e Event) error {
	e.Time, e.Stage = a.now(), stage
	if err := a.audit.Record(ctx, e); err != nil {
		return &AuditError{Stage: stage, Err: err}
	}
	return nil
}

func (o *order) event(is *issuer, serial *big.Int, v validity) Event {
	e := Event{
		Kind: o.kind, Caller: o.who,
		Serial: fmt.Sprintf("%x", serial), Authority: is.id, Key: o.pub.fingerprint,
		Lifetime: v.lifetime, NotAfter: v.notAfter,
	}
	if o.kind != KindServing {
		e.SPIFFEID = o.id.String()
		return e
	}
	e.Names = append(e.Names, o.names.DNS...)
	for _, ip := range o.names.IPs {
		e.Names = append(e.Names, ip.String())
	}
	return e
}
