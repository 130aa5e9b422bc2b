package sds

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"slices"
	"strings"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

type material struct {
	t       testing.TB
	ca      *identitytest.CA
	partner *identitytest.CA
	svid    *identity.SVID
	bundle  *identity.Bundle
}

func newMaterial(t testing.TB) *material {
	ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))
	return &material{
		t: t, ca: ca,
		partner: identitytest.NewCA(t, identitytest.TrustDomain(t, "partner.test")),
		svid:    ca.SVID(t, mustID(t, cartID)),
		bundle:  newBundle(t, ca, 1),
	}
}

func (m *material) state() State { return State{SVID: m.svid, Bundle: m.bundle} }

func mustView(t testing.TB, prev *view, s State) *view {
	t.Helper()
	v, err := newView(prev, s, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func secretOf(t testing.TB, v *view, name string) *tlsv3.Secret {
	t.Helper()
	r := v.resources[name]
	if r == nil {
		t.Fatalf("no resource %q; there are %q", name, v.names)
	}
	var s tlsv3.Secret
	if err := r.wire.GetResource().UnmarshalTo(&s); err != nil {
		t.Fatal(err)
	}
	if s.GetName() != name || r.wire.GetName() != name {
		t.Errorf("resource %q carries the name %q, its secret %q", name, r.wire.GetName(), s.GetName())
	}
	return &s
}

func validatorOf(t testing.TB, s *tlsv3.Secret) map[string][]byte {
	t.Helper()
	custom := s.GetValidationContext().GetCustomValidatorConfig()
	if custom.GetName() != "envoy.tls.cert_validator.spiffe" {
		t.Fatalf("%s: validator %q", s.GetName(), custom.GetName())
	}
	var conf tlsv3.SPIFFECertValidatorConfig
	if err := custom.GetTypedConfig().UnmarshalTo(&conf); err != nil {
		t.Fatal(err)
	}
	domains := make(map[string][]byte)
	for _, d := range conf.GetTrustDomains() {
		domains[d.GetName()] = d.GetTrustBundle().GetInlineBytes()
	}
	if len(domains) != len(conf.GetTrustDomains()) {
		t.Errorf("%s names a trust domain twice: %v", s.GetName(), conf.GetTrustDomains())
	}
	return domains
}

func TestNamesAndForms(t *testing.T) {
	m := newMaterial(t)
	s := m.state()
	s.Federated = []*identity.Bundle{newBundle(t, m.partner, 4)}
	v := mustView(t, emptyView(), s)

	want := []string{"ALL", "ROOTCA", "default", "spiffe://example.org", cartID, "spiffe://partner.test"}
	if !slices.Equal(v.names, want) {
		t.Fatalf("names %q, want %q", v.names, want)
	}
	for _, name := range []string{"default", cartID} {
		c := secretOf(t, v, name).GetTlsCertificate()
		if got := c.GetCertificateChain().GetInlineBytes(); !bytes.Equal(got, identity.EncodePEM(m.svid.Certificates()...)) {
			t.Errorf("%s: chain is\n%s", name, got)
		}
		checkKey(t, m.svid, c.GetPrivateKey().GetInlineBytes())
	}
	plain := secretOf(t, v, "ROOTCA").GetValidationContext()
	if !bytes.Equal(plain.GetTrustedCa().GetInlineBytes(), m.bundle.MarshalPEM()) || plain.GetCustomValidatorConfig() != nil {
		t.Errorf("ROOTCA is not the own domain's bundle alone: %v", plain)
	}
	partner := s.Federated[0].MarshalPEM()
	for name, want := range map[string]map[string][]byte{
		"spiffe://example.org":  {"example.org": m.bundle.MarshalPEM()},
		"spiffe://partner.test": {"partner.test": partner},
		"ALL":                   {"example.org": m.bundle.MarshalPEM(), "partner.test": partner},
	} {
		secret := secretOf(t, v, name)
		got := validatorOf(t, secret)
		if len(got) != len(want) {
			t.Errorf("%s: %d domains, want %d", name, len(got), len(want))
		}
		for td, b := range want {
			if !bytes.Equal(got[td], b) {
				t.Errorf("%s: bundle of %s is\n%s", name, td, got[td])
			}
		}
	}
}

func checkKey(t *testing.T, svid *identity.SVID, raw []byte) {
	t.Helper()
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != "PRIVATE KEY" || len(rest) > 0 {
		t.Fatal("the key is not one PKCS#8 block")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	// NewSVID refuses a key that is not the leaf's.
	if _, err := identity.NewSVID(svid.Certificates(), key.(crypto.Signer)); err != nil {
		t.Error(err)
	}
}

// Each resource is whole: what one user of a validation context gets does not
// depend on who else uses it.
func TestV30_EachContextIsComplete(t *testing.T) {
	m := newMaterial(t)
	v := mustView(t, emptyView(), m.state())
	var first, second sotw
	var got [2][]byte
	for i, x := range []*sotw{&first, &second} {
		if _, err := x.request(sotwRequest("", "spiffe://example.org")); err != nil {
			t.Fatal(err)
		}
		resp, _ := x.respond(v)
		if len(resp.GetResources()) != 1 {
			t.Fatalf("user %d got %d resources", i+1, len(resp.GetResources()))
		}
		got[i] = resp.GetResources()[0].GetValue()
	}
	if !bytes.Equal(got[0], got[1]) || len(validatorOf(t, secretOf(t, v, "spiffe://example.org"))) != 1 {
		t.Error("the second user of a context got another one than the first")
	}
}

func TestVersionPerKindOfContent(t *testing.T) {
	m := newMaterial(t)
	v1 := mustView(t, emptyView(), m.state())

	renewed := m.state()
	renewed.SVID = m.ca.SVID(t, mustID(t, cartID))
	v2 := mustView(t, v1, renewed)
	checkVersions(t, "a renewed SVID", v1, v2, "default", cartID)

	rotated := renewed
	rotated.Bundle = newBundle(t, m.ca, 2, m.partner.Root.Certificate)
	v3 := mustView(t, v2, rotated)
	checkVersions(t, "a new bundle", v2, v3, "ALL", "ROOTCA", "spiffe://example.org")

	federated := rotated
	federated.Federated = []*identity.Bundle{newBundle(t, m.partner, 1)}
	v4 := mustView(t, v3, federated)
	checkVersions(t, "a federated bundle", v3, v4, "ALL", "spiffe://partner.test")

	same := federated
	same.Federated = slices.Clone(federated.Federated)
	if v5 := mustView(t, v4, same); v5 != v4 {
		t.Error("an equal state made a new view")
	}

	sequence := federated
	sequence.Bundle = newBundle(t, m.ca, 3, m.partner.Root.Certificate)
	v6 := mustView(t, v4, sequence)
	checkVersions(t, "a new sequence over equal authorities", v4, v6, "ALL", "ROOTCA", "spiffe://example.org", "spiffe://partner.test")
}

func checkVersions(t *testing.T, what string, before, after *view, changed ...string) {
	t.Helper()
	for _, name := range after.names {
		b, a := before.resources[name], after.resources[name]
		switch isNew := b == nil || a.version != b.version; {
		case isNew && !slices.Contains(changed, name):
			t.Errorf("%s changed the version of %s", what, name)
		case !isNew && slices.Contains(changed, name):
			t.Errorf("%s did not change the version of %s", what, name)
		}
	}
}

// An empty trusted_ca could make Envoy accept every peer.
func TestV21_EmptyBundleIsNeverServed(t *testing.T) {
	m := newMaterial(t)
	s := m.state()
	s.Bundle = emptyBundle(t, m.ca)
	s.Federated = []*identity.Bundle{emptyBundle(t, m.partner)}
	v, err := newView(emptyView(), s, time.Now())
	if err == nil || !strings.Contains(err.Error(), "no authorities") {
		t.Errorf("error %v", err)
	}
	if want := []string{"default", cartID}; !slices.Equal(v.names, want) || v.x509 != nil || v.bundles != nil {
		t.Errorf("served: %q", v.names)
	}
}

func TestForeignBundleIsNotTheOwn(t *testing.T) {
	m := newMaterial(t)
	s := m.state()
	s.Bundle = newBundle(t, m.partner, 1)
	v, err := newView(emptyView(), s, time.Now())
	if err == nil || v.resources["ROOTCA"] != nil || v.x509 != nil {
		t.Errorf("error %v, names %q", err, v.names)
	}
}

func TestFederatedBundlesAreOneForEachDomain(t *testing.T) {
	m := newMaterial(t)
	s := m.state()
	imposter := newBundle(t, m.ca, 9, m.partner.Root.Certificate)
	s.Federated = []*identity.Bundle{newBundle(t, m.partner, 1), imposter, newBundle(t, m.partner, 2, m.ca.Root.Certificate)}
	v := mustView(t, emptyView(), s)
	got := validatorOf(t, secretOf(t, v, "ALL"))
	if len(got) != 2 || !bytes.Equal(got["example.org"], m.bundle.MarshalPEM()) ||
		!bytes.Equal(got["partner.test"], s.Federated[0].MarshalPEM()) {
		t.Errorf("ALL holds %d domains: %s", len(got), got)
	}
}

func TestEncodingIsDeterministic(t *testing.T) {
	m := newMaterial(t)
	s := m.state()
	a := identitytest.NewCA(t, identitytest.TrustDomain(t, "a.test"))
	s.Federated = []*identity.Bundle{newBundle(t, m.partner, 1), newBundle(t, a, 1)}
	one := mustView(t, emptyView(), s)
	slices.Reverse(s.Federated)
	two := mustView(t, emptyView(), s)
	for name, r := range one.resources {
		if !proto.Equal(r.wire, two.resources[name].wire) {
			t.Errorf("%s depends on the order of the federated bundles", name)
		}
	}
}
