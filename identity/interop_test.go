package identity_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// referenceVerify is go-spiffe's verdict on a chain.
func referenceVerify(chain []*x509.Certificate, bundles identity.BundleSource, now time.Time) (spiffeid.ID, error) {
	id, _, err := x509svid.Verify(chain, referenceSource{bundles}, x509svid.WithTime(now))
	return id, err
}

// referenceSource is one of our sources in go-spiffe's form.
type referenceSource struct{ identity.BundleSource }

func (r referenceSource) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	ours, err := identity.ParseTrustDomain(td.Name())
	if err != nil {
		return nil, err
	}
	b, err := r.Bundle(ours)
	if err != nil {
		return nil, err
	}
	return x509bundle.FromX509Authorities(td, b.Authorities()), nil
}

// Where the two differ, ours is the one that says no.
func TestStricterThanTheReference(t *testing.T) {
	ca := newCA(t)
	const yes, no = true, false
	for _, c := range []struct {
		name            string
		reference, ours bool
		opts            []identitytest.Option
	}{
		{"our profile", yes, yes, nil},
		{"no extended key usage", yes, yes, []identitytest.Option{identitytest.WithTemplate(func(c *x509.Certificate) { c.ExtKeyUsage = nil })}},
		{"expired", no, no, []identitytest.Option{identitytest.WithLifetime(-time.Minute)}},
		{"two URIs", no, no, []identitytest.Option{withURIs(t, cart, pay)}},
		{"no URI", no, no, []identitytest.Option{withURIs(t)}},
		{"https URI", no, no, []identitytest.Option{withURIs(t, "https://cluster.local/a")}},
		{"cA=true", no, no, []identitytest.Option{identitytest.WithTemplate(func(c *x509.Certificate) { c.IsCA = true })}},
		{"keyCertSign", no, no, []identitytest.Option{withKeyUsage(x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign)}},
		{"cRLSign", no, no, []identitytest.Option{withKeyUsage(x509.KeyUsageDigitalSignature | x509.KeyUsageCRLSign)}},
		{"another domain", no, no, []identitytest.Option{withURIs(t, "spiffe://evil.cluster.local/a")}},

		{"code signing only", yes, no, []identitytest.Option{identitytest.WithTemplate(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
		})}},
		{"the trust domain's own ID", yes, no, []identitytest.Option{withURIs(t, "spiffe://cluster.local")}},
		{"no key usage", yes, no, []identitytest.Option{withKeyUsage(0)}},
		{"no digitalSignature", yes, no, []identitytest.Option{withKeyUsage(x509.KeyUsageKeyEncipherment)}},
		{"key usage not critical", yes, no, []identitytest.Option{identitytest.WithExtension(pkix.Extension{Id: oidKeyUsage, Value: []byte{3, 2, 7, 0x80}})}},
		{"an ID of 2049 bytes", yes, no, []identitytest.Option{withURIs(t, "spiffe://cluster.local/"+strings.Repeat("a", 2049-len("spiffe://cluster.local/")))}},
		{"NUL in an otherName", yes, no, []identitytest.Option{identitytest.WithExtension(rawSAN(uriName(cart), otherName(t, 12, "a\x00b")))}},
		{"a second, constructed URI", yes, no, []identitytest.Option{identitytest.WithExtension(rawSAN(uriName(cart), name(6, true, string(mustDER(t, pay)))))}},
		{"101 names", yes, no, []identitytest.Option{identitytest.WithTemplate(func(c *x509.Certificate) { c.DNSNames = strings.Split(strings.Repeat("a,", 99)+"a", ",") })}},
	} {
		t.Run(c.name, func(t *testing.T) {
			chain, _ := ca.Leaf(t, identitytest.ID(t, cart), c.opts...)
			if _, err := referenceVerify(chain, ca.Bundle(), time.Now()); (err == nil) != c.reference {
				t.Errorf("go-spiffe: %v", err)
			}
			if _, err := identity.Verify(chain, identity.Client, ca.Bundle(), time.Now()); (err == nil) != c.ours {
				t.Errorf("ours: %v", err)
			}
		})
	}
}

func TestReferenceReadsWhatWeMake(t *testing.T) {
	ca := newCA(t)
	svid := ca.SVID(t, identitytest.ID(t, cart))
	key, err := svid.MarshalKey()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := x509svid.ParseRaw(svid.MarshalChain(), key)
	if err != nil || ref.ID != svid.ID().SPIFFE() {
		t.Errorf("SVID: %v, %v", ref, err)
	}
	b := newBundle(t, identity.BundleConfig{Sequence: 7, RefreshHint: time.Minute, Authorities: ca.Bundle().Authorities()})
	doc, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	got, err := spiffebundle.Parse(b.TrustDomain().SPIFFE(), doc)
	if err != nil {
		t.Fatal(err)
	}
	seq, _ := got.SequenceNumber()
	hint, _ := got.RefreshHint()
	if seq != 7 || hint != time.Minute || len(got.X509Authorities()) != 1 || !got.X509Authorities()[0].Equal(ca.Root.Certificate) {
		t.Errorf("sequence %d, hint %v, %d authorities", seq, hint, len(got.X509Authorities()))
	}
	back, err := got.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := identity.ParseBundle(b.TrustDomain(), back); err != nil || !again.Equal(b) {
		t.Errorf("read back from go-spiffe's form: %v", err)
	}
}

func TestHandshakeWithTheReference(t *testing.T) {
	server, client, ca := pair(t)
	key, err := client.conf.SVIDs.(*identity.SVID).MarshalKey()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := x509svid.ParseRaw(client.conf.SVIDs.(*identity.SVID).MarshalChain(), key)
	if err != nil {
		t.Fatal(err)
	}
	bundle := x509bundle.FromX509Authorities(ca.TrustDomain.SPIFFE(), ca.Bundle().Authorities())
	expect := tlsconfig.AuthorizeID(identitytest.ID(t, pay).SPIFFE())
	_, ss, cerr, serr := handshake(t, server.server(t), tlsconfig.MTLSClientConfig(ref, bundle, expect))
	if cerr != nil || serr != nil {
		t.Errorf("go-spiffe as client: %v, %v", cerr, serr)
	} else if id, err := identity.PeerID(ss); err != nil || id.String() != cart {
		t.Errorf("the server sees %v, %v", id, err)
	}
	cs, _, cerr, serr := handshake(t, tlsconfig.MTLSServerConfig(ref, bundle, tlsconfig.AuthorizeAny()), client.client(t))
	if cerr != nil || serr != nil {
		t.Errorf("go-spiffe as server: %v, %v", cerr, serr)
	} else if id, err := identity.PeerID(cs); err != nil || id.String() != cart {
		t.Errorf("the client sees %v, %v", id, err)
	}
	// And a refusal, seen from the other side.
	client.bundles.now.Store(newBundle(t, identity.BundleConfig{}))
	_, _, cerr, serr = handshake(t, tlsconfig.MTLSServerConfig(ref, bundle, tlsconfig.AuthorizeAny()), client.client(t))
	var verr *identity.VerifyError
	if !errors.As(cerr, &verr) || serr == nil {
		t.Errorf("go-spiffe as a server that is not believed: %v, %v", cerr, serr)
	}
}
