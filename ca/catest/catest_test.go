package catest

import (
	"crypto/x509"
	"os"
	"slices"
	"testing"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCertificatesOfEveryKind(t *testing.T) {
	k := New(t)
	var names []string
	for _, c := range k.Certificates(t) {
		names = append(names, c.Name)
		certs, err := identity.ParsePEM(c.PEM)
		check(t, err)
		roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
		if !roots.AppendCertsFromPEM(c.Root) || len(c.Intermediates) > 0 && !intermediates.AppendCertsFromPEM(c.Intermediates) {
			t.Errorf("%s: its chain cannot be read", c.Name)
		}
		_, err = certs[0].Verify(x509.VerifyOptions{DNSName: c.DNS, Roots: roots, Intermediates: intermediates})
		if err != nil {
			t.Errorf("%s: %v", c.Name, err)
		}
	}
	want := []string{"root", "intermediate", "svid-ed25519", "svid-p256", "svid-p384", "svid-rsa-2048", "svid-rsa-3072", "svid-rsa-4096", "serving"}
	if !slices.Equal(names, want) {
		t.Errorf("kinds %q, want %q", names, want)
	}
	anchor, err := os.ReadFile(k.Anchor)
	check(t, err)
	if string(anchor) != string(identity.EncodePEM(k.Upstream.Root())) {
		t.Error("the anchor is not the root")
	}
}
