package caclient

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/wire/meshcav1"
)

// maxAuthority bounds one authority's certificate before it is parsed.
const maxAuthority = 16 << 10

// Workload is what the CA says about one workload, checked for what can be seen
// from the message alone.
type Workload struct {
	ID identity.ID
	// Bundle is of the client's trust domain and has at least one authority.
	Bundle *identity.Bundle
	// RenewAt is when the CA would like the certificate to be renewed; zero if
	// it has no wish.
	RenewAt time.Time
}

// parseWorkload turns the resource as it came into nouns of ours. td is the
// only trust domain that is taken.
func parseWorkload(td identity.TrustDomain, resource *anypb.Any) (Workload, error) {
	if resource == nil {
		return Workload{}, errors.New("it has no content")
	}
	if resource.GetTypeUrl() != meshcav1.TypeURL {
		return Workload{}, fmt.Errorf("it is of type %.256q, not %q", resource.GetTypeUrl(), meshcav1.TypeURL)
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
