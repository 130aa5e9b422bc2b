package lint

import (
	"crypto/x509"
	"strings"
	"testing"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestLint(t *testing.T) {
	td, err := identity.ParseTrustDomain("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.WorkloadID(td, "shop", "cart")
	if err != nil {
		t.Fatal(err)
	}
	ca := identitytest.NewCA(t, td)
	good, _ := ca.Leaf(t, id)
	bad, _ := ca.Leaf(t, id, identitytest.WithTemplate(func(c *x509.Certificate) {
		c.KeyUsage |= x509.KeyUsageCertSign // on what is no CA
	}))
	for name, tt := range map[string]struct {
		certificate *x509.Certificate
		want        string // part of the finding; nothing if empty
	}{
		"root":               {ca.Root.Certificate, ""},
		"intermediate":       {ca.Intermediate.Certificate, ""},
		"leaf":               {good[0], ""},
		"leaf that may sign": {bad[0], "e_ext_key_usage_cert_sign_without_ca"},
	} {
		t.Run(name, func(t *testing.T) {
			findings, err := Certificate(tt.certificate)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(findings, "\n")
			if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
				t.Errorf("findings:\n%s\nwant %q", got, tt.want)
			}
		})
	}
}
