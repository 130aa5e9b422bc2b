package state

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

// snapshot is all that was read at one time, and fits together. It is immutable.
type snapshot struct {
	marker Marker
	state  State
	roots  map[int]*held // by number: all that are not retired
	bundle *identity.Bundle
}

func newSnapshot(td identity.TrustDomain, m Marker, s State, roots map[int]*held) (*snapshot, error) {
	var authorities []*x509.Certificate
	for _, n := range s.Bundle {
		authorities = append(authorities, roots[n].cert)
	}
	bundle, err := identity.NewBundle(td, identity.BundleConfig{Sequence: s.Sequence, Authorities: authorities})
	if err != nil {
		return nil, err
	}
	return &snapshot{marker: m, state: s, roots: roots, bundle: bundle}, nil
}

// loader brings a namespace from whatever a crash has left to a whole state; see
// the tables of the package comment.
type loader struct {
	api
	lifetime time.Duration // of a new root
	now      func() time.Time
	anchors  func(context.Context) ([]Anchor, error)
	made     func(*held) // called when a root was made
	adopted  func(*held) // called when one was taken over that somebody else made
	own      *held       // that this replica has tried to make, if it has
}

// Anchor tells of a root from outside of the CA's namespace; see [Config].
type Anchor struct {
	Object      string
	Sequence    uint64
	Authorities []*x509.Certificate // none if what it holds cannot be read
	Forget      string              // how to remove it where its root is not needed any more
}

// fits reports whether the anchor can be of a mesh that has had no root but h.
func (a Anchor) fits(h *held) bool {
	return h != nil && a.Sequence <= 1 && len(a.Authorities) == 1 && a.Authorities[0].Equal(h.cert)
}

// most is how often somebody else may come first before that is an error: each
// time the namespace is one write further.
const most = 8

// load returns what is there, made if nothing was. It can be repeated after
// whatever error.
func (l *loader) load(ctx context.Context) (*snapshot, error) {
	for range most {
		snap, err := l.once(ctx)
		if snap != nil || err != nil && !outrun(err) {
			return snap, err
		}
	}
	return nil, fmt.Errorf("reading the roots in namespace %q: others changed them %d times meanwhile", l.namespace, most)
}

// once returns nil and nil after it has made the first objects, which are then
// to be read like anybody's.
func (l *loader) once(ctx context.Context) (*snapshot, error) {
	// The marker first and the state next: only so does a state that is behind the
	// marker prove that it is an older one.
	storedMarker, err := l.readMarker(ctx)
	if err != nil {
		return nil, err
	}
	if !storedMarker.found() {
		return nil, l.begin(ctx)
	}
	marker, err := parseMarker("ConfigMap "+MarkerName, storedMarker.text, l.td)
	if err != nil {
		return nil, err
	}
	roots := make(map[int]*held)
	for _, m := range marker.Roots {
		if m.Retired {
			continue
		}
		if roots[m.Number], err = l.wanted(ctx, m); err != nil {
			return nil, err
		}
	}
	state, err := l.stateOf(ctx, marker)
	if err != nil {
		return nil, err
	}
	if raised := marker.raised(state); !raised.equal(marker) {
		if err := l.writeMarker(ctx, storedMarker, raised); err != nil {
			return nil, err
		}
		marker = raised
	}
	return newSnapshot(l.td, marker, state, roots)
}

// stateOf reads the state, or makes the one that the marker implies.
func (l *loader) stateOf(ctx context.Context, m Marker) (State, error) {
	s, err := l.readState(ctx)
	if err != nil {
		return State{}, err
	}
	if s.found() {
		return parseState("ConfigMap "+StateName, s.text, l.td, m)
	}
	implied, ok := m.impliedState()
	if !ok {
		return State{}, &LostError{Namespace: l.namespace, Object: "ConfigMap " + StateName, Proof: "ConfigMap " + MarkerName}
	}
	return implied, l.writeState(ctx, s, implied)
}

// begin makes the first root and its marker where there is no marker.
func (l *loader) begin(ctx context.Context) error {
	s, err := l.readState(ctx)
	if err != nil {
		return err
	}
	marker := "ConfigMap " + MarkerName
	if s.found() {
		return &LostError{Namespace: l.namespace, Object: marker, Proof: "ConfigMap " + StateName}
	}
	second, err := l.readRoot(ctx, 2)
	if second != nil || errors.As(err, new(*CorruptError)) {
		return &LostError{Namespace: l.namespace, Object: marker, Proof: "Secret " + SecretName(2)}
	}
	if err != nil {
		return err
	}
	first, err := l.readRoot(ctx, 1)
	if err != nil {
		return err
	}
	lost, err := l.handedOut(ctx, first)
	if err != nil {
		return err
	}
	if lost != nil {
		// Another replica may have come so far since that it hands out its root.
		if again, err := l.readMarker(ctx); err != nil || again.found() {
			return err
		}
		return lost
	}
	if first == nil {
		return l.makeFirst(ctx)
	}
	return l.adopt(ctx, first)
}

// handedOut looks for a root that others believe although the namespace does not
// know it: then the namespace was lost, and not new.
func (l *loader) handedOut(ctx context.Context, first *held) (*LostError, error) {
	if l.anchors == nil {
		return nil, nil
	}
	anchors, err := l.anchors(ctx)
	if err != nil {
		return nil, fmt.Errorf("looking whether there has been a root: %w", err)
	}
	for _, a := range anchors {
		if a.fits(first) {
			continue
		}
		lost := &LostError{Namespace: l.namespace, Object: "Secret " + SecretName(1), Proof: a.Object, Forget: a.Forget}
		if first != nil {
			lost.Object = "ConfigMap " + MarkerName
		}
		return lost, nil
	}
	return nil, nil
}

// adopt makes the marker of a root that is there: of another replica, or of one
// that died. Nothing was signed with it, since that needs the marker. Nothing
// proves either that it is a CA's: whoever may create Secrets in the namespace can
// have put it there beforehand. So it must look like one, and people are told.
func (l *loader) adopt(ctx context.Context, first *held) error {
	if len(first.origin.flaws) > 0 {
		return &PlantedError{Object: "Secret " + SecretName(1), Flaws: first.origin.flaws}
	}
	if err := l.writeMarker(ctx, stored{}, firstMarker(l.td, first.cert)); err != nil {
		return err
	}
	if l.own == nil || !l.own.cert.Equal(first.cert) {
		l.adopted(first)
	}
	return nil
}

// makeFirst makes root 1. Which one is in force is then for the API server to
// say, also where its answer is lost: this one, or that of another replica.
func (l *loader) makeFirst(ctx context.Context) error {
	cert, key, err := ca.NewRoot(ca.RootConfig{TrustDomain: l.td, Lifetime: l.lifetime, Now: l.now})
	if err != nil {
		return err
	}
	keyPEM, err := ca.EncodeRootKey(key)
	if err != nil {
		return err
	}
	h := &held{number: 1, cert: cert, key: key, certPEM: identity.EncodePEM(cert), keyPEM: keyPEM}
	l.own = h
	if err := l.createRoot(ctx, h); err != nil {
		return err
	}
	l.made(h)
	return nil
}
