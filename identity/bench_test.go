package identity_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"net/url"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func BenchmarkVerify(b *testing.B) {
	ca := identitytest.NewCA(b, identitytest.TrustDomain(b, "cluster.local"))
	svid := ca.SVID(b, identitytest.ID(b, "spiffe://cluster.local/ns/shop/sa/cart"))
	bundle, now := ca.Bundle(), time.Now()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := identity.Verify(svid.Certificates(), identity.Client, bundle, now); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkVerifyHostile is the dearest chain known to us that passes the caps:
// the signer of every certificate could be each of the others (V63).
func BenchmarkVerifyHostile(b *testing.B) {
	for name, newKey := range map[string]func() crypto.Signer{
		"P-256":   func() crypto.Signer { return identitytest.NewKey(b) },
		"P-384":   func() crypto.Signer { k, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader); return k },
		"P-521":   func() crypto.Signer { k, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader); return k },
		"RSA4096": func() crypto.Signer { k, _ := rsa.GenerateKey(rand.Reader, 4096); return k },
	} {
		b.Run(name, func(b *testing.B) {
			chain, bundle := hostileChain(b, newKey())
			b.ReportAllocs()
			for b.Loop() {
				if _, err := identity.Verify(chain, identity.Client, bundle, time.Now()); err == nil {
					b.Fatal("believed")
				}
			}
		})
	}
}

// hostileChain makes intermediates that share key and subject and differ in
// their names only, so that path building takes them for different parents.
func hostileChain(tb testing.TB, key crypto.Signer) ([]*x509.Certificate, *identity.Bundle) {
	ca := identitytest.NewCA(tb, identitytest.TrustDomain(tb, "cluster.local"))
	bundle := ca.Bundle()
	ca.Root = &identitytest.Authority{Certificate: &x509.Certificate{RawSubject: ca.Root.Certificate.RawSubject, Subject: ca.Root.Certificate.Subject}, Key: key}
	var intermediates []*x509.Certificate
	for i := range 9 {
		a := ca.NewIntermediate(tb, func(c *x509.Certificate) {
			c.MaxPathLenZero, c.MaxPathLen = false, -1
			c.Subject = ca.Root.Certificate.Subject
			c.SubjectKeyId = nil
			c.URIs = []*url.URL{identitytest.URL(tb, fmt.Sprintf("spiffe://cluster.local/%d", i))}
		}, key)
		intermediates = append(intermediates, a.Certificate)
		ca.Intermediate = a
	}
	chain, _ := ca.Leaf(tb, identitytest.ID(tb, "spiffe://cluster.local/ns/shop/sa/cart"),
		identitytest.WithIssuer(ca.Intermediate, intermediates...))
	return chain, bundle
}

func BenchmarkHandshake(b *testing.B) {
	ca := identitytest.NewCA(b, identitytest.TrustDomain(b, "cluster.local"))
	conf := identity.TLSConfig{
		SVIDs:     ca.SVID(b, identitytest.ID(b, "spiffe://cluster.local/ns/shop/sa/cart")),
		Bundles:   ca.Bundle(),
		Authorize: identity.AuthorizeAny(),
		Now:       time.Now,
	}
	server, err := identity.ServerTLS(conf)
	if err != nil {
		b.Fatal(err)
	}
	client, err := identity.ClientTLS(conf)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, cerr, serr := handshake(b, server, client); cerr != nil || serr != nil {
			b.Fatal(cerr, serr)
		}
	}
}
