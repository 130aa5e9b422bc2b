package state

import (
	"context"
	"crypto/x509"
	"errors"

	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/meshca/meshca/identity"
)

// Inspection is what a namespace holds, judged as the CA judges it. It has no key.
type Inspection struct {
	TrustDomain identity.TrustDomain
	Marker      Marker
	State       State
	// Bundle is what the state says is to be believed, nil where a root could not be
	// read.
	Bundle *identity.Bundle
	// Changeable names the Secrets of roots that somebody could edit.
	Changeable []string
}

// RootsError says that marker and state fit, and roots could not be judged.
type RootsError struct{ Err error }

func (e *RootsError) Error() string { return e.Err.Error() }
func (e *RootsError) Unwrap() error { return e.Err }

// Inspect reads a namespace and writes nothing. Where marker and state can be read
// and fit, the inspection is there even with an error, which is a [*RootsError].
func Inspect(ctx context.Context, client typedcorev1.CoreV1Interface, namespace string) (*Inspection, error) {
	td, err := domainOf(ctx, client, namespace)
	if err != nil {
		return nil, err
	}
	a := api{client: client, namespace: namespace, td: td}
	in := &Inspection{TrustDomain: td}
	text, err := a.readMarker(ctx)
	if err != nil {
		return nil, err
	}
	if in.Marker, err = parseMarker("ConfigMap "+MarkerName, text.text, td); err != nil {
		return nil, err
	}
	if text, err = a.readState(ctx); err != nil {
		return nil, err
	}
	if !text.found() {
		return nil, &LostError{Namespace: namespace, Object: "ConfigMap " + StateName, Proof: "ConfigMap " + MarkerName}
	}
	if in.State, err = parseState("ConfigMap "+StateName, text.text, td, in.Marker); err != nil {
		return nil, err
	}
	if err := in.roots(ctx, &a); err != nil {
		return in, &RootsError{err}
	}
	return in, nil
}

// ReadMarker returns the marker alone, for where the rest does not fit.
func ReadMarker(ctx context.Context, client typedcorev1.CoreV1Interface, namespace string) (Marker, error) {
	td, err := domainOf(ctx, client, namespace)
	if err != nil {
		return Marker{}, err
	}
	a := api{client: client, namespace: namespace, td: td}
	text, err := a.readMarker(ctx)
	if err != nil {
		return Marker{}, err
	}
	return parseMarker("ConfigMap "+MarkerName, text.text, td)
}

// roots judges the Secrets, and makes the bundle of their certificates.
func (in *Inspection) roots(ctx context.Context, a *api) error {
	certificates := make(map[int]*x509.Certificate)
	for _, m := range in.Marker.Roots {
		h, err := a.wanted(ctx, m)
		if m.Retired && errors.As(err, new(*LostError)) {
			continue
		}
		if err != nil {
			return err
		}
		certificates[m.Number] = h.cert
		if h.changeable {
			in.Changeable = append(in.Changeable, SecretName(m.Number))
		}
	}
	var authorities []*x509.Certificate
	for _, n := range in.State.Bundle {
		authorities = append(authorities, certificates[n])
	}
	var err error
	in.Bundle, err = identity.NewBundle(a.td, identity.BundleConfig{Sequence: in.State.Sequence, Authorities: authorities})
	return err
}
