package vault

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
)

// started is a kit that has logged in.
func started(t *testing.T, changes ...func(*Config)) *kit {
	t.Helper()
	k := newKit(t, changes...)
	k.run(t)
	synctest.Wait()
	k.state(t, OK)
	return k
}

// Answers that a real Vault cannot be brought to give, or gives to whoever has set it
// up otherwise: each is refused, and the next good one is taken.
func TestF49_AnswersAreNotBelieved(t *testing.T) {
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	for name, tt := range map[string]struct {
		harm func(*fake)
		want string
	}{
		"another key": {func(f *fake) { f.pub = func(crypto.PublicKey) crypto.PublicKey { return other.Public() } }, "public key"},
		"no CA": {func(f *fake) {
			f.template = func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }
		}, "CA bit"},
		"no path length": {func(f *fake) { f.template = func(c *x509.Certificate) { c.MaxPathLenZero = false } }, "path length"},
		"a longer life than its issuer's": {func(f *fake) {
			f.template = func(c *x509.Certificate) { c.NotAfter = f.root.cert.NotAfter.Add(time.Hour) }
		}, "end of the intermediate"},
		"another issuer":   {func(f *fake) { f.by = newSigner(f.t, "stranger", nil, 1000*time.Hour) }, "no signatures lead from"},
		"its own new root": {func(f *fake) { f.by = newSigner(f.t, "root", nil, 1000*time.Hour) }, "no signatures lead from"},
		"a DNS name":       {func(f *fake) { f.template = func(c *x509.Certificate) { c.DNSNames = []string{"pay.shop"} } }, "subject alternative name"},
		"no SPIFFE ID":     {func(f *fake) { f.template = func(c *x509.Certificate) { c.URIs = nil } }, "subject alternative name"},
		"name constraints": {func(f *fake) {
			f.template = func(c *x509.Certificate) { c.PermittedURIDomains = []string{"cluster.local"} }
		}, "name constraints"},
		"further usages": {func(f *fake) {
			f.template = func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }
		}, "key usage"},
		"two certificates": {func(f *fake) {
			f.answer = func(a map[string]any) { a["certificate"] = a["certificate"].(string) + "\n" + encode(f.root.cert) }
		}, "2 certificates where one was asked for"},
		"no certificate": {func(f *fake) { f.answer = func(a map[string]any) { delete(a, "certificate") } }, "the certificate in it"},
		"a broken chain": {func(f *fake) { f.answer = func(a map[string]any) { a["ca_chain"] = []string{"text"} } }, "the chain in it"},
		"an endless chain": {func(f *fake) {
			f.answer = func(a map[string]any) { a["ca_chain"] = slices.Repeat([]string{encode(f.root.cert)}, maxCertificates) }
		}, "more than 32 certificates"},
		"too many bytes": {func(f *fake) {
			f.respond = func(path string) *fakeAnswer {
				if path != signPath {
					return nil
				}
				return &fakeAnswer{status: 200, body: `{"data":{"certificate":"` + strings.Repeat("x", maxAnswer) + `"}}`}
			}
		}, "more than 1048576 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := started(t)
				k.set(func() { tt.harm(k.fake) })
				_, err := k.up.SignIntermediate(t.Context(), k.request(t))
				if e := new(Error); !errors.As(err, &e) || e.State != Refused || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want state refused and %q", err, tt.want)
				}
				k.state(t, Refused)
				k.set(func() { k.template, k.pub, k.by, k.answer, k.respond = nil, nil, nil, nil, nil })
				_, err = k.up.SignIntermediate(t.Context(), k.request(t))
				check(t, err)
				k.state(t, OK)
			})
		})
	}
}

// What is in force stays, whatever Vault answers.
func TestF49_AuthorityKeepsWhatItHas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := started(t)
		a := catest.New(t, catest.WithLeaf(ca.LeafConfig{Ceiling: 10 * time.Minute}), catest.WithIntermediateLifetime(20*time.Minute),
			catest.WithUpstream(func(ca.Upstream) ca.Upstream { return k.up }))
		first := a.Authority.Status()
		k.set(func() { k.template = func(c *x509.Certificate) { c.SerialNumber.SetInt64(1001) } })
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		s := a.Authority.Status()
		var mismatch *ca.MismatchError
		if s.Authority != first.Authority || !errors.As(s.UpstreamErr, &mismatch) || mismatch.Field != "serial number" {
			t.Errorf("a serial number again: %+v", s)
		}
		a.SVID(t, "shop", "cart", 0)
	})
}

// The chain is found by signatures, in whatever order and with whatever beside.
func TestF49_ChainInAnyOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := started(t)
		mid, stranger := newSigner(t, "mid", k.root, 1000*time.Hour), newSigner(t, "stranger", nil, time.Hour)
		k.set(func() {
			k.by = mid
			k.answer = func(a map[string]any) {
				cert := a["certificate"].(string)
				a["issuing_ca"], a["ca_chain"] = "", []string{encode(stranger.cert), encode(k.root.cert), cert, encode(mid.cert), cert}
			}
		})
		s, err := k.up.SignIntermediate(t.Context(), k.request(t))
		check(t, err)
		if len(s.Chain) != 2 || !s.Chain[1].Equal(mid.cert) || len(s.Roots) != 1 || !s.Roots[0].Equal(k.root.cert) {
			t.Errorf("%d certificates, roots %q", len(s.Chain), names(s.Roots))
		}
	})
}

// Another default of the mount is told of and changes nothing.
func TestT12_DefaultIssuerIsNotFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := started(t)
		k.set(func() { k.issuers["default"] = map[string]any{"issuer_id": "two", "issuer_name": "next"} })
		changed := k.up.Changed()
		time.Sleep(pollGood + time.Second)
		synctest.Wait()
		if notes := strings.Join(k.up.Report().Notes, "; "); !strings.Contains(notes, "next (two)") || !strings.Contains(notes, "not used") {
			t.Errorf("notes %q", notes)
		}
		if n := testutil.ToFloat64(k.up.metrics.other); n != 1 {
			t.Errorf("default_issuer_is_another %v", n)
		}
		select {
		case <-changed:
			t.Error("the authority is told to ask anew")
		default:
		}
		_, err := k.up.SignIntermediate(t.Context(), k.request(t))
		check(t, err)
		if n := k.asked(signPath); n != 1 {
			t.Errorf("%d requests at our issuer", n)
		}
	})
}

// A redirect is not followed, to whatever host.
func TestV49_RedirectsAreNotFollowed(t *testing.T) {
	for status, state := range map[int]State{302: Refused, 307: Standby, 308: Refused} {
		synctest.Test(t, func(t *testing.T) {
			k := started(t)
			k.set(func() {
				k.respond = func(path string) *fakeAnswer {
					if path != signPath {
						return nil
					}
					return &fakeAnswer{status: status, header: http.Header{"Location": {"https://elsewhere.example/v1/" + signPath}}}
				}
			})
			_, err := k.up.SignIntermediate(t.Context(), k.request(t))
			if e := new(Error); !errors.As(err, &e) || e.State != state || !strings.Contains(err.Error(), "redirects are not followed") {
				t.Errorf("%d: %v", status, err)
			}
			if n := k.hosts["elsewhere.example"]; n != 0 {
				t.Errorf("%d: %d requests went there", status, n)
			}
		})
	}
}

// Vault repeats what it was sent in an error: that is not printed.
func TestV49_WhatVaultRepeatsIsNotPrinted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		k.set(func() {
			k.respond = func(path string) *fakeAnswer {
				if path != loginPath {
					return nil
				}
				return &fakeAnswer{status: 400, body: `{"errors":["invalid secret id secret-canary"]}`}
			}
		})
		stop := k.run(t)
		time.Sleep(time.Second)
		synctest.Wait()
		r := k.up.Report()
		stop()
		if all := r.Detail + k.log.String(); strings.Contains(all, "secret-canary") || !strings.Contains(all, "invalid secret id (secret)") {
			t.Errorf("printed: %s", all)
		}
	})
}

// The token does not outlive the CA.
func TestV46_TokenIsRevokedAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		stop := k.run(t)
		time.Sleep(time.Second)
		stop()
		if n := k.asked("auth/token/revoke-self"); n != 1 || len(k.tokens) != 0 {
			t.Errorf("%d revocations, %d tokens are left", n, len(k.tokens))
		}
	})
}

func TestV48_V42_V49_NamesAreLiteral(t *testing.T) {
	good := Config{
		Addresses: []string{"https://vault:8200"}, CAFile: "ca", RootsFile: "roots", Mount: "pki/mesh", Issuer: "mesh-1",
		Auth: Kubernetes{Mount: "kubernetes", Role: "meshca", TokenFile: "token"},
	}
	check(t, good.Check())
	for name, change := range map[string]func(*Config){
		"mount with dots":      func(c *Config) { c.Mount = "pki/../sys" },
		"mount with a glob":    func(c *Config) { c.Mount = "pki*" },
		"mount with a segment": func(c *Config) { c.Mount = "+/pki" },
		"issuer with a slash":  func(c *Config) { c.Issuer = "a/b" },
		"issuer with dots":     func(c *Config) { c.Issuer = ".." },
		"issuer with a query":  func(c *Config) { c.Issuer = "a?b" },
		"issuer by default":    func(c *Config) { c.Issuer = "Default" },
		"namespace":            func(c *Config) { c.Namespace = "../root" },
		"role":                 func(c *Config) { c.Auth = Kubernetes{Mount: "kubernetes", Role: "a,b", TokenFile: "t"} },
		"auth mount":           func(c *Config) { c.Auth = AppRole{Mount: "../token", RoleID: "r", SecretIDFile: "s"} },
		"no TLS":               func(c *Config) { c.Addresses = []string{"http://vault:8200"} },
		"a password":           func(c *Config) { c.Addresses = []string{"https://u:canary@vault:8200"} },
		"a path":               func(c *Config) { c.Addresses = []string{"https://vault:8200/v1/sys"} },
	} {
		c := good
		change(&c)
		if err := c.Check(); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
