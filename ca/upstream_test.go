package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity/identitytest"
)

// hostile is an upstream of its own making that goes wrong on demand. Its
// honest answer is accepted, so each refusal is for what was changed.
type hostile struct {
	t  testing.TB
	mu sync.Mutex // over what a test changes while an authority runs

	root   *x509.Certificate
	key    crypto.Signer
	change func(template *x509.Certificate)              // of the intermediate, before it is signed
	after  func(*ca.Signed)                              // of the answer
	pub    func(asked crypto.PublicKey) crypto.PublicKey // whose certificate to sign
	asked  ca.IntermediateRequest
}

func newHostile(t testing.TB) *hostile {
	h := &hostile{t: t, key: catest.NewKey(t)}
	now := time.Now().Truncate(time.Second)
	h.root = h.sign(&x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(100 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{1, 2, 3},
	}, nil, h.key.Public())
	return h
}

func (h *hostile) sign(template, parent *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	h.t.Helper()
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, h.key)
	check(h.t, err)
	c, err := x509.ParseCertificate(der)
	check(h.t, err)
	return c
}

func (h *hostile) SignIntermediate(_ context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked = req
	serial, err := ca.NewSerial()
	check(h.t, err)
	_, id, err := ca.AuthorityName(req.TrustDomain, ca.RoleIntermediate, req.CSR.PublicKey)
	check(h.t, err)
	now := time.Now().Truncate(time.Second)
	template := &x509.Certificate{
		SerialNumber: serial, Subject: req.CSR.Subject,
		URIs:      []*url.URL{req.TrustDomain.ID().SPIFFE().URL()},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(req.Lifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: id,
	}
	pub := req.CSR.PublicKey
	if h.pub != nil {
		pub = h.pub(pub)
	}
	if h.change != nil {
		h.change(template)
	}
	s := &ca.Signed{Chain: []*x509.Certificate{h.sign(template, h.root, pub)}, Roots: []*x509.Certificate{h.root}, Sequence: 5}
	if h.after != nil {
		h.after(s)
	}
	return s, nil
}

// answer runs an authority over the upstream until it is ready or has given up.
func (h *hostile) answer(t *testing.T) error {
	t.Helper()
	return answer(t, h)
}

func answer(t *testing.T, u ca.Upstream) error {
	t.Helper()
	a, err := ca.New(ca.Config{TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Upstream: u, Audit: &trail{}})
	check(t, err)
	start(t, a)
	synctest.Wait()
	return errors.Join(a.Ready(), a.Status().UpstreamErr)
}

func ext(oid string, value any) pkix.Extension {
	der, err := asn1.Marshal(value)
	if err != nil {
		panic(err) // a constant of this file
	}
	var id asn1.ObjectIdentifier
	for part := range strings.SplitSeq(oid, ".") {
		n, _ := new(big.Int).SetString(part, 10)
		id = append(id, int(n.Int64()))
	}
	return pkix.Extension{Id: id, Value: der}
}

func TestT5_F49_UpstreamIsNotBelieved(t *testing.T) {
	uri := func(s string) *url.URL { u, _ := url.Parse(s); return u }
	type change = func(*x509.Certificate)
	for _, tt := range []struct {
		name   string
		change change
		after  func(*hostile, *ca.Signed)
		pub    func(crypto.PublicKey) crypto.PublicKey
		field  string // of the MismatchError; empty means another refusal, "-" none
	}{
		{name: "honest", field: "-"},
		{name: "another key", pub: func(crypto.PublicKey) crypto.PublicKey { return catest.NewKey(t).Public() }, field: "public key"},
		{name: "no CA", change: func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }, field: "CA bit"},
		{name: "path length unset", change: func(c *x509.Certificate) { c.MaxPathLenZero = false }, field: "path length"},
		{name: "path length 1", change: func(c *x509.Certificate) { c.MaxPathLen = 1 }, field: "path length"},
		{name: "no key usage", change: func(c *x509.Certificate) { c.KeyUsage = 0 }, field: "key usage (bits)"},
		{name: "no keyCertSign", change: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, field: "key usage (bits)"},
		{name: "may authenticate", change: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }, field: "key usage (bits)"},
		{name: "no name", change: func(c *x509.Certificate) { c.URIs = nil }, field: "subject alternative name"},
		{name: "another domain", change: func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://evil.test")} }, field: "subject alternative name"},
		{name: "a workload's ID", change: func(c *x509.Certificate) { c.URIs = []*url.URL{uri(cart)} }, field: "subject alternative name"},
		{name: "second URI", change: func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("spiffe://evil.test")) }, field: "subject alternative name"},
		{name: "a DNS name beside it", change: func(c *x509.Certificate) { c.DNSNames = []string{"evil.test"} }, field: "subject alternative name"},
		{name: "an address beside it", change: func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(1, 2, 3, 4)} }, field: "subject alternative name"},
		{name: "a registered ID only", change: func(c *x509.Certificate) {
			c.URIs, c.ExtraExtensions = nil, []pkix.Extension{ext("2.5.29.17", []asn1.RawValue{{Class: 2, Tag: 8, Bytes: []byte{42}}})}
		}, field: "subject alternative name"},
		{name: "no subject", change: func(c *x509.Certificate) { c.Subject = pkix.Name{} }, field: "subject"},
		{name: "name constraints", change: func(c *x509.Certificate) { c.PermittedURIDomains = []string{"cluster.local"} }, field: "name constraints of SERIALNUMBER"},
		{name: "outlives its issuer", change: func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(101 * 24 * time.Hour) }, field: "end of the intermediate"},
		{name: "ended", change: func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Second) }, field: "end of the intermediate"},
		{name: "not begun", change: func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(2 * time.Minute) }, field: "beginning of the intermediate"},
		{name: "no room for a leaf", change: func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(90 * time.Second) }},
		{name: "for clients only", change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }},
		{name: "unknown critical extension", change: func(c *x509.Certificate) {
			e := ext("1.2.3.4", 1)
			e.Critical = true
			c.ExtraExtensions = []pkix.Extension{e}
		}},
		{name: "root that did not sign", after: func(h *hostile, s *ca.Signed) { s.Roots = []*x509.Certificate{newHostile(t).root} }, field: "issuer of the chain"},
		{name: "no roots", after: func(_ *hostile, s *ca.Signed) { s.Roots = nil }, field: "roots"},
		{name: "no chain", after: func(_ *hostile, s *ca.Signed) { s.Chain = nil }, field: "certificates in the chain"},
		{name: "nil in the chain", after: func(_ *hostile, s *ca.Signed) { s.Chain[0] = nil }, field: "certificates in the chain"},
		{name: "root in the chain", after: func(h *hostile, s *ca.Signed) { s.Chain = append(s.Chain, h.root) }, field: "certificate of the chain"},
		{name: "nil further up", after: func(_ *hostile, s *ca.Signed) { s.Chain = append(s.Chain, nil) }, field: "certificates in the chain"},
		{name: "stranger in the chain", after: func(_ *hostile, s *ca.Signed) {
			s.Chain = append(s.Chain, newHostile(t).root)
			s.Roots = append(s.Roots, s.Chain[1])
		}, field: "issuer of SERIALNUMBER"},
		{name: "a leaf among the roots", after: func(h *hostile, s *ca.Signed) {
			s.Roots = append(s.Roots, h.sign(&x509.Certificate{SerialNumber: big.NewInt(9), NotAfter: h.root.NotAfter}, h.root, h.key.Public()))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHostile(t)
				h.change, h.pub = tt.change, tt.pub
				if tt.after != nil {
					h.after = func(s *ca.Signed) { tt.after(h, s) }
				}
				err := h.answer(t)
				if tt.field == "-" {
					check(t, err)
					return
				}
				if err == nil {
					t.Fatal("the answer is believed")
				}
				var m *ca.MismatchError
				if got := errors.As(err, &m); got != (tt.field != "") || got && !strings.HasPrefix(m.Field, tt.field) {
					t.Fatalf("refused with %v, want a mismatch of %q", err, tt.field)
				}
				if m != nil && (m.Want == "" || m.Want == m.Got || !strings.Contains(m.Error(), m.Field)) {
					t.Errorf("the error does not show both values: %+v", m)
				}
			})
		})
	}
}

func TestUpstreamIsAskedForTheProfile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHostile(t)
		check(t, h.answer(t))
		csr := h.asked.CSR
		if err := csr.CheckSignature(); err != nil {
			t.Error(err)
		}
		if len(csr.URIs) != 1 || csr.URIs[0].String() != "spiffe://cluster.local" || !strings.Contains(csr.Subject.String(), "CN=meshca intermediate,O=cluster.local") {
			t.Errorf("the CSR asks for %v, %q", csr.URIs, csr.Subject)
		}
		if h.asked.Lifetime != 72*time.Hour {
			t.Errorf("lifetime %v", h.asked.Lifetime)
		}
	})
}

// Roots that change need a higher sequence, or consumers would refuse them.
func TestRootsChangeOnlyWithTheirSequence(t *testing.T) {
	for _, tt := range []struct {
		name     string
		sequence uint64
		another  bool // root in the second answer
		refused  bool
	}{
		{"same roots, same sequence", 5, false, false},
		{"same roots, higher sequence", 6, false, false},
		{"other roots, higher sequence", 6, true, false},
		{"other roots, same sequence", 5, true, true},
		{"same roots, lower sequence", 4, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h, other := newHostile(t), newHostile(t)
				a, err := ca.New(ca.Config{
					TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Upstream: h, Audit: &trail{},
					Leaf: ca.LeafConfig{Ceiling: 10 * time.Minute}, IntermediateLifetime: 20 * time.Minute,
				})
				check(t, err)
				start(t, a)
				synctest.Wait()
				first, changed := a.Bundle()
				h.mu.Lock()
				h.after = func(s *ca.Signed) {
					if s.Sequence = tt.sequence; tt.another {
						s.Roots = append(s.Roots, other.root)
					}
				}
				h.mu.Unlock()
				time.Sleep(11 * time.Minute)
				second, _ := a.Bundle()
				if refused := a.Status().UpstreamErr != nil; refused != tt.refused {
					t.Errorf("refused: %v, want %v", a.Status().UpstreamErr, tt.refused)
				}
				moved := second.Sequence() != first.Sequence()
				if moved != (!tt.refused && tt.sequence > 5) {
					t.Errorf("sequence went from %d to %d", first.Sequence(), second.Sequence())
				}
				select {
				case <-changed:
					if !moved {
						t.Error("a change was told that is none")
					}
				default:
					if moved {
						t.Error("a change was not told")
					}
				}
			})
		})
	}
}
