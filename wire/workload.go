package wire

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/wire/meshcav1"
)

// TypeURL is the type under which a [Workload] is subscribed to over ADS.
const TypeURL = "type.googleapis.com/meshca.v1.Workload"

// What one resource may hold, checked before it is looked at.
const (
	maxAuthority  = 16 << 10 // bytes of one authority's certificate
	maxPorts      = 1 << 16  // with a mode of their own: as many as a policy can name
	maxSourceName = 253      // bytes of a namespace or a name, as the API server has it
)

// Workload is what is said about one workload, checked for what can be seen from
// the message alone.
type Workload struct {
	ID identity.ID
	// Bundle is of the workload's own trust domain and has at least one authority.
	Bundle *identity.Bundle
	// Policy is nil where the sender does not know it.
	Policy *policy.Resolved
	// RenewAt is when the CA would like the certificate to be renewed; zero if
	// it has no wish.
	RenewAt time.Time
}

// Marshal encodes the workload, equal ones equally. The hash is of all that it
// says, for use in a version.
func (w Workload) Marshal() (resource *anypb.Any, hash [sha256.Size]byte, err error) {
	msg := &meshcav1.Workload{
		SpiffeId: w.ID.String(),
		Bundle:   &meshcav1.Bundle{TrustDomain: w.Bundle.TrustDomain().String(), Sequence: w.Bundle.Sequence()},
	}
	for _, a := range w.Bundle.Authorities() {
		msg.Bundle.X509Authorities = append(msg.Bundle.X509Authorities, a.Raw)
	}
	if w.Policy != nil {
		msg.Policy = encodePolicy(*w.Policy)
	}
	if !w.RenewAt.IsZero() {
		msg.RenewAt = timestamppb.New(w.RenewAt)
	}
	content, err := proto.MarshalOptions{Deterministic: true}.Marshal(msg)
	if err != nil {
		return nil, hash, fmt.Errorf("encoding the resource of %s: %w", w.ID, err)
	}
	return &anypb.Any{TypeUrl: TypeURL, Value: content}, sha256.Sum256(content), nil
}

func encodePolicy(r policy.Resolved) *meshcav1.Policy {
	msg := &meshcav1.Policy{Version: r.Version, WorkloadVersion: r.WorkloadVersion, Mode: encodeMode(r.Mode), Source: encodeSource(r.Source)}
	ref, ports := r.PortLevel()
	if len(ports) == 0 {
		return msg
	}
	msg.PortsSource = encodeSource(policy.Source{Level: policy.LevelPort, Policy: ref})
	for _, port := range slices.Sorted(maps.Keys(ports)) {
		msg.Ports = append(msg.Ports, &meshcav1.Port{Number: uint32(port), Mode: encodeMode(ports[port])})
	}
	return msg
}

func encodeMode(m policy.Mode) meshcav1.Mode {
	switch m {
	case policy.Permissive:
		return meshcav1.Mode_MODE_PERMISSIVE
	case policy.Disable:
		return meshcav1.Mode_MODE_DISABLE
	}
	return meshcav1.Mode_MODE_STRICT
}

func encodeSource(s policy.Source) *meshcav1.Source {
	return &meshcav1.Source{Level: string(s.Level), Namespace: s.Policy.Namespace, Name: s.Policy.Name}
}

// Parse turns a resource as it came into nouns of ours. td is the only trust
// domain that is taken.
func Parse(td identity.TrustDomain, resource *anypb.Any) (Workload, error) {
	if resource == nil {
		return Workload{}, errors.New("it has no content")
	}
	if resource.GetTypeUrl() != TypeURL {
		return Workload{}, fmt.Errorf("it is of type %.256q, not %q", resource.GetTypeUrl(), TypeURL)
	}
	var msg meshcav1.Workload
	if err := proto.Unmarshal(resource.GetValue(), &msg); err != nil {
		return Workload{}, fmt.Errorf("it cannot be decoded: %w", err)
	}
	id, err := identity.ParseID(msg.GetSpiffeId())
	if err != nil {
		return Workload{}, err
	}
	if id.TrustDomain() != td || id.Path() == "" {
		return Workload{}, fmt.Errorf("%s is no workload of trust domain %q", id, td)
	}
	bundle, err := parseBundle(td, msg.GetBundle())
	if err != nil {
		return Workload{}, err
	}
	w := Workload{ID: id, Bundle: bundle}
	if p := msg.GetPolicy(); p != nil {
		if w.Policy, err = parsePolicy(p); err != nil {
			return Workload{}, err
		}
	}
	if at := msg.GetRenewAt(); at != nil {
		if err := at.CheckValid(); err != nil {
			return Workload{}, fmt.Errorf("renew_at: %w", err)
		}
		w.RenewAt = at.AsTime()
	}
	return w, nil
}

func parseBundle(td identity.TrustDomain, msg *meshcav1.Bundle) (*identity.Bundle, error) {
	if name := msg.GetTrustDomain(); name != td.String() {
		return nil, fmt.Errorf("the bundle is of trust domain %.256q, not %q", name, td)
	}
	raw := msg.GetX509Authorities()
	if len(raw) == 0 {
		// Legal for a bundle, and it would mean to trust nobody: too much to
		// take from one message.
		return nil, fmt.Errorf("the bundle of %s, sequence %d, has no authorities", td, msg.GetSequence())
	}
	if len(raw) > identity.MaxBundleAuthorities {
		return nil, fmt.Errorf("the bundle of %s has %d authorities; at most %d are taken", td, len(raw), identity.MaxBundleAuthorities)
	}
	conf := identity.BundleConfig{Sequence: msg.GetSequence()}
	for i, der := range raw {
		if len(der) > maxAuthority {
			return nil, fmt.Errorf("authority %d of the bundle of %s has %d bytes; at most %d are taken", i+1, td, len(der), maxAuthority)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("authority %d of the bundle of %s: %w", i+1, td, err)
		}
		conf.Authorities = append(conf.Authorities, c)
	}
	return identity.NewBundle(td, conf)
}

// parsePolicy refuses a policy that cannot be what it says. A mode that is not
// known is not among those: it may be a newer version's, and is STRICT.
func parsePolicy(msg *meshcav1.Policy) (*policy.Resolved, error) {
	if msg.GetVersion() == 0 {
		// The sender does not know the policies. What else it says is not looked at.
		unresolved := policy.Unresolved()
		return &unresolved, nil
	}
	if n := len(msg.GetPorts()); n > maxPorts {
		return nil, fmt.Errorf("the policy, version %d, names %d ports; at most %d are taken", msg.GetVersion(), n, maxPorts)
	}
	var ports map[uint16]policy.Mode
	for _, p := range msg.GetPorts() {
		if p.GetNumber() == 0 || p.GetNumber() > math.MaxUint16 {
			return nil, fmt.Errorf("the policy, version %d, names port %d; ports are 1 to 65535", msg.GetVersion(), p.GetNumber())
		}
		port := uint16(p.GetNumber())
		if _, twice := ports[port]; twice {
			return nil, fmt.Errorf("the policy, version %d, names port %d twice", msg.GetVersion(), port)
		}
		if ports == nil {
			ports = make(map[uint16]policy.Mode, len(msg.GetPorts()))
		}
		ports[port] = decodeMode(p.GetMode())
	}
	source, err := parseSource(msg.GetSource())
	if err != nil {
		return nil, err
	}
	portsSource, err := parseSource(msg.GetPortsSource())
	if err != nil {
		return nil, err
	}
	return &policy.Resolved{
		Version:         msg.GetVersion(),
		WorkloadVersion: msg.GetWorkloadVersion(),
		Result:          policy.Decided(decodeMode(msg.GetMode()), source, portsSource.Policy, ports),
	}, nil
}

func decodeMode(m meshcav1.Mode) policy.Mode {
	switch m {
	case meshcav1.Mode_MODE_PERMISSIVE:
		return policy.Permissive
	case meshcav1.Mode_MODE_DISABLE:
		return policy.Disable
	}
	return policy.Strict
}

// parseSource bounds what goes into logs later.
func parseSource(msg *meshcav1.Source) (policy.Source, error) {
	for _, text := range []string{msg.GetLevel(), msg.GetNamespace(), msg.GetName()} {
		if len(text) > maxSourceName {
			return policy.Source{}, fmt.Errorf("the policy's source has a name of %d bytes; at most %d are taken", len(text), maxSourceName)
		}
	}
	return policy.Source{
		Level:  policy.Level(msg.GetLevel()),
		Policy: policy.Ref{Namespace: msg.GetNamespace(), Name: msg.GetName()},
	}, nil
}
