package identity_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// entry is one JWK of a bundle document; tests change what they need.
type entry map[string]any

// entryFor is the entry that a publisher by the book makes for an authority.
func entryFor(t testing.TB, c *x509.Certificate) entry {
	t.Helper()
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		t.Fatalf("a key of type %T", c.PublicKey)
	}
	point, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return entry{
		"use": "x509-svid", "kty": "EC", "crv": "P-256",
		"x":   base64.RawURLEncoding.EncodeToString(point[1:33]),
		"y":   base64.RawURLEncoding.EncodeToString(point[33:]),
		"x5c": []string{base64.StdEncoding.EncodeToString(c.Raw)},
	}
}

func (e entry) with(name string, value any) entry {
	e = maps.Clone(e)
	e[name] = value
	return e
}

func (e entry) without(name string) entry {
	e = maps.Clone(e)
	delete(e, name)
	return e
}

func document(t testing.TB, members entry) []byte {
	t.Helper()
	doc, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// parsed demands that the document is read, and as these authorities.
func parsed(t *testing.T, doc []byte, want ...*x509.Certificate) *identity.Bundle {
	t.Helper()
	b, err := identity.ParseBundle(identitytest.TrustDomain(t, "cluster.local"), doc)
	if err != nil {
		t.Errorf("%.300s: %v", doc, err)
		return nil
	}
	if !slices.EqualFunc(b.Authorities(), want, (*x509.Certificate).Equal) {
		t.Errorf("%.300s: %d authorities; want %d", doc, len(b.Authorities()), len(want))
	}
	return b
}

func unparsed(t *testing.T, docs ...string) {
	t.Helper()
	for _, doc := range docs {
		if b, err := identity.ParseBundle(identitytest.TrustDomain(t, "cluster.local"), []byte(doc)); err == nil {
			t.Errorf("%.300s: read with %d authorities, sequence %d", doc, len(b.Authorities()), b.Sequence())
		} else if len(err.Error()) > 1<<10 || strings.ContainsAny(err.Error(), "\n\x00\x1b") {
			t.Errorf("%.60q…: the error is too long or repeats control bytes: %.400q", doc, err)
		}
	}
}

func TestSPIFFE28_KeysMustBeThereAndMayBeEmpty(t *testing.T) {
	unparsed(t, `{}`, `{"spiffe_sequence":1}`, `{"keys":null}`, `{"keys":{}}`, `{"keys":"x"}`, `{"Keys":[]}`, ``, `[]`, `null`, `"keys"`, `{`, `{"keys":[]`, `{"keys":[1]}`)
	parsed(t, []byte(`{"keys":[]}`))
}

func TestSPIFFE29_Sequence(t *testing.T) {
	for text, want := range map[string]uint64{"0": 0, "7": 7, "9007199254740993": 1<<53 + 1, "18446744073709551615": math.MaxUint64} {
		if b := parsed(t, []byte(`{"keys":[],"spiffe_sequence":`+text+`}`)); b != nil && b.Sequence() != want {
			t.Errorf("%s is read as %d", text, b.Sequence())
		}
	}
	for _, text := range []string{"18446744073709551616", "-1", "-0", "1.0", "1e3", `"5"`, "null", "[]", "true", strings.Repeat("9", 100_000)} {
		unparsed(t, `{"keys":[],"spiffe_sequence":`+text+`}`)
	}
}

func TestSPIFFE30_RefreshHint(t *testing.T) {
	for text, want := range map[string]time.Duration{"0": 0, "300": 5 * time.Minute} {
		if b := parsed(t, []byte(`{"keys":[],"spiffe_refresh_hint":`+text+`}`)); b != nil && b.RefreshHint() != want {
			t.Errorf("%s is read as %v", text, b.RefreshHint())
		}
	}
	for _, text := range []string{"-1", "1.5", "1e3", `"300"`, "null", "9223372037", "18446744074", "9223372036854775807", "9223372036854775808"} {
		unparsed(t, `{"keys":[],"spiffe_refresh_hint":`+text+`}`)
	}
	td := identitytest.TrustDomain(t, "cluster.local")
	if _, err := identity.NewBundle(td, identity.BundleConfig{RefreshHint: -time.Second}); err == nil {
		t.Error("a negative hint is accepted")
	}
}

func TestSPIFFE31_UnknownUseOrKeyTypeIsSkipped(t *testing.T) {
	root := newCA(t).Root.Certificate
	good := entryFor(t, root)
	for what, e := range map[string]entry{
		"no use":           good.without("use"),
		"unknown use":      good.with("use", "x509-svid-2"),
		"use in capitals":  good.with("use", "X509-SVID"),
		"Use for use":      good.without("use").with("Use", "x509-svid"),
		"use of no string": good.with("use", []string{"x509-svid"}),
		"no kty":           good.without("kty"),
		"unknown kty":      good.with("kty", "AKP"),
		"kty of no string": good.with("kty", 5),
		"symmetric":        good.with("kty", "oct"),
		"jwt-svid":         good.with("use", "jwt-svid").with("kid", "1"),
		// Nothing else in a skipped entry has to make sense.
		"unknown, odd x5c":    good.with("use", "new").with("x5c", 7),
		"unknown, broken x5c": good.with("kty", "new").with("x5c", []string{"***"}),
		"empty":               {},
	} {
		t.Run(what, func(t *testing.T) {
			parsed(t, document(t, entry{"keys": []entry{e, good}}), root)
			parsed(t, document(t, entry{"keys": []entry{e}}))
		})
	}
}

func TestSPIFFE32_SPIFFE35_WhatWePublish(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	b := newBundle(t, identity.BundleConfig{
		Sequence: math.MaxUint64, RefreshHint: 5*time.Minute + time.Millisecond,
		Authorities: []*x509.Certificate{ca.Root.Certificate, other.Root.Certificate, ca.Root.Certificate},
	})
	doc, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	var top map[string]json.RawMessage
	var keys []map[string]json.RawMessage
	if err := json.Unmarshal(doc, &top); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(top["keys"], &keys); err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(top)); !slices.Equal(got, []string{"keys", "spiffe_refresh_hint", "spiffe_sequence"}) ||
		string(top["spiffe_sequence"]) != "18446744073709551615" || string(top["spiffe_refresh_hint"]) != "300" {
		t.Errorf("%s", doc)
	}
	if len(keys) != 2 {
		t.Fatalf("%d entries; want 2", len(keys))
	}
	for i, k := range keys {
		if got := slices.Sorted(maps.Keys(k)); !slices.Equal(got, []string{"crv", "kty", "use", "x", "x5c", "y"}) {
			t.Errorf("entry %d has the members %q", i, got)
		}
		x5c := fmt.Sprintf("[%q]", base64.StdEncoding.EncodeToString(b.Authorities()[i].Raw))
		if string(k["use"]) != `"x509-svid"` || string(k["x5c"]) != x5c {
			t.Errorf("entry %d: %s", i, doc)
		}
	}
	if again := parsed(t, doc, b.Authorities()...); again != nil && !again.Equal(b) {
		t.Error("what is read back is another bundle")
	}
	empty := newBundle(t, identity.BundleConfig{})
	if doc, err := json.Marshal(empty); err != nil || string(doc) != `{"keys":[],"spiffe_sequence":0}` {
		t.Errorf("the empty bundle: %s, %v", doc, err)
	}
	// Members that nobody has defined are no obstacle, and none is needed.
	parsed(t, document(t, entry{"keys": []entry{entryFor(t, ca.Root.Certificate).with("kid", "x").with("new", 1)}, "new": []int{1}}), ca.Root.Certificate)
}

func TestSPIFFE33_OnlyTheFirstCertificateCounts(t *testing.T) {
	first, second := newCA(t).Root.Certificate, newCA(t).Root.Certificate
	b64 := func(c *x509.Certificate) string { return base64.StdEncoding.EncodeToString(c.Raw) }
	good := entryFor(t, first)
	keys := func(e entry) []byte { return document(t, entry{"keys": []entry{e}}) }

	parsed(t, keys(good.with("x5c", []string{b64(first), b64(second)})), first)
	parsed(t, keys(good.with("x5c", []any{b64(first), "***", 7})), first)
	parsed(t, keys(good.without("x5c")))
	parsed(t, keys(good.with("x5c", []string{})))
	parsed(t, keys(good.with("x5c", nil)))

	for what, x5c := range map[string]any{
		"not an array": b64(first), "not base64": []string{"***"}, "no string": []any{7}, "empty": []string{""},
		"URL-safe": []string{strings.NewReplacer("+", "-", "/", "_").Replace(b64(first)) + "__"},
		"no DER":   []string{"AAAA"}, "trailing bytes": []string{base64.StdEncoding.EncodeToString(append(first.Raw[:len(first.Raw):len(first.Raw)], 0))},
	} {
		t.Run(what, func(t *testing.T) { unparsed(t, string(keys(good.with("x5c", x5c)))) })
	}
}

// RFC 7517 §4.7: an entry is about one key.
func TestBundleEntryIsAboutOneKey(t *testing.T) {
	first, second := newCA(t).Root.Certificate, newCA(t).Root.Certificate
	good := entryFor(t, first)
	for what, e := range map[string]entry{
		"another's certificate": good.with("x5c", entryFor(t, second)["x5c"]),
		"another type":          good.with("kty", "RSA").with("n", "AQAB").with("e", "AQAB"),
		"no key":                good.without("x"),
		"a broken key":          good.with("x", "AAAA"),
	} {
		t.Run(what, func(t *testing.T) { unparsed(t, string(document(t, entry{"keys": []entry{e}}))) })
	}
}

// Two readers of one document must hold the same authorities.
func TestBundleDocumentIsReadInOneWay(t *testing.T) {
	root := newCA(t).Root.Certificate
	key := string(document(t, entryFor(t, root)))
	dup := strings.Replace(key, `"use":"x509-svid"`, `"use":"jwt-svid","use":"x509-svid"`, 1)
	if dup == key {
		t.Fatal("nothing doubled")
	}
	good := `{"keys":[` + key + `]}`
	unparsed(t,
		`{"keys":[],"keys":[`+key+`]}`, `{"keys":[`+key+`],"keys":[]}`, `{"keys":[],"k\u0065ys":[`+key+`]}`,
		`{"keys":[],"spiffe_sequence":1,"spiffe_sequence":2}`, `{"keys":[],"x":1,"x":1}`, `{"keys":[`+dup+`]}`,
		good+`{}`, good+`}`, good+`]`, good+`x`, good+good, good+`,`, good+"\x00", "\ufeff"+good, `[`+good+`]`,
		strings.Repeat(`[`, 100_000), `{"keys":`+strings.Repeat(`[`, 100_000), strings.Repeat(`{"a":`, 100_000))
	parsed(t, []byte(" \n"+good+"\r\n "), root)
	// Other spellings are other members.
	parsed(t, []byte(`{"keys":[],"Keys":[`+key+`],"KEYS":[`+key+`]}`))
}

func TestV43_OnlyAuthoritiesAreAnchors(t *testing.T) {
	ca := newCA(t)
	leaf := ca.SVID(t, identitytest.ID(t, cart)).Leaf()
	mut := func(f func(*x509.Certificate)) *x509.Certificate {
		return newCA(t, identitytest.WithRootTemplate(f)).Root.Certificate
	}
	for what, c := range map[string]*x509.Certificate{
		"a leaf":                leaf,
		"no basic constraints":  mut(func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = false, false }),
		"cA=false":              mut(func(c *x509.Certificate) { c.IsCA = false }),
		"no key usage":          mut(func(c *x509.Certificate) { c.KeyUsage = 0 }),
		"cRLSign only":          mut(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }),
		"digitalSignature only": mut(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }),
	} {
		t.Run(what, func(t *testing.T) {
			td := ca.TrustDomain
			if _, err := identity.NewBundle(td, identity.BundleConfig{Authorities: []*x509.Certificate{ca.Root.Certificate, c}}); err == nil {
				t.Error("NewBundle takes it")
			}
			unparsed(t, string(document(t, entry{"keys": []entry{entryFor(t, ca.Root.Certificate), entryFor(t, c)}})))
		})
	}
}

func TestSPIFFE17_AnAuthorityMaySignCertificates(t *testing.T) {
	for usage, want := range map[x509.KeyUsage]bool{
		x509.KeyUsageCertSign: true, x509.KeyUsageCertSign | x509.KeyUsageCRLSign: true, x509.KeyUsageCRLSign: false,
	} {
		root := newCA(t, identitytest.WithRootTemplate(func(c *x509.Certificate) { c.KeyUsage = usage })).Root.Certificate
		_, err := identity.NewBundle(identitytest.TrustDomain(t, "cluster.local"), identity.BundleConfig{Authorities: []*x509.Certificate{root}})
		if (err == nil) != want {
			t.Errorf("key usage %b: %v", usage, err)
		}
	}
}

func TestV63_BundlesAreBounded(t *testing.T) {
	unparsed(t, `{"keys":[]}`+strings.Repeat(" ", identity.MaxBundleBytes))
	var many []*x509.Certificate
	ca := newCA(t)
	for range identity.MaxBundleAuthorities + 1 {
		many = append(many, ca.NewIntermediate(t, nil, ca.Root.Key).Certificate)
	}
	td := ca.TrustDomain
	if _, err := identity.NewBundle(td, identity.BundleConfig{Authorities: many[1:]}); err != nil {
		t.Error(err)
	}
	if _, err := identity.NewBundle(td, identity.BundleConfig{Authorities: many}); err == nil {
		t.Error("too many authorities are accepted")
	}
	if _, err := identity.ParsePEM(append(identity.EncodePEM(many[0]), bytes.Repeat([]byte{'\n'}, identity.MaxCertificatePEM)...)); err == nil {
		t.Error("a PEM file that is too big is accepted")
	}
}

func TestBundleEqual(t *testing.T) {
	one, two := newCA(t).Root.Certificate, newCA(t).Root.Certificate
	all := []*identity.Bundle{nil, newBundle(t, identity.BundleConfig{}),
		newBundle(t, identity.BundleConfig{Sequence: 1}),
		newBundle(t, identity.BundleConfig{RefreshHint: time.Second}),
		newBundle(t, identity.BundleConfig{Authorities: []*x509.Certificate{one}}),
		newBundle(t, identity.BundleConfig{Authorities: []*x509.Certificate{one, two}}),
		newBundle(t, identity.BundleConfig{Authorities: []*x509.Certificate{two, one}}),
		identitytest.NewCA(t, identitytest.TrustDomain(t, "other")).Bundle(),
	}
	for i, a := range all {
		for j, b := range all {
			if a.Equal(b) != (i == j) {
				t.Errorf("bundles %d and %d: equal is %v", i, j, a.Equal(b))
			}
		}
	}
}

func TestPEM(t *testing.T) {
	ca := newCA(t)
	one, two := ca.Root.Certificate, ca.Intermediate.Certificate
	text := string(identity.EncodePEM(one, two))
	first := string(identity.EncodePEM(one))
	second := string(identity.EncodePEM(two))
	body := strings.Split(first, "\n")
	for what, c := range map[string]string{
		"as written": text, "CRLF": strings.ReplaceAll(text, "\n", "\r\n"), "blank lines": "\n\n" + first + "\n\n" + second + "\n\n",
		"no last newline": strings.TrimSuffix(text, "\n"),
	} {
		if certs, err := identity.ParsePEM([]byte(c)); err != nil || len(certs) != 2 || !certs[0].Equal(one) || !certs[1].Equal(two) {
			t.Errorf("%s: %d certificates, %v", what, len(certs), err)
		}
	}
	for what, c := range map[string]struct{ text, says string }{
		"empty":                   {"", "none found"},
		"blank":                   {" \n", "none found"},
		"text only":               {"hvs.secret", "line 1: there is text outside"},
		"text before":             {"# roots\n" + text, "line 1: there is text outside"},
		"text between":            {first + "# next\n" + second, fmt.Sprintf("line %d: there is text outside", len(body))},
		"text after":              {text + "x", "text outside"},
		"a dash lost":             {strings.TrimPrefix(text, "-"), "line 1: there is text outside"},
		"a dash lost further on":  {first + strings.TrimPrefix(second, "-"), "text outside"},
		"a private key":           {"-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n" + text, "line 1: a block of another kind"},
		"a key between":           {first + "-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n" + second, "a block of another kind"},
		"the first broken":        {strings.Replace(first, body[1], "***", 1) + second, "line 1: the block that begins here is malformed"},
		"the first without end":   {strings.Join(body[:len(body)-2], "\n") + "\n" + second, "line 1: the block that begins here is malformed"},
		"the second without end":  {first + strings.TrimSuffix(second, "-----\n"), "malformed"},
		"the first ends as a key": {strings.Replace(first, "-----END CERTIFICATE", "-----END PRIVATE KEY", 1) + second, "line 1: the block that begins here is malformed"},
		"headers":                 {strings.Replace(text, "CERTIFICATE-----\n", "CERTIFICATE-----\nProc-Type: 4\n\n", 1), "headers"},
		"no certificate":          {"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "line 1"},
		"an empty block":          {"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "line 1"},
	} {
		t.Run(what, func(t *testing.T) {
			certs, err := identity.ParsePEM([]byte(c.text))
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%d certificates, %v; want %q", len(certs), err, c.says)
			} else if strings.Contains(err.Error(), "secret") {
				t.Errorf("the file's text is in the error: %v", err)
			}
		})
	}
}

func TestBundleKeyTypes(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{rsaKey, edKey, p384} {
		b := newCA(t, identitytest.WithCAKeys(func(testing.TB) crypto.Signer { return key })).Bundle()
		doc, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		if again := parsed(t, doc, b.Authorities()...); again != nil && !again.Equal(b) {
			t.Errorf("%T: what is read back is another bundle", key)
		}
		if certs, err := x509.ParseCertificates(b.MarshalDER()); err != nil || len(certs) != 1 {
			t.Errorf("%T: DER: %v", key, err)
		}
		if certs, err := identity.ParsePEM(b.MarshalPEM()); err != nil || len(certs) != 1 {
			t.Errorf("%T: PEM: %v", key, err)
		}
	}
}
