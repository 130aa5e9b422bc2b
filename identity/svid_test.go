package identity_test

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestNewSVIDChecksWhatItHolds(t *testing.T) {
	ca := newCA(t)
	id := identitytest.ID(t, cart)
	chain, key := ca.Leaf(t, id)
	if svid, err := identity.NewSVID(chain, key); err != nil || svid.ID() != id || !svid.Leaf().Equal(chain[0]) {
		t.Fatal(svid, err)
	}
	sameName := ca.NewIntermediate(t, func(c *x509.Certificate) { c.Subject = ca.Intermediate.Certificate.Subject }, identitytest.NewKey(t))
	otherName := ca.NewIntermediate(t, func(c *x509.Certificate) { c.Subject.CommonName = "other" }, ca.Intermediate.Key)
	noKeyUsage := ca.NewIntermediate(t, func(c *x509.Certificate) {
		c.Subject, c.KeyUsage = ca.Intermediate.Certificate.Subject, 0
	}, ca.Intermediate.Key)
	long := chain
	for len(long) < 11 {
		long = append(long[:len(long):len(long)], ca.Root.Certificate)
	}
	for what, c := range map[string]struct {
		chain []*x509.Certificate
		key   crypto.Signer
	}{
		"no certificate":           {nil, key},
		"no key":                   {chain, nil},
		"another's key":            {chain, identitytest.NewKey(t)},
		"a CA as leaf":             {chain[1:], ca.Intermediate.Key},
		"another's signature":      {[]*x509.Certificate{chain[0], sameName.Certificate}, key},
		"another's name":           {[]*x509.Certificate{chain[0], otherName.Certificate}, key},
		"an issuer that signs not": {[]*x509.Certificate{chain[0], noKeyUsage.Certificate}, key},
		"out of order":             {[]*x509.Certificate{chain[0], ca.Root.Certificate, chain[1]}, key},
		"too long":                 {long, key},
	} {
		if svid, err := identity.NewSVID(c.chain, c.key); err == nil {
			t.Errorf("%s: accepted as %v", what, svid)
		}
	}
}

func TestSVIDEndsWithItsFirstCertificate(t *testing.T) {
	ca := newCA(t)
	id := identitytest.ID(t, cart)
	svid := ca.SVID(t, id)
	if svid.NotAfter() != svid.Leaf().NotAfter {
		t.Errorf("%v; want the leaf's end", svid.NotAfter())
	}
	svid = ca.SVID(t, id, identitytest.WithLifetime(100*24*time.Hour))
	if svid.NotAfter() != ca.Intermediate.Certificate.NotAfter {
		t.Errorf("%v; want the intermediate's end", svid.NotAfter())
	}
}

func TestSVIDEncodings(t *testing.T) {
	ca := newCA(t)
	svid := ca.SVID(t, identitytest.ID(t, cart))
	der, err := svid.MarshalKey()
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := x509.ParseCertificates(svid.MarshalChain())
	if err != nil {
		t.Fatal(err)
	}
	again, err := identity.NewSVID(chain, key.(crypto.Signer))
	if err != nil || again.ID() != svid.ID() || again.Serial() != svid.Serial() || len(again.Certificates()) != 2 {
		t.Errorf("%v, %v", again, err)
	}
}

// An Ed25519 key is a plain slice of bytes: fmt would print it in full.
func TestSVIDNeverPrintsItsKey(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	svid := newCA(t).SVID(t, identitytest.ID(t, cart), identitytest.WithKey(key))
	holder := struct{ S *identity.SVID }{svid}
	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+"\n", svid)
		fmt.Fprintf(&out, verb+"\n", *svid)
		fmt.Fprintf(&out, verb+"\n", holder)
	}
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "svid", svid)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "svid", svid)
	for _, secret := range []string{fmt.Sprintf("%v", key)[1:40], fmt.Sprintf("%x", []byte(key))[:16], fmt.Sprintf("%X", []byte(key))[:16],
		fmt.Sprintf("%#v", []byte(key))[7:40]} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("the key is in %s", out.String())
		}
	}
	if !strings.Contains(out.String(), "X509-SVID of "+cart) {
		t.Errorf("no ID in %s", out.String())
	}
}
