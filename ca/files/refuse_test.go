package files

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// world is what bad sets are made of.
type world struct {
	root, policy, mesh *authority
	strangers          *authority // under another root
}

func newWorld(t testing.TB) *world {
	w := &world{root: newRoot(t, "Root CA")}
	w.policy = w.root.below(t, "Policy CA")
	w.mesh = w.policy.below(t, "Mesh CA")
	w.strangers = newRoot(t, "Stranger").below(t, "Stranger's CA")
	return w
}

// good is the set that the bad ones differ from.
func (w *world) good(t testing.TB) fileSet {
	return w.mesh.cacerts(t, certs(w.policy), w.root.cert)
}

// with is the good set with another CA under the policy CA.
func (w *world) with(t testing.TB, changes ...func(*x509.Certificate)) fileSet {
	return w.policy.below(t, "Mesh CA", changes...).cacerts(t, certs(w.policy), w.root.cert)
}

// bad is a set that must be refused.
type bad struct {
	name   string
	make   func(t testing.TB, w *world) fileSet
	file   string // at fault
	reason string // a part of the text
}

func badSets() []bad {
	return []bad{
		// What is there.
		{"no certificate", without("ca-cert.pem"), "ca-cert.pem", "it is missing"},
		{"no key", without("ca-key.pem"), "ca-key.pem", "it is missing"},
		{"no chain", without("cert-chain.pem"), "cert-chain.pem", "it is missing"},
		{"no roots", without("root-cert.pem"), "root-cert.pem", "it is missing"},
		{"both layouts", also("tls.crt", "x"), "", "both layouts"},

		// What can be read.
		{"a key too large", also("ca-key.pem", strings.Repeat("x", maxKeyBytes+1)), "ca-key.pem", "more than 8192 bytes"},
		{"a certificate too large", also("ca-cert.pem", strings.Repeat("x", maxCertBytes+1)), "ca-cert.pem", "more than 65536 bytes"},
		{"roots too large", also("root-cert.pem", strings.Repeat("x", maxRootBytes+1)), "root-cert.pem", "more than 262144 bytes"},
		{"an empty certificate", also("ca-cert.pem", ""), "ca-cert.pem", "none found"},
		{"an empty key", also("ca-key.pem", ""), "ca-key.pem", "does not begin with a PEM block"},
		{"a truncated certificate", changed("ca-cert.pem", func(b []byte) []byte { return b[:len(b)/2] }), "ca-cert.pem", "malformed"},
		{"a truncated key", changed("ca-key.pem", func(b []byte) []byte { return b[:len(b)/2] }), "ca-key.pem", "malformed"},
		{"a key file with two", changed("ca-key.pem", func(b []byte) []byte { return append(b, b...) }), "ca-key.pem", "2 PEM blocks"},
		{"text after the key", changed("ca-key.pem", func(b []byte) []byte { return append(b, "x\n"...) }), "ca-key.pem", "text follows it"},
		{"a certificate for a key", func(t testing.TB, w *world) fileSet {
			f := w.good(t)
			f["ca-key.pem"] = f["ca-cert.pem"]
			return f
		}, "ca-key.pem", "no private key"},
		{"an encrypted key", also("ca-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{1}}))), "ca-key.pem", "the key is encrypted"},
		{"a key encrypted in the old way", also("ca-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED"}, Bytes: []byte{1}}))), "ca-key.pem", "the key is encrypted"},
		{"no key in the block", also("ca-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}))), "ca-key.pem", "no key that can sign"},
		{"the key among the certificates", func(t testing.TB, w *world) fileSet {
			f := w.good(t)
			f["cert-chain.pem"] = append(f["cert-chain.pem"], f["ca-key.pem"]...)
			return f
		}, "cert-chain.pem", "only CERTIFICATE blocks"},
		{"too many in the chain", changed("cert-chain.pem", func(b []byte) []byte { return bytes.Repeat(b, 4) }), "cert-chain.pem", "it holds 12 PEM blocks; at most 10"},
		{"too many roots", changed("root-cert.pem", func(b []byte) []byte { return bytes.Repeat(b, 65) }), "root-cert.pem", "it holds 65 PEM blocks; at most 64"},
		{"a root twice", changed("root-cert.pem", func(b []byte) []byte { return append(b, b...) }), "root-cert.pem", "twice"},
		{"a certificate of the chain twice", changed("cert-chain.pem", func(b []byte) []byte { return append(b, b...) }), "cert-chain.pem", "twice"},

		// Whose it is.
		{"another's key", func(t testing.TB, w *world) fileSet {
			f := w.good(t)
			f["ca-key.pem"] = w.strangers.keyPEM(t)
			return f
		}, "ca-key.pem", "not the key of the certificate"},
		{"the key of a later certificate", func(t testing.TB, w *world) fileSet {
			f := w.good(t)
			f["ca-cert.pem"] = identity.EncodePEM(w.policy.cert, w.mesh.cert)
			return f
		}, "ca-cert.pem", "belongs to certificate 2 of it"},
		{"another trust domain's CA", func(t testing.TB, w *world) fileSet {
			return w.with(t, func(c *x509.Certificate) { c.URIs = []*url.URL{identitytest.URL(t, "spiffe://other.example")} })
		}, "ca-cert.pem", `"spiffe://other.example", and this trust domain is "cluster.local"`},
		{"a workload's name on the CA", func(t testing.TB, w *world) fileSet {
			return w.with(t, func(c *x509.Certificate) {
				c.URIs = []*url.URL{identitytest.URL(t, "spiffe://cluster.local/ns/shop/sa/cart")}
			})
		}, "ca-cert.pem", "and this trust domain is"},

		// Keys that cost too much, or too little.
		{"a curve that is not taken", func(t testing.TB, w *world) fileSet {
			return w.keyed(t, func() (k *ecdsa.PrivateKey, err error) { return ecdsa.GenerateKey(elliptic.P224(), rand.Reader) })
		}, "ca-cert.pem", "P-224"},
		{"a root of a weak key", func(t testing.TB, w *world) fileSet {
			key, err := rsa.GenerateKey(rand.Reader, 1024)
			check(t, err)
			c := template("Weak Root")
			f := w.good(t)
			f["root-cert.pem"] = append(f["root-cert.pem"], identity.EncodePEM(signed(t, c, &authority{c, key}, key.Public()))...)
			return f
		}, "root-cert.pem", "RSA 1024"},

		// What it may do.
		{"no CA", made1(func(c *x509.Certificate) { c.IsCA = false }), "ca-cert.pem", "not a CA certificate"},
		{"may not sign", made1(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), "ca-cert.pem", "lacks keyCertSign"},
		{"says nothing of its use", made1(func(c *x509.Certificate) { c.KeyUsage = 0 }), "ca-cert.pem", "lacks keyCertSign"},
		{"no subject", made1(func(c *x509.Certificate) { c.Subject = pkix.Name{} }), "ca-cert.pem", "empty subject"},
		{"no key identifier", func(t testing.TB, w *world) fileSet {
			// crypto/x509 adds one to CA certificates where none is given.
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			check(t, err)
			c := template("Mesh CA")
			c.SubjectKeyId, c.IsCA, c.BasicConstraintsValid = nil, false, false
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}
			return (&authority{signed(t, c, w.policy, key.Public()), key}).cacerts(t, certs(w.policy), w.root.cert)
		}, "ca-cert.pem", "no subject key identifier"},
		{"name constraints", made1(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"cluster.local"} }), "ca-cert.pem", "name constraints"},
		{"for servers only", made1(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "ca-cert.pem", "other extended key usages"},
		{"a critical extension that nobody knows", made1(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}), "ca-cert.pem", "is not believed: x509: unhandled critical extension"},
		{"a leaf in the chain", func(t testing.TB, w *world) fileSet {
			leaf := w.policy.below(t, "leaf", func(c *x509.Certificate) { c.IsCA = false })
			return w.mesh.cacerts(t, certs(w.policy, leaf), w.root.cert)
		}, "cert-chain.pem", "not a CA certificate"},
		{"a leaf among the roots", func(t testing.TB, w *world) fileSet {
			leaf := w.policy.below(t, "leaf", func(c *x509.Certificate) { c.IsCA = false })
			return w.mesh.cacerts(t, certs(w.policy), w.root.cert, leaf.cert)
		}, "root-cert.pem", "not a CA certificate"},
		{"a root with name constraints", func(t testing.TB, w *world) fileSet {
			other := newRoot(t, "Bound", func(c *x509.Certificate) { c.PermittedURIDomains = []string{"cluster.local"} })
			return w.mesh.cacerts(t, certs(w.policy), w.root.cert, other.cert)
		}, "root-cert.pem", "name constraints"},

		// When.
		{"expired", made1(lasting(0)), "ca-cert.pem", "expired at"},
		{"about to end", made1(lasting(leastUse - time.Second)), "ca-cert.pem", "in less than 5m0s"},
		{"not yet", made1(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(2 * time.Minute) }), "ca-cert.pem", "holds only from"},
		{"an expired chain", func(t testing.TB, w *world) fileSet {
			policy := w.root.below(t, "Policy CA", lasting(0))
			return policy.below(t, "Mesh CA").cacerts(t, certs(policy), w.root.cert)
		}, "cert-chain.pem", "expired at"},
		{"an expired root", func(t testing.TB, w *world) fileSet {
			root := newRoot(t, "Root CA", lasting(0))
			return root.below(t, "Mesh CA").cacerts(t, nil, root.cert)
		}, "root-cert.pem", "expired at"},

		// Where it leads.
		{"the chain is missing", func(t testing.TB, w *world) fileSet { return w.mesh.cacerts(t, nil, w.root.cert) }, "root-cert.pem", "does not reach a root: no certificate here has signed"},
		{"another root", func(t testing.TB, w *world) fileSet {
			f := w.good(t)
			f["root-cert.pem"] = identity.EncodePEM(newRoot(t, "Root CA").cert)
			return f
		}, "root-cert.pem", "does not reach a root: the signature on"},
		{"a root that is its own and not among the roots", func(t testing.TB, w *world) fileSet {
			return newRoot(t, "Lonely").cacerts(t, nil, w.root.cert)
		}, "root-cert.pem", "does not reach a root"},
		{"a chain that goes round", func(t testing.TB, w *world) fileSet {
			a, b := newRoot(t, "A"), newRoot(t, "B")
			// Each is signed by the other.
			aByB, bByA := *a.cert, *b.cert
			a.cert = signed(t, &aByB, b, a.key.Public())
			b.cert = signed(t, &bByA, a, b.key.Public())
			mesh := a.below(t, "Mesh CA")
			return mesh.cacerts(t, certs(a, b), w.root.cert)
		}, "root-cert.pem", "does not reach a root"},
		{"a signature that can be forged", func(t testing.TB, w *world) fileSet {
			key, err := rsa.GenerateKey(rand.Reader, 2048)
			check(t, err)
			policy := &authority{key: key}
			policy.cert = signed(t, template("Policy CA"), w.root, key.Public())
			mesh := policy.below(t, "Mesh CA")
			mesh.cert = sha1Signed(t, mesh.cert, key)
			return mesh.cacerts(t, certs(policy), w.root.cert)
		}, "ca-cert.pem", "SHA1-RSA, which can be forged"},
		{"another key's identifier", func(t testing.TB, w *world) fileSet {
			twin := &authority{cert: &x509.Certificate{Subject: w.policy.cert.Subject, SubjectKeyId: []byte("another")}, key: w.policy.key}
			mesh := newAuthority(t, twin, "Mesh CA")
			return mesh.cacerts(t, certs(w.policy), w.root.cert)
		}, "ca-cert.pem", "as its issuer's key"},
		{"below a path that has ended", func(t testing.TB, w *world) fileSet {
			istio := w.root.below(t, "Intermediate CA", pathLen0)
			return istio.below(t, "Mesh CA").cacerts(t, certs(istio), w.root.cert)
		}, "cert-chain.pem", "path length 0, and 1 CA certificates lie below it"},
		{"a root that would sign leaves", func(t testing.TB, w *world) fileSet {
			root := newRoot(t, "Root CA", pathLen0)
			return root.cacerts(t, nil, root.cert)
		}, "ca-cert.pem", "its own key would sign the leaves"},
	}
}

// A bad set stops the start, and does not come into use later.
func TestF49_T5_T16_V43_V63_V65_BadSetIsRefused(t *testing.T) {
	for _, b := range badSets() {
		t.Run(b.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				files := b.make(t, w)

				dir := t.TempDir()
				files.put(t, dir)
				_, err := New(conf(t, dir))
				b.expect(t, dir, err)

				dir = t.TempDir()
				before := newRoot(t, "Before")
				before.cacerts(t, nil, before.cert).put(t, dir)
				u := open(t, dir)
				run(t, u)
				changed := u.Changed()
				replace(t, dir, files)
				next()
				b.expect(t, dir, u.trouble)
				select {
				case <-changed:
					t.Error("somebody was told of a change")
				default:
				}
				s, key, err := ask(t, u, time.Hour)
				check(t, err)
				believe(t, s, key)
				if got := s.Roots; !equal(got, certs(before)) {
					t.Errorf("signs under %v", subjects(got))
				}
				r := u.Report()
				want := StateRefused
				if b.reason == "it is missing" {
					want = StateMissing
				}
				if r.State != want || !r.Away || !strings.Contains(r.Detail, u.trouble.Error()) || !strings.Contains(r.Detail, "goes on") {
					t.Errorf("the report is %+v", r)
				}

				replace(t, dir, w.good(t))
				next()
				if got := u.issuer(); !got.Equal(w.mesh.cert) || u.Report().State != StateOK {
					t.Errorf("put right: %v, %+v", got.Subject, u.Report())
				}
			})
		})
	}
}

func (b *bad) expect(t *testing.T, dir string, err error) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.File != filepath.Join(dir, b.file) || !strings.Contains(err.Error(), b.reason) {
		t.Errorf("got %v; want file %q and %q", err, filepath.Join(dir, b.file), b.reason)
	}
}

// replace puts other files in the place of all that are there.
func replace(t *testing.T, dir string, files fileSet) {
	t.Helper()
	old, err := os.ReadDir(dir)
	check(t, err)
	for _, f := range old {
		check(t, os.RemoveAll(filepath.Join(dir, f.Name())))
	}
	files.put(t, dir)
}

func without(name string) func(testing.TB, *world) fileSet {
	return func(t testing.TB, w *world) fileSet {
		f := w.good(t)
		delete(f, name)
		return f
	}
}

func also(name, text string) func(testing.TB, *world) fileSet {
	return changed(name, func([]byte) []byte { return []byte(text) })
}

func changed(name string, change func([]byte) []byte) func(testing.TB, *world) fileSet {
	return func(t testing.TB, w *world) fileSet {
		f := w.good(t)
		f[name] = change(f[name])
		return f
	}
}

// made1 is the good set with a CA that differs in one thing.
func made1(change func(*x509.Certificate)) func(testing.TB, *world) fileSet {
	return func(t testing.TB, w *world) fileSet { return w.with(t, change) }
}

func (w *world) keyed(t testing.TB, newKey func() (*ecdsa.PrivateKey, error)) fileSet {
	key, err := newKey()
	check(t, err)
	a := &authority{cert: signed(t, template("Mesh CA"), w.policy, key.Public()), key: key}
	return a.cacerts(t, certs(w.policy), w.root.cert)
}

// Nothing of a key is ever said.
func TestV65_KeyIsNotRepeated(t *testing.T) {
	w := newWorld(t)
	text := string(w.mesh.keyPEM(t))
	secret := strings.Split(text, "\n")[1]
	for name, data := range map[string]string{
		"text before": secret + text, "half": text[:len(text)-60], "another type": strings.ReplaceAll(text, "PRIVATE KEY", secret[:20]),
	} {
		dir := t.TempDir()
		also("ca-key.pem", data)(t, w).put(t, dir)
		_, err := New(conf(t, dir))
		if err == nil || strings.Contains(err.Error(), secret[:20]) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The forms of keys that programs write.
func TestKeyForms(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	check(t, err)
	ecKey := newKey(t).(*ecdsa.PrivateKey)
	sec1, err := x509.MarshalECPrivateKey(ecKey)
	check(t, err)
	ec := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})
	curve := pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}})
	for name, data := range map[string][]byte{
		"PKCS#8":                   (&authority{key: rsaKey}).keyPEM(t),
		"PKCS#1":                   pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rsaKey)}),
		"SEC 1":                    ec,
		"SEC 1 after its curve":    append(curve, ec...),
		"with space around":        append([]byte("\n\n"), append(ec, "\n \n"...)...),
		"with CRLF at line ends":   bytes.ReplaceAll(ec, []byte("\n"), []byte("\r\n")),
		"without a newline at end": bytes.TrimSpace(ec),
	} {
		if _, err := parseKey(data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := parseKey(curve); err == nil {
		t.Error("a curve is taken for a key")
	}
}

// A key that others can read is refused, but not in a volume that a kubelet writes.
func TestF49_KeyThatOthersCanRead(t *testing.T) {
	w := newWorld(t)
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o644} {
		dir := t.TempDir()
		w.good(t).put(t, dir)
		check(t, os.Chmod(filepath.Join(dir, "ca-key.pem"), mode))
		_, err := New(conf(t, dir))
		if (&bad{file: "ca-key.pem", reason: "others than its owner"}).expect(t, dir, err); t.Failed() {
			t.Errorf("mode %o", mode)
		}
	}
	for _, mode := range []os.FileMode{0o600, 0o400} {
		dir := t.TempDir()
		w.good(t).put(t, dir)
		check(t, os.Chmod(filepath.Join(dir, "ca-key.pem"), mode))
		open(t, dir)
	}
	dir := t.TempDir()
	w.good(t).project(t, made(t, filepath.Join(dir, "ca")), "..1")
	open(t, filepath.Join(dir, "ca"))
}

// sha1Signed is a certificate signed again with SHA-1, which crypto/x509 does not do.
func sha1Signed(t testing.TB, c *x509.Certificate, key *rsa.PrivateKey) *x509.Certificate {
	t.Helper()
	var outer struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	_, err := asn1.Unmarshal(c.Raw, &outer)
	check(t, err)
	// sha256WithRSAEncryption and sha1WithRSAEncryption differ in the last byte alone.
	oid := []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 11}
	tbs := bytes.Replace(bytes.Clone(c.RawTBSCertificate), oid, append(oid[:8:8], 5), 1)
	sum := sha1.Sum(tbs)
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA1, sum[:])
	check(t, err)
	outer.TBS = asn1.RawValue{FullBytes: tbs}
	outer.Algorithm.Algorithm = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 5}
	outer.Signature = asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}
	der, err := asn1.Marshal(outer)
	check(t, err)
	out, err := x509.ParseCertificate(der)
	check(t, err)
	return out
}
