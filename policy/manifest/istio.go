package manifest

import (
	"math"
	"time"

	security "istio.io/api/security/v1beta1"

	"github.com/meshca/meshca/policy"
)

// FromAPI converts Istio's type. A mode whose number is not known here becomes
// Unknown, which resolves to Strict. Ports outside 1 to 65535 are left out: no
// connection can have them.
func FromAPI(ref policy.Ref, created time.Time, spec *security.PeerAuthentication) policy.Policy {
	p := policy.Policy{
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
			p.Ports = make(map[uint16]policy.Mode, len(spec.GetPortLevelMtls()))
		}
		p.Ports[uint16(port)] = modeFromAPI(mtls)
	}
	return p
}

// modeFromAPI reads a number: the field is an open enum, so that a newer control
// plane can send one that this version has no name for.
func modeFromAPI(mtls *security.PeerAuthentication_MutualTLS) policy.Mode {
	switch mtls.GetMode() {
	case security.PeerAuthentication_MutualTLS_UNSET:
		return policy.Unset
	case security.PeerAuthentication_MutualTLS_DISABLE:
		return policy.Disable
	case security.PeerAuthentication_MutualTLS_PERMISSIVE:
		return policy.Permissive
	case security.PeerAuthentication_MutualTLS_STRICT:
		return policy.Strict
	}
	return policy.Unknown
}
