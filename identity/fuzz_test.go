package identity_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// fuzzKey signs what fuzzing makes. Its scalar is 1: the processes of one fuzzing
// run then sign with the same key.
var fuzzKey = func() *ecdsa.PrivateKey {
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), append(make([]byte, 31), 1))
	if err != nil {
		panic(err)
	}
	return key
}()

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"", "spiffe://cluster.local", cart, "spiffe://a/b//c", "SPIFFE://a/b", "spiffe://a/../b", "spiffe://a/%2e", "spiffe://a:1/b",
		"spiffe://a/b?c#d", "spiffe://\x00/a", "spiffe://a..b/c", "https://a/b", "spiffe://a/ns/sa/sa/sa"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := identity.ParseID(s)
		if err != nil {
			return
		}
		if id.String() != s || len(s) > identity.MaxIDLength {
			t.Fatalf("%q prints as %q", s, id)
		}
		if "spiffe://"+id.TrustDomain().String()+id.Path() != s {
			t.Errorf("%q is not its trust domain and its path", s)
		}
		if again, err := identity.ParseID(id.String()); err != nil || again != id {
			t.Errorf("%q is read back as %v, %v", s, again, err)
		}
		if _, err := spiffeid.FromString(s); err != nil {
			t.Errorf("%q: go-spiffe refuses it: %v", s, err)
		}
		if ns, sa, ok := id.Workload(); ok {
			if again, err := identity.WorkloadID(id.TrustDomain(), ns, sa); err != nil || again != id {
				t.Errorf("%q is made of %q and %q, which make %v, %v", s, ns, sa, again, err)
			}
		}
	})
}

func FuzzWorkloadID(f *testing.F) {
	for _, s := range hostileNames {
		f.Add(s, "default")
		f.Add("default", s)
	}
	f.Fuzz(func(t *testing.T, ns, sa string) {
		td, err := identity.ParseTrustDomain("cluster.local")
		if err != nil {
			t.Fatal(err)
		}
		id, err := identity.WorkloadID(td, ns, sa)
		if err != nil {
			return
		}
		if id.String() != "spiffe://cluster.local/ns/"+ns+"/sa/"+sa {
			t.Errorf("%q and %q make %q", ns, sa, id)
		}
		if n, s, ok := id.Workload(); !ok || n != ns || s != sa {
			t.Errorf("%q and %q come back as %q and %q", ns, sa, n, s)
		}
	})
}

func FuzzParseTrustDomain(f *testing.F) {
	for _, s := range []string{"", "cluster.local", "192.0.2.7", "spiffe://a", "a:1", "a/b", "A", ".", "a..b", "a.", "a_b", "é", "a\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		td, err := identity.ParseTrustDomain(s)
		if err != nil {
			return
		}
		if td.String() != s || td.IsZero() || len(s) > identity.MaxTrustDomainLength {
			t.Fatalf("%q prints as %q", s, td)
		}
		id, err := identity.ParseID("spiffe://" + s)
		if err != nil || id.TrustDomain() != td || id != td.ID() {
			t.Errorf("the ID of %q is %v, %v", s, id, err)
		}
		// Whatever is taken as a setting can stand in a certificate.
		if _, err := x509.ParseCertificate(idCertificate(t, td.ID().String())); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	})
}

// idCertificate is a self-signed certificate that carries the URI.
func idCertificate(t *testing.T, uri string) []byte {
	t.Helper()
	template := &x509.Certificate{ExtraExtensions: []pkix.Extension{rawSAN(uriName(uri))}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, fuzzKey.Public(), fuzzKey)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func FuzzParseBundle(f *testing.F) {
	root := identitytest.NewCA(f, identitytest.TrustDomain(f, "cluster.local")).Root.Certificate
	good := entryFor(f, root)
	for _, keys := range [][]entry{{}, {good}, {good.with("use", "jwt-svid"), good}, {good.with("x5c", []any{good["x5c"].([]string)[0], 1})}, {good.without("kty")}} {
		f.Add(document(f, entry{"keys": keys, "spiffe_sequence": 7, "spiffe_refresh_hint": 300}))
	}
	for _, s := range []string{``, `{`, `{}`, `[]`, `null`, `{"keys":null}`, `{"keys":[]}}`, `{"keys":[],"keys":[]}`, `{"keys":[],"spiffe_sequence":1e9}`} {
		f.Add([]byte(s))
	}
	td := identitytest.TrustDomain(f, "cluster.local")
	f.Fuzz(func(t *testing.T, doc []byte) {
		b, err := identity.ParseBundle(td, doc)
		if err != nil {
			return
		}
		out, err := json.Marshal(b)
		if err != nil {
			t.Fatalf("read and not to be written: %v", err)
		}
		again, err := identity.ParseBundle(td, out)
		if err != nil || !again.Equal(b) {
			t.Errorf("%s\nis read back as another bundle: %v", out, err)
		}
	})
}

func FuzzParsePEM(f *testing.F) {
	ca := identitytest.NewCA(f, identitytest.TrustDomain(f, "cluster.local"))
	one, two := identity.EncodePEM(ca.Root.Certificate), identity.EncodePEM(ca.Intermediate.Certificate)
	for _, seed := range [][]byte{nil, one, slices.Concat(one, two), slices.Concat(one, []byte("x\n"), two), one[1:], one[:len(one)-2],
		slices.Concat(one[:200], two), bytes.ReplaceAll(one, []byte("\n"), []byte("\r\n"))} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, err := identity.ParsePEM(data)
		if err != nil {
			return
		}
		if n := bytes.Count(data, []byte("-----BEGIN ")); n != len(certs) || n != bytes.Count(data, []byte("-----END ")) {
			t.Errorf("%d blocks begin and %d certificates are read", n, len(certs))
		}
		again, err := identity.ParsePEM(identity.EncodePEM(certs...))
		if err != nil || !slices.EqualFunc(again, certs, (*x509.Certificate).Equal) {
			t.Errorf("read back as %d certificates, %v", len(again), err)
		}
	})
}

// Whatever our parser reads, crypto/x509 must see the same URIs in, if it reads
// it at all.
func FuzzSANs(f *testing.F) {
	for _, der := range [][]byte{nil, {0x30, 0}, namesDER(uriName(cart)), namesDER(uriName(cart), uriName(pay)), namesDER(name(2, false, "a"), uriName(cart)),
		namesDER(name(6, true, cart)), namesDER(otherName(f, 12, "a\x00b")), namesDER(uriName("spiffe://a\x00b/c")), namesDER(name(9, false, "a")),
		{0x30, 0x80, 0x86, 0x01, 'a', 0, 0}, {0x30, 0x82, 0, 3, 0x86, 1, 'a'}, {0x10, 3, 0x86, 1, 'a'}, {0x30, 4, 0x9f, 6, 1, 'a'}} {
		f.Add(der)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		uris, err := identity.SANURIs(der)
		if err != nil {
			return
		}
		template := &x509.Certificate{ExtraExtensions: []pkix.Extension{{Id: oidSAN, Value: der}}}
		cert, err := x509.CreateCertificate(rand.Reader, template, template, fuzzKey.Public(), fuzzKey)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(cert)
		if err != nil {
			return
		}
		if len(c.URIs) != len(uris) {
			t.Errorf("%x: %q; crypto/x509 reads %q", der, uris, c.URIs)
		}
		for _, u := range uris {
			for i := range len(u) {
				if u[i] < 0x20 || u[i] > 0x7e {
					t.Errorf("%x: %q", der, u)
				}
			}
		}
	})
}

// Whatever we believe, go-spiffe believes too, and for the same ID. A leaf is
// made of raw extensions (none where the input is empty) under a true signature,
// so that it is the judgement that is tried and not the parser of signatures.
func FuzzVerify(f *testing.F) {
	ca := identitytest.NewCA(f, identitytest.TrustDomain(f, "cluster.local"))
	bundle, now := ca.Bundle(), time.Now()
	san := namesDER(uriName(cart))
	usage := []byte{3, 2, 7, 0x80}
	both := mustDER(f, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 1}, {1, 3, 6, 1, 5, 5, 7, 3, 2}})
	noCA, isCA := []byte{0x30, 0}, []byte{0x30, 3, 1, 1, 0xff}
	const allCritical, hour = 0xff, 3600
	f.Add(san, usage, both, noCA, byte(allCritical), int32(hour), true)
	f.Add(san, usage, both, isCA, byte(allCritical), int32(hour), true)
	f.Add(san, usage, []byte{}, []byte{}, byte(3), int32(hour), false)
	f.Add(san, usage, []byte{0x30, 0}, noCA, byte(3), int32(hour), false)
	f.Add(san, []byte{3, 2, 1, 0x86}, both, noCA, byte(3), int32(hour), false)
	f.Add(san, []byte{}, both, noCA, byte(3), int32(-hour), false)
	f.Add(san, usage, both, noCA, byte(0), int32(0), false)
	for _, names := range [][]asn1.RawValue{{}, {uriName(cart), uriName(pay)}, {uriName("spiffe://evil.cluster.local/a")}, {uriName("spiffe://cluster.local")},
		{name(6, true, cart)}, {uriName(cart), otherName(f, 12, "a\x00b")}, {uriName(cart), name(2, false, "a.example")}} {
		f.Add(namesDER(names...), usage, both, noCA, byte(allCritical), int32(hour), true)
	}
	f.Fuzz(func(t *testing.T, san, usage, extUsage, basic []byte, critical byte, lifetime int32, client bool) {
		template := &x509.Certificate{NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Duration(lifetime) * time.Second)}
		for i, e := range []pkix.Extension{{Id: oidSAN, Value: san}, {Id: oidKeyUsage, Value: usage}, {Id: oidExtKeyUsage, Value: extUsage}, {Id: oidBasic, Value: basic}} {
			if e.Critical = critical&(1<<i) != 0; len(e.Value) > 0 {
				template.ExtraExtensions = append(template.ExtraExtensions, e)
			}
		}
		der, err := x509.CreateCertificate(rand.Reader, template, ca.Intermediate.Certificate, fuzzKey.Public(), ca.Intermediate.Key)
		if err != nil {
			return // an end before the beginning
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		chain, role := []*x509.Certificate{leaf, ca.Intermediate.Certificate}, identity.Server
		if client {
			role = identity.Client
		}
		got, err := identity.Verify(chain, role, bundle, now)
		if err != nil {
			if !got.IsZero() {
				t.Errorf("%v beside %v", got, err)
			}
			return
		}
		if ref, err := referenceVerify(chain, bundle, now); err != nil || ref.String() != got.String() {
			t.Errorf("we believe %s; go-spiffe: %v, %v", got, ref, err)
		}
		if got.TrustDomain() != bundle.TrustDomain() || got.Path() == "" || leaf.IsCA || now.After(leaf.NotAfter) {
			t.Errorf("%s is believed", got)
		}
	})
}

// A chain of any certificates in any order: crypto/x509 by itself, asked about
// the root of the leaf's own domain alone, must agree. pick chooses from the
// certificates of the set of peers.
func FuzzVerifyChain(f *testing.F) {
	peers := identitytest.NewPeers(f, identitytest.ID(f, cart))
	var all []*x509.Certificate
	number := func(c *x509.Certificate) byte {
		at := slices.IndexFunc(all, func(o *x509.Certificate) bool { return bytes.Equal(o.Raw, c.Raw) })
		if at < 0 {
			at, all = len(all), append(all, c)
		}
		return byte(at)
	}
	for _, p := range peers.All {
		var pick []byte
		for _, c := range p.Chain {
			pick = append(pick, number(c))
		}
		f.Add(pick, true)
		f.Add(pick, false)
	}
	f.Fuzz(func(t *testing.T, pick []byte, client bool) {
		var chain []*x509.Certificate
		for _, n := range pick {
			chain = append(chain, all[int(n)%len(all)])
		}
		role, usage := identity.Server, x509.ExtKeyUsageServerAuth
		if client {
			role, usage = identity.Client, x509.ExtKeyUsageClientAuth
		}
		got, err := identity.Verify(chain, role, peers, peers.Now)
		if (err == nil) == got.IsZero() {
			t.Fatalf("%v beside %v", got, err)
		}
		theirs := stockVerify(chain, usage, peers)
		if err == nil && (theirs != nil || len(chain) > 10 || len(chain[0].URIs) != 1 || chain[0].URIs[0].String() != got.String()) {
			t.Errorf("we believe %s; crypto/x509: %v", got, theirs)
		}
		if err != nil && theirs == nil && len(chain) <= 10 {
			// What the standard asks of a leaf, and crypto/x509 does not know.
			leaf := chain[0]
			named := slices.ContainsFunc(leaf.ExtKeyUsage, func(u x509.ExtKeyUsage) bool { return u == usage })
			if _, claimErr := identity.ClaimedID(leaf); claimErr == nil && (named || len(leaf.ExtKeyUsage) == 0) {
				t.Errorf("crypto/x509 believes it; we: %v", err)
			}
		}
	})
}

// stockVerify asks crypto/x509 whether the root of the domain that the leaf
// names stands behind the chain.
func stockVerify(chain []*x509.Certificate, usage x509.ExtKeyUsage, peers *identitytest.Peers) error {
	if len(chain) == 0 || len(chain[0].URIs) == 0 {
		return errors.New("no name")
	}
	options := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: peers.Now, KeyUsages: []x509.ExtKeyUsage{usage},
	}
	for _, ca := range []*identitytest.CA{peers.Own, peers.Partner} {
		if ca.TrustDomain.String() == chain[0].URIs[0].Host {
			options.Roots.AddCert(ca.Root.Certificate)
		}
	}
	for _, c := range chain[1:] {
		options.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(options)
	return err
}
