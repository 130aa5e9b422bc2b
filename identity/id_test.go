package identity_test

import (
	"strings"
	"testing"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func refuseIDs(t *testing.T, ids ...string) {
	t.Helper()
	for _, s := range ids {
		if id, err := identity.ParseID(s); err == nil {
			t.Errorf("ParseID(%q) = %v; want a refusal", s, id)
		} else if !id.IsZero() {
			t.Errorf("ParseID(%q) returns %v beside its error", s, id)
		}
	}
}

func acceptIDs(t *testing.T, ids ...string) {
	t.Helper()
	for _, s := range ids {
		if id, err := identity.ParseID(s); err != nil {
			t.Error(err)
		} else if id.String() != s {
			t.Errorf("ParseID(%q) prints as %q", s, id)
		}
	}
}

func TestSPIFFE1_SchemeIsSPIFFE(t *testing.T) {
	refuseIDs(t, "", "a", "/a", "example.org/a", "://example.org/a", "spiffe", "spiffe:", "spiffe:/", "spiffe:/example.org/a",
		"spiffe:example.org/a", "http://example.org/a", "spiffes://example.org/a", " spiffe://example.org/a")
}

func TestSPIFFE2_TrustDomainIsNotEmpty(t *testing.T) {
	refuseIDs(t, "spiffe://", "spiffe:///", "spiffe:///ns/a/sa/b")
	if _, err := identity.ParseTrustDomain(""); err == nil {
		t.Error("the empty trust domain is accepted")
	}
	if _, err := identity.WorkloadID(identity.TrustDomain{}, "a", "b"); err == nil {
		t.Error("WorkloadID without a trust domain is accepted")
	}
}

func TestSPIFFE3_NoUserinfoNoPort(t *testing.T) {
	refuseIDs(t, "spiffe://user@example.org/a", "spiffe://user:pw@example.org/a", "spiffe://example.org:443/a",
		"spiffe://example.org:/a", "spiffe://@example.org/a")
}

func TestSPIFFE4_TrustDomainAlphabet(t *testing.T) {
	acceptIDs(t, "spiffe://a", "spiffe://a-b_c.d9/x", "spiffe://192.0.2.7/x", "spiffe://1/x", "spiffe://cluster.local")
	refuseIDs(t, "spiffe://[2001:db8::1]/x", "spiffe://exa%6dple.org/x", "spiffe://exämple.org/x", "spiffe://a b/x",
		"spiffe://a~b/x", "spiffe://a\x00b/x", "spiffe://a+b/x", "spiffe://a*/x", "spiffe://a,b/x", "spiffe://a\n/x")
	for _, name := range []string{"a", "a-b_c.d9", "192.0.2.7", "cluster.local"} {
		if td, err := identity.ParseTrustDomain(name); err != nil || td.String() != name {
			t.Errorf("ParseTrustDomain(%q) = %v, %v", name, td, err)
		}
	}
	for _, name := range []string{"[::1]", "exa%6dple", "é", "a b", "a\x00", "a+b", "*", "*.a"} {
		if _, err := identity.ParseTrustDomain(name); err == nil {
			t.Errorf("ParseTrustDomain(%q) is accepted", name)
		}
	}
}

func TestParseTrustDomainTakesBareNamesOnly(t *testing.T) {
	for _, name := range []string{"spiffe://example.org", "spiffe://example.org/ns/a", "example.org/", "example.org:443", ":/a", "/"} {
		if td, err := identity.ParseTrustDomain(name); err == nil {
			t.Errorf("ParseTrustDomain(%q) = %v; want a refusal", name, td)
		}
	}
}

// A certificate for such a domain could be signed and never read back.
func TestParseTrustDomainRefusesEmptyParts(t *testing.T) {
	for _, name := range []string{".", "..", "a.", ".a", "a..b"} {
		if td, err := identity.ParseTrustDomain(name); err == nil {
			t.Errorf("ParseTrustDomain(%q) = %v; want a refusal", name, td)
		}
	}
}

func TestSPIFFE5_NoQueryNoFragment(t *testing.T) {
	refuseIDs(t, "spiffe://example.org/a?b=c", "spiffe://example.org/a?", "spiffe://example.org?x", "spiffe://example.org/a#b",
		"spiffe://example.org/a#", "spiffe://example.org#")
}

func TestSPIFFE6_PathIsNeverNormalised(t *testing.T) {
	acceptIDs(t, "spiffe://example.org/a", "spiffe://example.org/A/b-c_d.e/9", "spiffe://example.org/...", "spiffe://example.org/.a",
		"spiffe://example.org/a..b")
	refuseIDs(t, "spiffe://example.org/", "spiffe://example.org/a/", "spiffe://example.org//a", "spiffe://example.org/a//b",
		"spiffe://example.org/./a", "spiffe://example.org/a/..", "spiffe://example.org/../a", "spiffe://example.org/%61",
		"spiffe://example.org/a%2fb", "spiffe://example.org/a b", "spiffe://example.org/é", "spiffe://example.org/a\x00",
		"spiffe://example.org/a:b", "spiffe://example.org/a*", "spiffe://example.org/a@b", "spiffe://example.org/a\\b")
}

// The strict reading: nothing needs to be folded, because upper case never
// gets in; the path keeps its case.
func TestSPIFFE7_CaseOfSchemeAndTrustDomain(t *testing.T) {
	refuseIDs(t, "SPIFFE://example.org/a", "Spiffe://example.org/a", "spiffe://Example.org/a", "spiffe://EXAMPLE.ORG/a")
	if _, err := identity.ParseTrustDomain("Example.org"); err == nil {
		t.Error(`ParseTrustDomain("Example.org") is accepted`)
	}
	if identitytest.ID(t, "spiffe://example.org/a") == identitytest.ID(t, "spiffe://example.org/A") {
		t.Error("paths compare without regard to case")
	}
}

func TestSPIFFE8_Lengths(t *testing.T) {
	const prefix = "spiffe://example.org/"
	longest := prefix + strings.Repeat("a", identity.MaxIDLength-len(prefix))
	acceptIDs(t, longest)
	refuseIDs(t, longest+"a")

	domain := strings.Repeat("d", identity.MaxTrustDomainLength)
	acceptIDs(t, "spiffe://"+domain+"/a")
	refuseIDs(t, "spiffe://"+domain+"d/a")
	if _, err := identity.ParseTrustDomain(domain); err != nil {
		t.Error(err)
	}
	if _, err := identity.ParseTrustDomain(domain + "d"); err == nil {
		t.Error("a trust domain of 256 bytes is accepted")
	}
	td := identitytest.TrustDomain(t, domain)
	id, err := identity.WorkloadID(td, strings.Repeat("n", 63), strings.Repeat("s", 253))
	if err != nil || len(id.String()) > identity.MaxIDLength {
		t.Errorf("the longest workload ID has %d bytes, %v", len(id.String()), err)
	}
}

// hostileNames are what has been used to make two parts of a path into three.
var hostileNames = []string{"", ".", "..", "a/..", "../a", "a/b", "/a", "a/", "%2f", "a%2fb", "a//b", "a\x00b", "a\nb", "é", "ａ",
	"A", "a_b", "-a", "a-", "a:b", "a?b", "a#b", "a*", "a@b", "a b", "a,b", "a\\b", "spiffe://x"}

func TestV2_WorkloadIDIsMadeOfLabels(t *testing.T) {
	td := identitytest.TrustDomain(t, "cluster.local")
	for _, name := range append([]string{"a.b", strings.Repeat("a", 64)}, hostileNames...) {
		if id, err := identity.WorkloadID(td, name, "default"); err == nil {
			t.Errorf("namespace %q gives %v; want a refusal", name, id)
		}
	}
	for _, name := range append([]string{"a..b", ".a", "a.", "a.-b", strings.Repeat("a", 254)}, hostileNames...) {
		if id, err := identity.WorkloadID(td, "default", name); err == nil {
			t.Errorf("service account %q gives %v; want a refusal", name, id)
		}
	}
}

func TestWorkloadRoundTrip(t *testing.T) {
	td := identitytest.TrustDomain(t, "cluster.local")
	for _, c := range [][2]string{{"shop", "cart"}, {"sa", "ns"}, {"ns", "sa"}, {"a-1", "b.c-2.d"}, {"1", "2"}} {
		id, err := identity.WorkloadID(td, c[0], c[1])
		if err != nil {
			t.Error(err)
			continue
		}
		if ns, sa, ok := id.Workload(); !ok || ns != c[0] || sa != c[1] {
			t.Errorf("%s is taken apart into %q, %q, %v", id, ns, sa, ok)
		}
	}
	for _, s := range []string{"spiffe://d", "spiffe://d/ns/a", "spiffe://d/ns/a/sa", "spiffe://d/ns/a/sa/b/c", "spiffe://d/x/ns/a/sa/b",
		"spiffe://d/ns/a/x/sa/b", "spiffe://d/ns/A/sa/b", "spiffe://d/ns/a.b/sa/c", "spiffe://d/ns/a/sa/b_c", "spiffe://d/ns/sa/sa"} {
		if ns, sa, ok := identitytest.ID(t, s).Workload(); ok {
			t.Errorf("%s is taken for the workload %q, %q", s, ns, sa)
		}
	}
}

func TestV17_V33_NamesAreNoPatterns(t *testing.T) {
	td := identitytest.TrustDomain(t, "cluster.local")
	var ids []identity.ID
	for _, sa := range []string{"a.b", "a-b", "axb", "a.b.c", "ab", "a"} {
		id, err := identity.WorkloadID(td, "shop", sa)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	ids = append(ids, identitytest.ID(t, "spiffe://cluster-local/ns/shop/sa/a.b"), identitytest.ID(t, "spiffe://clusterxlocal/ns/shop/sa/a.b"))
	for i, a := range ids {
		for j, b := range ids {
			if ok := identity.AuthorizeIDs(a)(b) == nil; ok != (i == j) {
				t.Errorf("who expects %s lets %s pass: %v", a, b, ok)
			}
			sameDomain := a.TrustDomain().String() == b.TrustDomain().String()
			if ok := identity.AuthorizeTrustDomain(a.TrustDomain())(b) == nil; ok != sameDomain {
				t.Errorf("who expects members of %q lets %s pass: %v", a.TrustDomain(), b, ok)
			}
		}
	}
	if identity.AuthorizeIDs()(ids[0]) == nil {
		t.Error("an empty list lets somebody pass")
	}
	refuseIDs(t, "spiffe://cluster.local/ns/*/sa/a", "spiffe://*/ns/a/sa/b", "spiffe://*.local/a")
}
