package state

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/meshca/meshca/identity"
)

// Backup is everything that a namespace needs to become the same authority again,
// the keys of its roots among it.
type Backup struct {
	Warning   string       `json:"warning"`
	Version   int          `json:"version"`
	Taken     time.Time    `json:"taken"`
	Namespace string       `json:"namespace"`
	Marker    Marker       `json:"marker"`
	State     State        `json:"state"`
	Roots     []BackupRoot `json:"roots"`

	td    identity.TrustDomain
	roots []*held
}

// BackupRoot is one root, both parts in PEM.
type BackupRoot struct {
	Number      int    `json:"number"`
	Certificate string `json:"certificate"`
	Key         string `json:"key"`
}

const backupWarning = "this file holds the root key of the trust domain: whoever reads it can be any workload"

// TrustDomain is the domain that the backup is of.
func (b *Backup) TrustDomain() identity.TrustDomain { return b.td }

// TakeBackup reads a namespace. It refuses what the CA itself would refuse: a backup of
// less than the whole is found out when it is needed.
func TakeBackup(ctx context.Context, client typedcorev1.CoreV1Interface, namespace string, now time.Time) (*Backup, error) {
	td, err := domainOf(ctx, client, namespace)
	if err != nil {
		return nil, err
	}
	a := api{client: client, namespace: namespace, td: td}
	text, err := a.readMarker(ctx)
	if err != nil {
		return nil, err
	}
	b := &Backup{Warning: backupWarning, Version: version, Taken: now.UTC().Truncate(time.Second), Namespace: namespace, td: td}
	if b.Marker, err = parseMarker("ConfigMap "+MarkerName, text.text, td); err != nil {
		return nil, err
	}
	for _, m := range b.Marker.Roots {
		h, err := a.wanted(ctx, m)
		if m.Retired && errors.As(err, new(*LostError)) {
			continue
		}
		if err != nil {
			return nil, err
		}
		b.roots = append(b.roots, h)
		b.Roots = append(b.Roots, BackupRoot{Number: h.number, Certificate: string(h.certPEM), Key: string(h.keyPEM)})
	}
	if text, err = a.readState(ctx); err != nil {
		return nil, err
	}
	if !text.found() {
		return nil, &LostError{Namespace: namespace, Object: "ConfigMap " + StateName, Proof: "ConfigMap " + MarkerName}
	}
	b.State, err = parseState("ConfigMap "+StateName, text.text, td, b.Marker)
	return b, err
}

// NothingError says that a namespace holds no CA of ours.
type NothingError struct{ Namespace string }

func (e *NothingError) Error() string {
	return fmt.Sprintf("namespace %q has no ConfigMap %s: no CA has begun its work there, or its marker was deleted", e.Namespace, MarkerName)
}

// domainOf asks the marker which trust domain it is of.
func domainOf(ctx context.Context, client typedcorev1.CoreV1Interface, namespace string) (identity.TrustDomain, error) {
	a := api{client: client, namespace: namespace}
	text, err := a.readMarker(ctx)
	if err != nil {
		return identity.TrustDomain{}, err
	}
	if !text.found() {
		return identity.TrustDomain{}, &NothingError{Namespace: namespace}
	}
	return domainIn("ConfigMap "+MarkerName, []byte(text.text))
}

func domainIn(object string, data []byte) (identity.TrustDomain, error) {
	var head struct {
		TrustDomain string `json:"trust_domain"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return identity.TrustDomain{}, &CorruptError{Object: object, Reason: err.Error()}
	}
	td, err := identity.ParseTrustDomain(head.TrustDomain)
	if err != nil {
		return td, &CorruptError{Object: object, Reason: err.Error()}
	}
	return td, nil
}

// Encode returns the file.
func (b *Backup) Encode() []byte { return encode(b) }

// ParseBackup reads a file that [Backup.Encode] made, and believes nothing in it
// that does not fit the rest.
func ParseBackup(file string, data []byte) (*Backup, error) {
	damaged := func(reason any) error {
		return fmt.Errorf("backup %q is damaged: %v; take another", file, reason)
	}
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, damaged("it is not JSON; was it encrypted?")
	}
	if head.Version > version {
		return nil, &VersionError{Object: "backup " + file, Have: head.Version, Can: version}
	}
	b := new(Backup)
	if err := json.Unmarshal(data, b); err != nil {
		return nil, damaged(err)
	}
	if b.Version != version || !bytes.Equal(b.Encode(), data) {
		return nil, damaged("it is not in the form in which it was written")
	}
	td, err := identity.ParseTrustDomain(b.Marker.TrustDomain)
	if err != nil {
		return nil, damaged(err)
	}
	b.td = td
	if b.Marker, err = parseMarker("marker", string(encode(b.Marker)), td); err != nil {
		return nil, damaged(err)
	}
	if b.State, err = parseState("state", string(encode(b.State)), td, b.Marker); err != nil {
		return nil, damaged(err)
	}
	for _, r := range b.Roots {
		if r.Number < 1 || r.Number > len(b.Marker.Roots) {
			return nil, damaged(fmt.Sprintf("root %d is not in its marker", r.Number))
		}
		h, err := parseRoot(r.Number, []byte(r.Certificate), []byte(r.Key), td)
		if err == nil {
			err = h.matches(b.Marker.Roots[r.Number-1])
		}
		if err != nil {
			return nil, damaged(fmt.Sprintf("root %d: %v", r.Number, err))
		}
		b.roots = append(b.roots, h)
	}
	for _, n := range b.State.Bundle {
		if !slices.ContainsFunc(b.roots, func(h *held) bool { return h.number == n }) {
			return nil, damaged(fmt.Sprintf("root %d is in the bundle, and its key is not there", n))
		}
	}
	return b, nil
}
