package client

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"github.com/meshca/meshca/identity"
)

// material is one message of the Workload API, judged: an SVID and the bundles
// that came with it. It is immutable.
type material struct {
	svid    *identity.SVID
	bundles map[identity.TrustDomain]*identity.Bundle
}

func (m *material) domains() []identity.TrustDomain {
	var all []identity.TrustDomain
	for td := range m.bundles {
		all = append(all, td)
	}
	slices.SortFunc(all, func(a, b identity.TrustDomain) int { return strings.Compare(a.String(), b.String()) })
	return all
}

// parse judges a message (SPIFFE_Workload_API §5.2.1). Its first SVID, which is
// the default one, and that SVID's bundle have to be sound, or the message is
// refused whole. A federated bundle that is not is left out and told, so that
// another domain's mistake does not stop our renewals.
//
// The Workload API carries no sequence, so the bundles have none.
func parse(r *workload.X509SVIDResponse) (*material, []error, error) {
	if len(r.GetSvids()) == 0 {
		return nil, nil, errors.New("X509SVIDResponse without an SVID")
	}
	first := r.GetSvids()[0]
	svid, err := parseSVID(first)
	if err != nil {
		return nil, nil, err
	}
	own := svid.ID().TrustDomain()
	bundle, err := parseBundle(own, first.GetBundle())
	if err != nil {
		return nil, nil, err
	}
	if len(bundle.Authorities()) == 0 {
		return nil, nil, fmt.Errorf("the bundle of %q, the own trust domain, holds no authority", own)
	}
	m := &material{svid: svid, bundles: map[identity.TrustDomain]*identity.Bundle{own: bundle}}
	var skipped []error
	for name, der := range r.GetFederatedBundles() {
		if err := m.addFederated(name, der); err != nil {
			skipped = append(skipped, err)
		}
	}
	return m, skipped, nil
}

// addFederated adds another domain's bundle. One for the own domain is refused:
// who is to be believed there comes with the SVID.
func (m *material) addFederated(name string, der []byte) error {
	domain, ok := strings.CutPrefix(name, "spiffe://")
	if !ok { // one spelling only, or two entries could be about one domain
		return fmt.Errorf("federated bundle of %q: that is no trust domain's SPIFFE ID", shorten(name))
	}
	td, err := identity.ParseTrustDomain(domain)
	if err != nil {
		return fmt.Errorf("federated bundle: %w", err)
	}
	if _, ok := m.bundles[td]; ok {
		return fmt.Errorf("federated bundle of %q: there is another one for that domain", td)
	}
	b, err := parseBundle(td, der)
	if err != nil {
		return err
	}
	m.bundles[td] = b
	return nil
}

func parseSVID(s *workload.X509SVID) (*identity.SVID, error) {
	chain, err := x509.ParseCertificates(s.GetX509Svid())
	if err != nil {
		return nil, fmt.Errorf("SVID: %w", err)
	}
	key, err := x509.ParsePKCS8PrivateKey(s.GetX509SvidKey())
	if err != nil {
		return nil, errors.New("SVID: its private key is not PKCS#8") // the cause may repeat what it read
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("SVID: a key of type %T cannot sign", key)
	}
	svid, err := identity.NewSVID(chain, signer)
	if err != nil {
		return nil, err
	}
	if s.GetSpiffeId() != svid.ID().String() {
		return nil, fmt.Errorf("SVID for %s: the message calls it %q", svid.ID(), shorten(s.GetSpiffeId()))
	}
	return svid, nil
}

func parseBundle(td identity.TrustDomain, der []byte) (*identity.Bundle, error) {
	authorities, err := x509.ParseCertificates(der)
	if err != nil {
		return nil, fmt.Errorf("bundle of %q: %w", td, err)
	}
	return identity.NewBundle(td, identity.BundleConfig{Authorities: authorities})
}
