package caclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	istioca "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity"
)

func TestSignOverLoopback(t *testing.T) {
	ca := newCA(t)
	l := loopback(t)
	ca.Serve(l, ca.TLS("127.0.0.1"))
	c := newClient(t, ca, nil, l.Addr().String())
	c.conf.ServerName = "" // the address's host then counts
	var got *Signed
	req := request(t)
	req.Lifetime = 90 * time.Minute
	req.Accept = func(s *Signed) error { got = s; return nil }
	ca.OnSign = func(_ string, r *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
		if r.GetValidityDuration() != 5400 {
			t.Errorf("asked for %d s", r.GetValidityDuration())
		}
		return ca.Sign(r)
	}
	if err := c.Sign(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if len(got.Chain) != 2 || len(got.Roots) != 1 || !got.Roots[0].Equal(ca.Root.Certificate) || got.Address != l.Addr().String() {
		t.Errorf("got %d certificates, %d roots from %s", len(got.Chain), len(got.Roots), got.Address)
	}
	if tokens := ca.Tokens(); len(tokens) != 1 || tokens[0] != canary {
		t.Errorf("the CA saw tokens %q", tokens)
	}
}

func TestCallsShareAConnection(t *testing.T) {
	ca := newCA(t)
	n := caclienttest.NewNetwork(t)
	stop := ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	c := newClient(t, ca, n, "a:1")
	for range 3 {
		if err := c.Sign(t.Context(), request(t)); err != nil {
			t.Fatal(err)
		}
	}
	if d := n.Dials(); len(d) != 1 {
		t.Errorf("dialled %q", d)
	}
	// A connection that died meanwhile is no failure of the CA: with one address
	// only, the call must still succeed.
	stop()
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	if err := c.Sign(t.Context(), request(t)); err != nil {
		t.Errorf("after the CA had restarted: %v", err)
	}
}

// Each kind of dead address is found out within its 5 s, and the next one asked.
func TestF34_DeadAddressesAreSeenInTimeAndTheNextIsTried(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(t *testing.T, n *caclienttest.Network, ca *caclienttest.CA)
		after time.Duration
		says  string
	}{
		"refused":     {func(*testing.T, *caclienttest.Network, *caclienttest.CA) {}, 0, "connection refused"},
		"SYN dropped": {func(_ *testing.T, n *caclienttest.Network, _ *caclienttest.CA) { n.Swallow("bad:1") }, 5 * time.Second, "no answer in 5 s"},
		"reset": {func(_ *testing.T, n *caclienttest.Network, _ *caclienttest.CA) {
			n.Handle("bad:1", func(net.Conn) {})
		}, 0, "TLS handshake: "},
		"accepted, then silence": {func(_ *testing.T, n *caclienttest.Network, _ *caclienttest.CA) {
			n.Handle("bad:1", func(c net.Conn) { _, _ = c.Read(make([]byte, 1)); readAll(c) })
		}, 5 * time.Second, "TLS handshake: no answer in 5 s"},
		"TLS, then silence": {func(t *testing.T, n *caclienttest.Network, ca *caclienttest.CA) {
			n.Handle("bad:1", func(c net.Conn) { readAll(tlsServer(c, ca)) })
		}, 5 * time.Second, "beginning HTTP/2: no answer in 5 s"},
		"TLS, then the end": {func(t *testing.T, n *caclienttest.Network, ca *caclienttest.CA) {
			n.Handle("bad:1", func(c net.Conn) { s := tlsServer(c, ca); _ = s.Handshake(); _ = s.Close() })
		}, 0, "it closed the connection instead of beginning HTTP/2"},
		"the call is never answered": {func(t *testing.T, n *caclienttest.Network, ca *caclienttest.CA) {
			stuck := caclienttest.New(t, ca.ID)
			stuck.CA = ca.CA
			stuck.OnSign = func(string, *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
				time.Sleep(7 * time.Second) // of the bubble's clock
				return nil, errors.New("too late")
			}
			stuck.Serve(n.Listen("bad:1"), ca.TLS(serverName))
		}, 5 * time.Second, "no answer in 5 s"},
		"not ready": {func(t *testing.T, n *caclienttest.Network, ca *caclienttest.CA) {
			away := caclienttest.New(t, ca.ID)
			away.CA = ca.CA
			away.OnSign = func(string, *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
				return nil, status.Error(codes.Unavailable, "not ready")
			}
			away.Serve(n.Listen("bad:1"), ca.TLS(serverName))
		}, 0, `Unavailable: "not ready"`},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newCA(t)
				n := caclienttest.NewNetwork(t)
				test.spoil(t, n, ca)
				c := newClient(t, ca, n, "bad:1")
				began := time.Now()
				err := c.Sign(t.Context(), request(t))
				var unreachable *UnreachableError
				if !errors.As(err, &unreachable) {
					t.Fatalf("with nobody else to ask: %v", err)
				}
				if want := "asking bad:1 for a certificate: " + test.says; !strings.HasPrefix(err.Error(), want) {
					t.Errorf("got  %q\nwant %q", err, want)
				}
				if took := time.Since(began); took != test.after {
					t.Errorf("seen after %v, not %v", took, test.after)
				}

				ca.Serve(n.Listen("good:1"), ca.TLS(serverName))
				both := newClient(t, ca, n, "bad:1", "good:1")
				began = time.Now()
				if err := both.Sign(t.Context(), request(t)); err != nil {
					t.Fatalf("with a good CA second: %v", err)
				}
				if took := time.Since(began); took != test.after {
					t.Errorf("answered after %v, not %v", took, test.after)
				}
				// The good one is remembered.
				before := len(n.Dials())
				if err := both.Sign(t.Context(), request(t)); err != nil || len(n.Dials()) != before {
					t.Errorf("second call: %v, dialled %q", err, n.Dials()[before:])
				}
			})
		})
	}
}

func TestUnreachableErrorNamesEachAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := caclienttest.NewNetwork(t)
		n.Swallow("10.96.0.7:15012")
		c := newClient(t, newCA(t), n, "10.96.0.7:15012", "10.96.0.8:15012")
		err := c.Sign(t.Context(), request(t))
		want := "asking 10.96.0.7:15012 for a certificate: no answer in 5 s (tried 2 CAs; 10.96.0.8:15012: connection refused)"
		if err == nil || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	})
}

// The table of docs/design.md, "Wire": which answers end the round, and which
// make the client ask the next CA.
func TestAnswersByCode(t *testing.T) {
	for code, test := range map[codes.Code]struct{ next, definite bool }{
		codes.Unauthenticated:   {},
		codes.PermissionDenied:  {definite: true},
		codes.InvalidArgument:   {definite: true},
		codes.ResourceExhausted: {},
		codes.Unavailable:       {next: true},
		codes.Internal:          {next: true},
		codes.Unimplemented:     {next: true},
	} {
		t.Run(code.String(), func(t *testing.T) {
			ca := newCA(t)
			n := caclienttest.NewNetwork(t)
			says := caclienttest.New(t, ca.ID)
			says.CA = ca.CA
			says.OnSign = func(string, *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
				return nil, status.Error(code, "ref 5f0c\n"+strings.Repeat("x", 300))
			}
			says.Serve(n.Listen("a:1"), ca.TLS(serverName))
			ca.Serve(n.Listen("b:1"), ca.TLS(serverName))
			c := newClient(t, ca, n, "a:1", "b:1")
			err := c.Sign(t.Context(), request(t))
			if test.next {
				if err != nil {
					t.Fatalf("the next CA was not asked: %v", err)
				}
				return
			}
			var refused *RefusedError
			if !errors.As(err, &refused) {
				t.Fatalf("got %v", err)
			}
			if refused.Code != code || refused.Definite() != test.definite || refused.Address != "a:1" {
				t.Errorf("got %+v", refused)
			}
			if strings.Contains(err.Error(), "\n") || len(err.Error()) > 600 {
				t.Errorf("the CA's words went into the log as they came: %s", err)
			}
			// The next round begins with the other CA: this one may be wrong alone.
			if err := c.Sign(t.Context(), request(t)); err != nil {
				t.Errorf("second round: %v", err)
			}
		})
	}
}

// An answer that the caller will not have counts as that CA's failure.
func TestRefusedAnswerMakesTheNextCAAnswer(t *testing.T) {
	ca := newCA(t)
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	ca.Serve(n.Listen("b:1"), ca.TLS(serverName))
	c := newClient(t, ca, n, "a:1", "b:1")
	req := request(t)
	var from []string
	req.Accept = func(s *Signed) error {
		from = append(from, s.Address)
		if s.Address == "a:1" {
			return errors.New("no good")
		}
		return nil
	}
	if err := c.Sign(t.Context(), req); err != nil || fmt.Sprint(from) != "[a:1 b:1]" {
		t.Errorf("got %v, answers from %q", err, from)
	}
	req.Accept = func(*Signed) error { return errors.New("no good") }
	var answer *AnswerError
	if err := c.Sign(t.Context(), req); !errors.As(err, &answer) {
		t.Errorf("got %v", err)
	}
}

func TestParseSignedRefuses(t *testing.T) {
	ca := newCA(t)
	leaf := string(identity.EncodePEM(ca.Intermediate.Certificate))
	root := string(identity.EncodePEM(ca.Root.Certificate))
	for name, test := range map[string]struct {
		elements []string
		says     string
	}{
		"nothing":                 {nil, "at least the leaf and the roots"},
		"one element":             {[]string{leaf + root}, "at least the leaf and the roots"},
		"too many":                {make([]string, 12), "at most 11"},
		"two certificates in one": {[]string{leaf + leaf, root}, "must hold one"},
		"an empty element":        {[]string{"", root}, "none found"},
		"no roots":                {[]string{leaf, ""}, "the roots, element 2"},
		"no PEM":                  {[]string{"x", root}, "element 1"},
	} {
		if _, err := parseSigned(test.elements); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	s, err := parseSigned([]string{leaf, leaf, root + root})
	if err != nil || len(s.Chain) != 2 || len(s.Roots) != 2 {
		t.Errorf("a good one: %v, %v", s, err)
	}
}

// What the CA sends is bounded, and too much of it is the CA's fault.
func TestF17_AnswerOverTheLimitIsNotRead(t *testing.T) {
	ca := newCA(t)
	ca.OnSign = func(string, *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
		return &istioca.IstioCertificateResponse{CertChain: []string{strings.Repeat("x", 10<<20), "y"}}, nil
	}
	n := caclienttest.NewNetwork(t)
	ca.Serve(n.Listen("a:1"), ca.TLS(serverName))
	var refused *RefusedError
	if err := newClient(t, ca, n, "a:1").Sign(t.Context(), request(t)); !errors.As(err, &refused) || refused.Code != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
}

func TestSignEndsWithItsContextAndWithTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := caclienttest.NewNetwork(t)
		n.Swallow("a:1")
		c := newClient(t, newCA(t), n, "a:1")
		cause := errors.New("we are done")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(cause) })
		began := time.Now()
		if err := c.Sign(ctx, request(t)); !errors.Is(err, cause) || time.Since(began) != time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		c.Close()
		if err := c.Sign(t.Context(), request(t)); !errors.Is(err, errClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

func TestNewRefuses(t *testing.T) {
	good := Config{Addresses: []string{"a:1"}, TrustDomain: newCA(t).TrustDomain, AnchorFile: "f", Now: time.Now}
	for name, spoil := range map[string]func(*Config){
		"no address":       func(c *Config) { c.Addresses = nil },
		"address no port":  func(c *Config) { c.Addresses = []string{"a"} },
		"address no host":  func(c *Config) { c.Addresses = []string{":1"} },
		"address twice":    func(c *Config) { c.Addresses = []string{"a:1", "a:1"} },
		"no trust domain":  func(c *Config) { c.TrustDomain = identity.TrustDomain{} },
		"no anchor":        func(c *Config) { c.AnchorFile = "" },
		"no clock":         func(c *Config) { c.Now = nil },
		"negative timeout": func(c *Config) { c.AttemptTimeout = -1 },
	} {
		conf := good
		spoil(&conf)
		if _, err := New(conf); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := New(good); err != nil {
		t.Error(err)
	}
}
