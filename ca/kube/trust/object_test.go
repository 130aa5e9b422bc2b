package trust

import (
	"crypto/x509"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestT12_F65_HowAnObjectStands(t *testing.T) {
	td := identitytest.TrustDomain(t, "cluster.local")
	root, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	b, err := identity.NewBundle(td, identity.BundleConfig{Sequence: 7, Authorities: []*x509.Certificate{root}})
	if err != nil {
		t.Fatal(err)
	}
	text, ours := string(b.MarshalPEM()), labels()
	anchorOf := func(domain string) string {
		c, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: identitytest.TrustDomain(t, domain)})
		if err != nil {
			t.Fatal(err)
		}
		return string(identity.EncodePEM(c))
	}
	another := anchorOf("cluster.local")
	with := func(domain, sequence string) map[string]string {
		return map[string]string{annotDomain: domain, annotSequence: sequence}
	}
	for name, tt := range map[string]struct {
		labels, annotations map[string]string
		text                string
		want                condition
		says                string
	}{
		"as it should be":         {ours, with("cluster.local", "7"), text, current, ""},
		"older":                   {ours, with("cluster.local", "6"), "old", unwritten, ""},
		"newer":                   {ours, with("cluster.local", "8"), "new", newer, "bundle 8"},
		"newer than 32 bits":      {ours, with("cluster.local", "18446744073709551615"), "new", newer, "restore --as-newest"},
		"same number, other text": {ours, with("cluster.local", "7"), "edited", unwritten, ""},
		"same number, other root": {ours, with("cluster.local", "7"), another, conflict, "meshca restore"},
		"same number, one more":   {ours, with("cluster.local", "7"), text + another, conflict, "other authorities"},
		"same number, no root":    {ours, with("cluster.local", "7"), anchorOf("evil.test"), unwritten, ""},
		"same number, twice":      {ours, with("cluster.local", "7"), text + text, unwritten, ""},
		"older, other root":       {ours, with("cluster.local", "6"), another, unwritten, ""},
		"no number":               {ours, with("cluster.local", ""), text, unwritten, ""},
		"a number below zero":     {ours, with("cluster.local", "-1"), text, unwritten, ""},
		"no annotations":          {ours, nil, text, unwritten, ""},
		"no label":                {nil, with("cluster.local", "7"), text, unwritten, ""},
		"no sign of us":           {nil, nil, text, foreign, "not meshca's"},
		"managed by Helm":         {map[string]string{labelManagedBy: "Helm"}, nil, text, foreign, "not meshca's"},
		"another trust domain":    {ours, with("old.test", "1"), text, foreign, `"old.test"`},
		"a newer one of others":   {ours, with("old.test", "9"), text, foreign, `"old.test"`},
	} {
		have := &object{meta: &metav1.ObjectMeta{Labels: tt.labels, Annotations: tt.annotations}, text: tt.text}
		if got, why := judge(have, b); got != tt.want || !strings.Contains(why, tt.says) {
			t.Errorf("%s: %s, %q", name, got, why)
		}
	}
	if got, _ := judge(nil, b); got != unwritten {
		t.Errorf("nothing there: %s", got)
	}
}
