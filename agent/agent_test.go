package agent

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	istioca "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

type (
	signRequest  = istioca.IstioCertificateRequest
	signResponse = istioca.IstioCertificateResponse
)

func TestFromTokenToFeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		if err := r.agent.Ready(); err == nil {
			t.Error("ready without a certificate")
		}
		r.serve()
		r.run()
		s := r.state()
		if s.SVID == nil || s.SVID.ID() != r.ca.ID || s.Denied != nil {
			t.Fatalf("got %+v", s)
		}
		if s.Bundle.Sequence() != 1 || !s.Bundle.Authorities()[0].Equal(r.ca.Root.Certificate) {
			t.Errorf("the bundle has sequence %d; the stream's has 1", s.Bundle.Sequence())
		}
		if err := r.agent.Ready(); err != nil {
			t.Error(err)
		}
		if d := r.net.Dials(); len(d) != 1 {
			t.Errorf("dialled %q; one connection is enough", d)
		}
		for name, want := range map[string]float64{
			"meshca_agent_svid_not_after_timestamp_seconds": float64(s.SVID.NotAfter().Unix()),
			"meshca_agent_bundle_sequence":                  1,
			"meshca_agent_ca_connected":                     1,
			"meshca_agent_svid_alarm":                       0,
		} {
			if got := r.metric(name); got != want {
				t.Errorf("%s is %v, not %v", name, got, want)
			}
		}
		if got := r.metric("meshca_agent_renewals_total", "result", "ok"); got != 1 {
			t.Errorf("%v renewals", got)
		}
	})
}

func TestKeyTypesAndCSR(t *testing.T) {
	for _, kt := range KeyTypes() {
		t.Run(string(kt), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked *signRequest
				r := newRig(t, func(c *Config) { c.KeyType, c.Lifetime = kt, 20*time.Minute })
				r.ca.OnSign = func(_ string, req *signRequest) (*signResponse, error) {
					asked = req
					return r.ca.Sign(req)
				}
				r.serve()
				r.run()
				svid := r.svid()
				if svid == nil {
					t.Fatal(r.log.String())
				}
				if k, ok := svid.PrivateKey().(*rsa.PrivateKey); ok && k.N.BitLen() != 2048 {
					t.Errorf("RSA of %d bits", k.N.BitLen())
				}
				block, rest := pem.Decode([]byte(asked.GetCsr()))
				if block == nil || len(rest) != 0 || asked.GetValidityDuration() != 1200 {
					t.Fatalf("asked with %v", asked)
				}
				csr, err := x509.ParseCertificateRequest(block.Bytes)
				if err != nil {
					t.Fatal(err)
				}
				if len(csr.Subject.Names) != 0 || len(csr.Extensions) != 0 {
					t.Errorf("the CSR asks for subject %v, extensions %v", csr.Subject, csr.Extensions)
				}
			})
		})
	}
	if _, err := ParseKeyType("RSA-1024"); err == nil || !strings.Contains(err.Error(), `"P-256"`) {
		t.Errorf("got %v", err)
	}
}

// Renewals fall into 1/3…1/2 of the life, each has a key of its own, and there
// is a valid certificate at any time.
func TestRenewalsWithNewKeys(t *testing.T) {
	for _, lifetime := range []time.Duration{10 * time.Second, time.Hour} {
		t.Run(lifetime.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.ca.Lifetime = lifetime
				r.serve()
				r.run()
				var svids []*identity.SVID
				last := time.Now()
				for range 20 {
					svid := r.svid()
					_, changed := r.feed.State()
					if err := r.agent.Ready(); err != nil {
						t.Fatal(err)
					}
					for _, old := range svids {
						if old.PrivateKey() == svid.PrivateKey() || old.Serial() == svid.Serial() {
							t.Fatal("a key or a certificate was used twice")
						}
					}
					svids = append(svids, svid)
					<-changed
					if after := time.Since(last); len(svids) > 1 && (after < lifetime/3 || after > lifetime/2+time.Second) {
						t.Errorf("renewed after %v", after)
					}
					last = time.Now()
				}
				synctest.Wait()
				if n := r.metric("meshca_agent_renewals_total", "result", "ok"); n != 21 {
					t.Errorf("%v renewals", n)
				}
			})
		})
	}
}

// What the CA answers is not believed: each of these must leave the identity in
// use as it is, and be said as an alarm.
func TestV44_BadAnswersNeverReplaceTheIdentityInUse(t *testing.T) {
	other := identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/admin")
	foreign := identitytest.ID(t, "spiffe://evil.test/ns/shop/sa/cart")
	for name, test := range map[string]struct {
		answer func(t *testing.T, r *rig, req *signRequest) (*signResponse, error)
		says   string
		first  bool // refused even as the first answer
	}{
		"another ID": {func(_ *testing.T, r *rig, req *signRequest) (*signResponse, error) {
			return r.ca.SignAs(other, req)
		}, "it is about " + other.String() + ", but this agent is " + cart, false},
		"another trust domain": {func(_ *testing.T, r *rig, req *signRequest) (*signResponse, error) {
			return r.ca.SignAs(foreign, req)
		}, `belongs to trust domain \"cluster.local\"`, true},
		"another's key": {func(t *testing.T, r *rig, req *signRequest) (*signResponse, error) {
			return r.ca.Sign(req, identitytest.WithKey(identitytest.NewKey(t)))
		}, "private key does not belong", true},
		"another authority": {func(t *testing.T, r *rig, req *signRequest) (*signResponse, error) {
			ca := identitytest.NewCA(t, r.ca.TrustDomain)
			return r.ca.Sign(req, identitytest.WithIssuer(ca.Intermediate, ca.Intermediate.Certificate))
		}, "none of the 1 authorities", true},
		"ended already": {func(_ *testing.T, r *rig, req *signRequest) (*signResponse, error) {
			return r.ca.Sign(req, identitytest.WithLifetime(-time.Second))
		}, "it ended at", true},
		"for servers only": {func(_ *testing.T, r *rig, req *signRequest) (*signResponse, error) {
			return r.ca.Sign(req, identitytest.WithTemplate(func(c *x509.Certificate) {
				c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			}))
		}, "as a TLS client", true},
		"no intermediate": {func(_ *testing.T, r *rig, req *signRequest) (*signResponse, error) {
			resp, err := r.ca.Sign(req)
			if err == nil {
				resp.CertChain = []string{resp.CertChain[0], resp.CertChain[2]}
			}
			return resp, err
		}, "none of the 1 authorities", true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				var bad atomic.Bool
				bad.Store(test.first)
				r.ca.OnSign = func(_ string, req *signRequest) (*signResponse, error) {
					if bad.Load() {
						return test.answer(t, r, req)
					}
					return r.ca.Sign(req)
				}
				r.serve()
				r.run()
				if test.first {
					if r.svid() != nil {
						t.Fatal("taken as the first identity")
					}
					bad.Store(false)
					time.Sleep(2 * time.Second)
				}
				before := r.svid()
				if before == nil {
					t.Fatal(r.log.String())
				}
				bad.Store(true)
				time.Sleep(40 * time.Minute) // of one hour
				after := r.state()
				if after.SVID != before || after.Denied != nil {
					t.Fatalf("now serving %v, denied %v", after.SVID.ID(), after.Denied)
				}
				lines := r.log.lines(test.says)
				if len(lines) == 0 || !strings.Contains(lines[len(lines)-1], "level=ERROR") || !strings.Contains(lines[len(lines)-1], "serving the current one, good for") {
					t.Errorf("no alarm that says %q:\n%s", test.says, r.log.String())
				}
				if n := r.metric("meshca_agent_renewals_total", "result", "bad_answer"); n < 3 {
					t.Errorf("%v bad answers counted", n)
				}
				bad.Store(false)
				time.Sleep(time.Minute)
				if r.svid() == before {
					t.Error("a good answer after that was not taken")
				}
			})
		})
	}
}

// The roots of a CSR answer count only until the stream has brought a bundle: a
// lagging replica must not bring back an authority that has been dropped.
func TestAnswersRootsDoNotReplaceTheStreamsBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		other := identitytest.NewCA(t, r.ca.TrustDomain)
		var bad atomic.Bool
		r.ca.OnSign = func(_ string, req *signRequest) (*signResponse, error) {
			if !bad.Load() {
				return r.ca.Sign(req)
			}
			resp, err := r.ca.Sign(req, identitytest.WithIssuer(other.Intermediate, other.Intermediate.Certificate))
			if err == nil {
				resp.CertChain[len(resp.CertChain)-1] = string(other.Bundle().MarshalPEM())
			}
			return resp, err
		}
		r.serve()
		r.run()
		before := r.svid()
		bad.Store(true)
		time.Sleep(40 * time.Minute)
		if s := r.state(); s.SVID != before || !s.Bundle.Authorities()[0].Equal(r.ca.Root.Certificate) {
			t.Error("the answer's roots were believed")
		}
	})
}

func TestDeniedIsPublishedOnlyWhereNothingIsServed(t *testing.T) {
	for _, code := range []codes.Code{codes.PermissionDenied, codes.InvalidArgument, codes.Unauthenticated} {
		t.Run(code.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				var refuse atomic.Bool
				refuse.Store(true)
				r.ca.OnSign = func(_ string, req *signRequest) (*signResponse, error) {
					if refuse.Load() {
						return nil, status.Error(code, "ref 5f0c")
					}
					return r.ca.Sign(req)
				}
				r.serve()
				r.run()
				if s := r.state(); s.Denied == nil || s.SVID != nil {
					t.Fatalf("the caller is not told: %+v", s)
				}
				if err := r.agent.Ready(); err == nil || !strings.Contains(err.Error(), "ref 5f0c") {
					t.Errorf("not ready because: %v", err)
				}
				refuse.Store(false)
				time.Sleep(2 * time.Minute)
				if s := r.state(); s.Denied != nil || s.SVID == nil {
					t.Fatalf("a later success does not clear it: %+v", s)
				}
				// With a certificate in use, a refusal takes nothing away before its end.
				refuse.Store(true)
				end := r.svid().NotAfter()
				time.Sleep(time.Until(end) - time.Second)
				if s := r.state(); s.Denied != nil || s.SVID == nil || !s.SVID.NotAfter().After(time.Now()) {
					t.Errorf("just before the end: denied %v", s.Denied)
				}
				time.Sleep(2 * time.Minute)
				if s := r.state(); s.Denied == nil {
					t.Error("after the end, the refusal is not told")
				}
			})
		})
	}
}

// A passing fault never reads as a refusal.
func TestOutageIsNoRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.run()
		time.Sleep(10 * time.Minute)
		if s := r.state(); s.Denied != nil {
			t.Errorf("denied: %v", s.Denied)
		}
		if lines := r.log.lines("nothing to serve yet"); len(lines) == 0 || !strings.Contains(lines[0], "asking a:1 for a certificate: connection refused (tried 2 CAs, next try in") {
			t.Errorf("log:\n%s", r.log.String())
		}
		if r.metric("meshca_agent_renewals_total", "result", "unreachable") < 10 {
			t.Error("too few tries")
		}
	})
}

func TestNewRefuses(t *testing.T) {
	r := newRig(t)
	good := r.agent.conf
	for name, spoil := range map[string]func(*Config){
		"no CA":              func(c *Config) { c.CA = nil },
		"no token":           func(c *Config) { c.Token = nil },
		"no feed":            func(c *Config) { c.Feed = nil },
		"no clock":           func(c *Config) { c.Now = nil },
		"no log":             func(c *Config) { c.Log = nil },
		"no metrics":         func(c *Config) { c.Metrics = nil },
		"unknown key":        func(c *Config) { c.KeyType = "DSA" },
		"negative lifetime":  func(c *Config) { c.Lifetime = -1 },
		"split second":       func(c *Config) { c.Lifetime = 1500 * time.Millisecond },
		"metrics registered": func(*Config) {},
	} {
		conf := good
		spoil(&conf)
		if _, err := New(conf); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
