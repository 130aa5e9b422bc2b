package ca_test

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
)

const cart = "spiffe://cluster.local/ns/shop/sa/cart"

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func issue(t testing.TB, k *catest.Kit, pub crypto.PublicKey, lifetime time.Duration) *ca.Issued {
	t.Helper()
	issued, err := k.Authority.Issue(t.Context(), k.Caller(t, "shop", "cart"), pub, lifetime)
	check(t, err)
	return issued
}

// oids are the extensions of our profile; anything else in a leaf is a surprise.
var (
	leafExtensions = []string{"2.5.29.14", "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.35", "2.5.29.37"}
	caExtensions   = []string{"2.5.29.14", "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.35"}
	critical       = []string{"2.5.29.15", "2.5.29.17", "2.5.29.19"} // key usage, SAN of an empty subject, basic constraints
)

func extensions(c *x509.Certificate) (all, crit []string) {
	for _, e := range c.Extensions {
		all = append(all, e.Id.String())
		if e.Critical {
			crit = append(crit, e.Id.String())
		}
	}
	slices.Sort(all)
	slices.Sort(crit)
	return all, crit
}

// One leaf of each algorithm of keys, held against the whole profile.
func TestSPIFFE11_SPIFFE12_SPIFFE13_SPIFFE14_SPIFFE15_SPIFFE16_SPIFFE18_V5_V41_LeafProfile(t *testing.T) {
	k := catest.New(t)
	who := k.Caller(t, "shop", "cart")
	for name, key := range catest.QuickLeafKeys(t) {
		t.Run(name, func(t *testing.T) {
			before := time.Now().Truncate(time.Second)
			issued, err := k.Authority.Issue(t.Context(), who, key.Public(), 0)
			check(t, err)
			leaf := issued.Chain[0]
			if uris := leaf.URIs; len(uris) != 1 || uris[0].String() != cart {
				t.Errorf("URIs %v, want exactly %s", uris, cart)
			}
			if len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 {
				t.Errorf("names beside the URI: %v %v %v", leaf.DNSNames, leaf.IPAddresses, leaf.EmailAddresses)
			}
			if !bytes.Equal(leaf.RawSubject, []byte{0x30, 0}) {
				t.Errorf("subject %q, want an empty one", leaf.Subject)
			}
			all, crit := extensions(leaf)
			if !slices.Equal(all, leafExtensions) || !slices.Equal(crit, critical) {
				t.Errorf("extensions %v, critical %v; want %v, critical %v", all, crit, leafExtensions, critical)
			}
			usage := x509.KeyUsageDigitalSignature
			if _, ok := key.(*rsa.PrivateKey); ok {
				usage |= x509.KeyUsageKeyEncipherment
			}
			if leaf.KeyUsage != usage {
				t.Errorf("key usage %b, want %b", leaf.KeyUsage, usage)
			}
			if !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) || len(leaf.UnknownExtKeyUsage) != 0 {
				t.Errorf("extended key usage %v %v", leaf.ExtKeyUsage, leaf.UnknownExtKeyUsage)
			}
			if leaf.IsCA || !leaf.BasicConstraintsValid {
				t.Error("the leaf does not say that it is no CA")
			}
			if len(leaf.SubjectKeyId) != 20 || !bytes.Equal(leaf.AuthorityKeyId, issued.Chain[1].SubjectKeyId) {
				t.Errorf("key identifiers %x, issuer %x", leaf.SubjectKeyId, leaf.AuthorityKeyId)
			}
			if d := leaf.NotAfter.Sub(before); d < time.Hour || d > time.Hour+10*time.Second {
				t.Errorf("lifetime from issue %v, want 1h", d)
			}
			if leaf.NotAfter.After(issued.Chain[1].NotAfter) || leaf.NotBefore.Before(issued.Chain[1].NotBefore) {
				t.Error("the leaf's time is not within its issuer's")
			}
			if !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(leaf.PublicKey) {
				t.Error("the leaf is over another key")
			}
			svid, err := identity.NewSVID(issued.Chain, key)
			check(t, err)
			for _, role := range []identity.Role{identity.Server, identity.Client} {
				id, err := identity.Verify(svid.Certificates(), role, issued.Bundle, time.Now())
				if err != nil || id.String() != cart {
					t.Errorf("as %v: %v, %v", role, id, err)
				}
			}
		})
	}
}

// CA certificates are SVIDs of the trust domain itself (SPIFFE 9, 19), can sign
// (17), and bear no name constraints (21 is a MAY that rustls punishes).
func TestT5_SPIFFE9_SPIFFE14_SPIFFE15_SPIFFE17_SPIFFE19_AuthorityProfile(t *testing.T) {
	k := catest.New(t, catest.WithTrustDomain("mesh.example"))
	intermediate, root := issue(t, k, catest.NewKey(t).Public(), 0).Chain[1], k.Upstream.Root()
	for role, c := range map[string]*x509.Certificate{"intermediate": intermediate, "root": root} {
		all, crit := extensions(c)
		if !slices.Equal(all, caExtensions) || !slices.Equal(crit, []string{"2.5.29.15", "2.5.29.19"}) {
			t.Errorf("%s: extensions %v, critical %v", role, all, crit)
		}
		if !c.IsCA || c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
			t.Errorf("%s: CA %v, key usage %b", role, c.IsCA, c.KeyUsage)
		}
		if len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://mesh.example" || len(c.DNSNames) != 0 {
			t.Errorf("%s: names %v %v", role, c.URIs, c.DNSNames)
		}
		want := "SERIALNUMBER=" + hex.EncodeToString(c.SubjectKeyId[:8]) + ",CN=meshca " + role + ",O=mesh.example"
		if got := c.Subject.String(); got != want {
			t.Errorf("%s: subject %q, want %q", role, got, want)
		}
		if !bytes.Equal(c.AuthorityKeyId, root.SubjectKeyId) {
			t.Errorf("%s: authority key identifier %x", role, c.AuthorityKeyId)
		}
	}
	if !intermediate.MaxPathLenZero || intermediate.MaxPathLen != 0 {
		t.Errorf("the intermediate's path length is %d", intermediate.MaxPathLen)
	}
	if d := root.NotAfter.Sub(root.NotBefore); d != 10*365*24*time.Hour+2*time.Minute {
		t.Errorf("the root lives %v", d)
	}
}

func TestServingCertificateProvesNoIdentity(t *testing.T) {
	k := catest.New(t)
	key := catest.NewKey(t)
	names := ca.ServingNames{DNS: []string{"meshca.test"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}}
	chain, err := k.Authority.IssueServing(t.Context(), names, key.Public())
	check(t, err)
	leaf := chain[0]
	if len(leaf.URIs) != 0 || !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) || leaf.IsCA {
		t.Errorf("URIs %v, extended key usage %v, CA %v", leaf.URIs, leaf.ExtKeyUsage, leaf.IsCA)
	}
	bundle, _ := k.Authority.Bundle()
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(bundle.Authorities()[0])
	intermediates.AddCert(chain[1])
	for _, host := range []string{"meshca.test", "127.0.0.1"} {
		_, err := leaf.Verify(x509.VerifyOptions{DNSName: host, Roots: roots, Intermediates: intermediates})
		check(t, err)
	}
	if id, err := identity.Verify(chain, identity.Server, bundle, time.Now()); err == nil {
		t.Errorf("the serving certificate proves %v", id)
	}
	if _, err := k.Authority.IssueServing(t.Context(), ca.ServingNames{DNS: []string{"*.test"}}, key.Public()); err == nil {
		t.Error("a wildcard is issued")
	}
}

func TestV52_SigningTakesAnAuthenticatedCaller(t *testing.T) {
	k := catest.New(t)
	pub := catest.NewKey(t).Public()
	for name, who := range map[string]*caller.Caller{"nil": nil, "zero": new(caller.Caller)} {
		if issued, err := k.Authority.Issue(t.Context(), who, pub, 0); err == nil {
			t.Errorf("%s caller: issued %v", name, issued.Chain[0].URIs)
		}
	}
	other := catest.New(t, catest.WithTrustDomain("other.test"))
	if issued, err := k.Authority.Issue(t.Context(), other.Caller(t, "shop", "cart"), pub, 0); err == nil {
		t.Errorf("caller of another trust domain: issued %v", issued.Chain[0].URIs)
	}
	// No other way of naming an identity leads in.
	typ := reflect.TypeOf(k.Authority)
	for i := range typ.NumMethod() {
		m := typ.Method(i)
		for j := 1; j < m.Type.NumIn(); j++ {
			switch m.Type.In(j) {
			case reflect.TypeOf(identity.ID{}), reflect.TypeOf(""), reflect.TypeOf(&x509.Certificate{}):
				t.Errorf("method %s takes a %v", m.Name, m.Type.In(j))
			}
		}
	}
}

// V52: there is one function that makes leaves, and three that call it.
func TestV52_OneSigningFunction(t *testing.T) {
	calls := map[string][]string{} // called function -> where
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "tools" || d.Name() == "test" || d.Name() == ".git" || strings.HasSuffix(d.Name(), "test") && d.Name() != "..") {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			where := filepath.ToSlash(filepath.Join("..", path))[len("../../"):] + " " + f.Name.Name
			ast.Inspect(f, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				switch fun := call.Fun.(type) {
				case *ast.SelectorExpr:
					calls[fun.Sel.Name] = append(calls[fun.Sel.Name], where)
				case *ast.Ident:
					calls[fun.Name] = append(calls[fun.Name], where)
				}
				return true
			})
		}
		return nil
	})
	check(t, err)
	for function, want := range map[string][]string{
		"CreateCertificate": {"ca/issue.go makeLeaf", "ca/root.go NewRoot", "ca/rootsign.go Sign"},
		"makeLeaf":          {"ca/issue.go sign"},
	} {
		var got []string
		for _, where := range calls[function] {
			if strings.HasPrefix(where, "ca/") {
				got = append(got, where)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s is called by %q, want %q", function, got, want)
		}
	}
	var signers []string
	for _, where := range calls["sign"] {
		if strings.HasPrefix(where, "ca/") && strings.Count(where, "/") == 1 {
			signers = append(signers, where)
		}
	}
	slices.Sort(signers)
	if want := []string{"ca/issue.go issue", "ca/issue.go issueServing", "ca/issuer.go prove"}; !slices.Equal(signers, want) {
		t.Errorf("sign is called by %q, want %q", signers, want)
	}
}

// Both encodings of time, both sides of 2050, and the end of the calendar.
func TestF53_TimesAreEncodedRight(t *testing.T) {
	for _, now := range []time.Time{
		time.Date(2038, 1, 19, 3, 14, 7, 0, time.UTC), // 32-bit edge
		time.Date(2049, 12, 31, 23, 30, 0, 0, time.UTC),
		time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Date(2016, 12, 31, 23, 59, 59, 999, time.UTC), // before a leap second
		time.Date(9980, 6, 1, 0, 0, 0, 0, time.UTC),
	} {
		t.Run(now.Format(time.DateOnly), func(t *testing.T) {
			k := catest.New(t, catest.WithClock(func() time.Time { return now }))
			svid := k.SVID(t, "shop", "cart", time.Hour)
			if want := now.Truncate(time.Second).Add(time.Hour); !svid.Leaf().NotAfter.Equal(want) {
				t.Errorf("ends %v, want %v", svid.Leaf().NotAfter, want)
			}
			_, err := identity.Verify(svid.Certificates(), identity.Server, k.Authority.Bundles(), now)
			check(t, err)
		})
	}
}

func BenchmarkIssueP256(b *testing.B) {
	k := catest.New(b)
	who, pub := k.Caller(b, "shop", "cart"), catest.NewKey(b).Public()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := k.Authority.Issue(b.Context(), who, pub, 0); err != nil {
			b.Fatal(err)
		}
	}
}
