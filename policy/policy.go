package policy

import (
	"cmp"
	"math"
	"strings"
	"time"

	security "istio.io/api/security/v1beta1"
)

// Ref names a policy.
type Ref struct{ Namespace, Name string }

// String returns the namespace and the name, with a slash between them, or "" for
// the zero Ref.
func (r Ref) String() string {
	if r == (Ref{}) {
		return ""
	}
	return r.Namespace + "/" + r.Name
}

// Policy is one PeerAuthentication. Its maps must not be changed once it has been
// given to [New].
type Policy struct {
	Ref
	// Created decides between policies of equal rank: the oldest wins. An object
	// without a creationTimestamp has the zero time and is older than all others,
	// as it is in Istio's order.
	Created time.Time
	// Selector chooses workloads by their labels. None, or an empty one, chooses the
	// whole namespace, or the whole mesh when Namespace is the root namespace.
	Selector map[string]string
	// Mode is Unset where the object has no mtls.
	Mode Mode
	// Ports are the port-level modes. They count only with a Selector.
	Ports map[uint16]Mode
}

// FromAPI converts Istio's type. A mode whose number is not known here becomes
// Unknown, which resolves to Strict. Ports outside 1 to 65535 are left out: no
// connection can have them.
func FromAPI(ref Ref, created time.Time, spec *security.PeerAuthentication) Policy {
	p := Policy{
		Ref:      ref,
		Created:  created,
		Selector: spec.GetSelector().GetMatchLabels(),
		Mode:     modeFromAPI(spec.GetMtls()),
	}
	for port, mtls := range spec.GetPortLevelMtls() {
		if port == 0 || port > math.MaxUint16 {
			continue
		}
		if p.Ports == nil {
			p.Ports = make(map[uint16]Mode, len(spec.GetPortLevelMtls()))
		}
		p.Ports[uint16(port)] = modeFromAPI(mtls)
	}
	return p
}

// modeFromAPI reads a number: the field is an open enum, so that a newer control
// plane can send one that this version has no name for.
func modeFromAPI(mtls *security.PeerAuthentication_MutualTLS) Mode {
	switch mtls.GetMode() {
	case security.PeerAuthentication_MutualTLS_UNSET:
		return Unset
	case security.PeerAuthentication_MutualTLS_DISABLE:
		return Disable
	case security.PeerAuthentication_MutualTLS_PERMISSIVE:
		return Permissive
	case security.PeerAuthentication_MutualTLS_STRICT:
		return Strict
	}
	return Unknown
}

// Compare orders policies of equal rank, the winner first: by age, then by name,
// then by namespace.
func Compare(a, b Policy) int {
	if c := a.Created.Compare(b.Created); c != 0 {
		return c
	}
	return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Namespace, b.Namespace))
}

// Matches reports whether the labels have every pair of the selector. An empty
// selector matches everything.
func Matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
