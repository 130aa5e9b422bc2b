package sds

import (
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/wire"
)

// The SDS names that are the same for every workload. The first two are
// Istio's; the last is SPIRE's, as are the SPIFFE IDs beside it.
const (
	nameSVID       = "default"
	nameBundle     = "ROOTCA"
	nameAllBundles = "ALL"
)

const (
	secretType      = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	spiffeValidator = "envoy.tls.cert_validator.spiffe"
)

// view is one State as the wire wants it: encoded once, shared by all streams,
// and never changed.
type view struct {
	number    uint64 // of the change that made this view; counts from 1
	resources map[string]*resource
	names     []string // the keys of resources, sorted

	svid   *identity.SVID   // nil while there is none that is still valid
	key    []byte           // the SVID's, PKCS#8 DER
	bundle *identity.Bundle // of the own domain; nil while there is none
	denied error

	workload *discovery.Resource // for proxies, of the latest identity; nil before there was one

	x509    *workload.X509SVIDResponse    // nil while it would be incomplete
	bundles *workload.X509BundlesResponse // likewise

	replaced chan struct{} // closed when a newer view has taken this one's place
}

// resource is one SDS secret. Its version is the number of the view that
// brought its present content, so that equal versions mean equal content, and
// a new bundle leaves the certificate's version alone.
type resource struct {
	version  uint64
	holds    content
	sequence uint64 // of the own domain's bundle, for bundles
	wire     *discovery.Resource
}

// content says what a resource is made of.
type content int

const (
	holdsSVID content = iota + 1
	holdsBundle
)

// unknown reports whether name is certain to mean nothing here. It is false
// for a name that may get its meaning with the first SVID or bundle: those are
// waited for.
func (v *view) unknown(name string) bool {
	switch name {
	case nameSVID, nameBundle, nameAllBundles:
		return false
	}
	if v.resources[name] != nil {
		return false
	}
	id, err := identity.ParseID(name)
	switch {
	case err != nil:
		return true
	case id.Path() == "":
		return v.bundle != nil
	default:
		return v.svid != nil
	}
}

// sequence returns the sequence of the bundle in the view; zero without one.
func (v *view) sequence() uint64 {
	if v.bundle == nil {
		return 0
	}
	return v.bundle.Sequence()
}

// emptyView is what the first real one follows: it is number 0.
func emptyView() *view { return &view{replaced: make(chan struct{})} }

// newView encodes s as it is at now, following prev. It returns prev itself
// when nothing has changed that anyone could see. The error says what of s
// cannot be served; the view is good without it.
func newView(prev *view, s State, now time.Time) (*view, error) {
	v := &view{
		number:    prev.number + 1,
		resources: make(map[string]*resource),
		denied:    s.Denied,
		replaced:  make(chan struct{}),
	}
	problem := v.take(s, now)
	federated := v.federated(s)
	if err := errors.Join(v.encodeSVID(), v.encodeBundles(federated), v.encodeResource(s)); err != nil {
		return prev, err
	}
	v.encodeWorkload(federated)
	if v.settle(prev) {
		return prev, problem
	}
	return v, problem
}

// take picks from s what may be handed out at now.
func (v *view) take(s State, now time.Time) error {
	var problem error
	// Whoever got an expired certificate could do nothing with it but fail.
	// Round strips the monotonic reading: only the wall clock knows of the time
	// that a machine was suspended.
	switch {
	case s.SVID == nil:
	case !now.Round(0).Before(s.SVID.NotAfter()):
		problem = fmt.Errorf("the SVID of %s (serial %s) ended at %s and is no longer handed out; the agent could not renew it",
			s.SVID.ID(), s.SVID.Serial(), s.SVID.NotAfter().UTC().Format(time.RFC3339))
	default:
		key, err := s.SVID.MarshalKey()
		if err != nil {
			problem = fmt.Errorf("the SVID cannot be handed out: %w", err)
			break
		}
		v.svid, v.key = s.SVID, key
	}
	switch b := s.Bundle; {
	case b == nil:
	case len(b.Authorities()) == 0:
		// Without a trusted_ca Envoy may be left verifying nobody; what it does then
		// depends on the rest of its configuration, which is not ours.
		problem = fmt.Errorf("the bundle of %s (sequence %d) has no authorities and is not handed out", b.TrustDomain(), b.Sequence())
	case s.SVID != nil && s.SVID.ID().TrustDomain() != b.TrustDomain():
		problem = fmt.Errorf("the bundle is of trust domain %q, the SVID of %q: the bundle is not handed out",
			b.TrustDomain(), s.SVID.ID().TrustDomain())
	default:
		v.bundle = b
	}
	return problem
}

// federated returns the bundles of the other trust domains that can be trusted
// at all, by name, each domain once.
func (v *view) federated(s State) []*identity.Bundle {
	byDomain := make(map[string]*identity.Bundle)
	for _, b := range s.Federated {
		name := b.TrustDomain().String()
		own := v.bundle != nil && v.bundle.TrustDomain() == b.TrustDomain()
		if own || byDomain[name] != nil || len(b.Authorities()) == 0 {
			continue
		}
		byDomain[name] = b
	}
	var list []*identity.Bundle
	for _, name := range slices.Sorted(maps.Keys(byDomain)) {
		list = append(list, byDomain[name])
	}
	return list
}

func (v *view) encodeSVID() error {
	if v.svid == nil {
		return nil
	}
	cert := &tlsv3.TlsCertificate{
		CertificateChain: inline(identity.EncodePEM(v.svid.Certificates()...)),
		PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: v.key})),
	}
	for _, name := range []string{nameSVID, v.svid.ID().String()} {
		err := v.add(holdsSVID, &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: cert}})
		if err != nil {
			return err
		}
	}
	return nil
}

func (v *view) encodeBundles(federated []*identity.Bundle) error {
	if v.bundle == nil {
		return nil
	}
	all := append([]*identity.Bundle{v.bundle}, federated...)
	plain := &tlsv3.CertificateValidationContext{TrustedCa: inline(v.bundle.MarshalPEM())}
	if err := v.addContext(nameBundle, plain); err != nil {
		return err
	}
	for _, b := range all {
		if err := v.addValidator(b.TrustDomain().ID().String(), b); err != nil {
			return err
		}
	}
	return v.addValidator(nameAllBundles, all...)
}

// addValidator adds a validation context with Envoy's SPIFFE validator, which
// takes each peer's trust domain from its own ID and never pools domains.
func (v *view) addValidator(name string, bundles ...*identity.Bundle) error {
	conf := &tlsv3.SPIFFECertValidatorConfig{}
	for _, b := range bundles {
		conf.TrustDomains = append(conf.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name:        b.TrustDomain().String(),
			TrustBundle: inline(b.MarshalPEM()),
		})
	}
	packed, err := anypb.New(conf)
	if err != nil {
		return fmt.Errorf("encoding the SPIFFE validator %q: %w", name, err)
	}
	return v.addContext(name, &tlsv3.CertificateValidationContext{
		CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: packed},
	})
}

func (v *view) addContext(name string, c *tlsv3.CertificateValidationContext) error {
	return v.add(holdsBundle, &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: c}})
}

// add encodes one secret. Each is complete in itself: an Envoy whose second
// user of a shared context lost a part of it has let the wrong peers in
// (GHSA-3x9m-pgmg-xpx8).
func (v *view) add(holds content, secret *tlsv3.Secret) error {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(secret)
	if err != nil {
		return fmt.Errorf("encoding the secret %q: %w", secret.GetName(), err)
	}
	r := &resource{
		version: v.number,
		holds:   holds,
		wire: &discovery.Resource{
			Name:     secret.GetName(),
			Version:  version(v.number),
			Resource: &anypb.Any{TypeUrl: secretType, Value: raw},
		},
	}
	if holds == holdsBundle {
		r.sequence = v.sequence()
	}
	v.resources[secret.GetName()] = r
	return nil
}

// encodeResource makes what the proxy beside the workload is told. An SVID that
// has ended still says who the workload is.
func (v *view) encodeResource(s State) error {
	if s.SVID == nil || v.bundle == nil {
		return nil
	}
	content, hash, err := wire.Workload{ID: s.SVID.ID(), Bundle: v.bundle, Policy: s.Policy}.Marshal()
	if err != nil {
		return err
	}
	// Not the view's number: whoever comes back after our restart names the version
	// that it has, and the same number would mean another content.
	v.workload = &discovery.Resource{Name: s.SVID.ID().String(), Version: fmt.Sprintf("%x", hash[:8]), Resource: content}
	return nil
}

// encodeWorkload makes the two messages of the Workload API.
func (v *view) encodeWorkload(federated []*identity.Bundle) {
	if v.bundle == nil {
		return
	}
	others := make(map[string][]byte, len(federated))
	for _, b := range federated {
		others[b.TrustDomain().ID().String()] = b.MarshalDER()
	}
	own := v.bundle.MarshalDER()
	bundles := maps.Clone(others)
	bundles[v.bundle.TrustDomain().ID().String()] = own
	v.bundles = &workload.X509BundlesResponse{Bundles: bundles}
	if v.svid == nil {
		return
	}
	v.x509 = &workload.X509SVIDResponse{
		Svids: []*workload.X509SVID{{
			SpiffeId:    v.svid.ID().String(),
			X509Svid:    v.svid.MarshalChain(),
			X509SvidKey: v.key,
			Bundle:      own,
		}},
		FederatedBundles: others,
	}
}

// settle gives unchanged content the values that prev has for it, and reports
// whether v is prev in everything that can be seen.
func (v *view) settle(prev *view) bool {
	v.names = slices.Sorted(maps.Keys(v.resources))
	same := slices.Equal(v.names, prev.names) && (v.denied == nil) == (prev.denied == nil)
	for name, r := range v.resources {
		// A new sequence is sent even over equal authorities: rotation waits for
		// it to be acknowledged.
		if p := prev.resources[name]; p != nil && p.sequence == r.sequence && proto.Equal(p.wire.GetResource(), r.wire.GetResource()) {
			v.resources[name] = p
			continue
		}
		same = false
	}
	if (v.workload != nil) == (prev.workload != nil) && proto.Equal(v.workload.GetResource(), prev.workload.GetResource()) {
		v.workload = prev.workload
	} else {
		same = false
	}
	if (v.x509 != nil) == (prev.x509 != nil) && proto.Equal(v.x509, prev.x509) && v.sequence() == prev.sequence() {
		v.x509 = prev.x509
	} else {
		same = false
	}
	if (v.bundles != nil) == (prev.bundles != nil) && proto.Equal(v.bundles, prev.bundles) && v.sequence() == prev.sequence() {
		v.bundles = prev.bundles
	} else {
		same = false
	}
	return same
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}
