package client

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"go.uber.org/goleak"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/sds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const cartID = "spiffe://example.org/ns/shop/sa/cart"

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// agent is the real socket's server over a feed that the test publishes to.
type agent struct {
	t    *testing.T
	path string
	ca   *identitytest.CA
	feed *sds.Feed
	stop func()
}

func newAgent(t *testing.T) *agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "meshca") // t.TempDir may be too long for a socket's address
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return &agent{t: t, path: filepath.Join(dir, "agent.sock"), ca: identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))}
}

// start serves what is published from now on, as a process that has just started.
func (a *agent) start() {
	a.t.Helper()
	a.feed = sds.NewFeed()
	l, err := sds.Listen(a.path, 0)
	if err != nil {
		a.t.Fatal(err)
	}
	s, err := sds.NewServer(sds.Config{Feed: a.feed, Log: discard(), Metrics: prometheus.NewRegistry(), Now: time.Now})
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			a.t.Errorf("Serve: %v", err)
		}
	})
	a.t.Cleanup(a.stop)
}

func (a *agent) publish(federated ...*identity.Bundle) *identity.SVID {
	a.t.Helper()
	svid := a.ca.SVID(a.t, identitytest.ID(a.t, cartID))
	a.feed.Publish(sds.State{SVID: svid, Bundle: a.ca.Bundle(), Federated: federated})
	return svid
}

// endings takes a log, and tells of each stream that it says has ended.
type endings chan struct{}

func (e endings) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("stream has ended")) || bytes.Contains(p, []byte("no answer from the agent yet")) {
		e <- struct{}{}
	}
	return len(p), nil
}

func runSource(t *testing.T, path string) *Source {
	t.Helper()
	return runLogging(t, path, discard())
}

func runLogging(t *testing.T, path string, log *slog.Logger) *Source {
	t.Helper()
	s, err := New(Config{Socket: path, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

// holds waits until the source has that SVID.
func holds(t *testing.T, s *Source, want *identity.SVID) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		changed := s.Changed()
		got, err := s.SVID()
		if err == nil && got.Serial() == want.Serial() {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("has %v, %v; want %v", got, err, want)
		}
	}
}

func TestSPIFFE63_F36_FollowsTheAgentThroughRestarts(t *testing.T) {
	a := newAgent(t)
	lost := make(endings, 1000)
	s := runLogging(t, a.path, slog.New(slog.NewTextHandler(lost, nil))) // before there is an agent
	<-lost
	if _, err := s.SVID(); err == nil || !strings.Contains(err.Error(), a.path) {
		t.Errorf("SVID: %v", err)
	}
	a.start()
	holds(t, s, a.publish())
	for range 5 {
		holds(t, s, a.publish())
	}
	last := a.publish()
	holds(t, s, last)
	for len(lost) > 0 { // from the time before
		<-lost
	}
	a.stop()
	<-lost
	if got, err := s.SVID(); err != nil || got.Serial() != last.Serial() {
		t.Errorf("while the agent is away: %v, %v", got, err)
	}
	if b, err := s.Bundle(a.ca.TrustDomain); err != nil || len(b.Authorities()) != 1 {
		t.Errorf("while the agent is away: %v, %v", b, err)
	}
	a.start()
	holds(t, s, a.publish())
}

func TestSPIFFE50_FederatedBundleComesAndGoes(t *testing.T) {
	a := newAgent(t)
	a.start()
	s := runSource(t, a.path)
	partner := identitytest.NewCA(t, identitytest.TrustDomain(t, "partner.test"))
	holds(t, s, a.publish(partner.Bundle()))
	if b, err := s.Bundle(partner.TrustDomain); err != nil || b.TrustDomain() != partner.TrustDomain {
		t.Errorf("%v, %v", b, err)
	}
	holds(t, s, a.publish())
	var none *identity.NoBundleError
	if _, err := s.Bundle(partner.TrustDomain); !errors.As(err, &none) || len(none.Held) != 1 {
		t.Errorf("what the agent no longer sends is still trusted: %v", err)
	}
}

func TestDeniedIdentityIsKept(t *testing.T) {
	a := newAgent(t)
	a.start()
	s := runSource(t, a.path)
	svid := a.publish()
	holds(t, s, svid)
	a.feed.Publish(sds.State{SVID: svid, Bundle: a.ca.Bundle(), Denied: errors.New("no")})
	if got, err := s.SVID(); err != nil || got.Serial() != svid.Serial() {
		t.Errorf("%v, %v", got, err)
	}
	holds(t, s, a.publish())
}

// message is a good answer, to be spoilt.
func message(t testing.TB) *workload.X509SVIDResponse {
	t.Helper()
	ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))
	svid := ca.SVID(t, identitytest.ID(t, cartID))
	key, err := svid.MarshalKey()
	if err != nil {
		t.Fatal(err)
	}
	partner := identitytest.NewCA(t, identitytest.TrustDomain(t, "partner.test"))
	return &workload.X509SVIDResponse{
		Svids:            []*workload.X509SVID{{SpiffeId: cartID, X509Svid: svid.MarshalChain(), X509SvidKey: key, Bundle: ca.Bundle().MarshalDER()}},
		FederatedBundles: map[string][]byte{"spiffe://partner.test": partner.Bundle().MarshalDER()},
	}
}

func TestV21_BadMessageIsRefusedWhole(t *testing.T) {
	other := message(t).GetSvids()[0]
	for _, tt := range []struct {
		name, want string
		spoil      func(*workload.X509SVIDResponse, *workload.X509SVID)
	}{
		{"no SVID", "without an SVID", func(r *workload.X509SVIDResponse, _ *workload.X509SVID) { r.Svids = nil }},
		{"no chain", "SVID", func(_ *workload.X509SVIDResponse, s *workload.X509SVID) { s.X509Svid = nil }},
		{"a broken chain", "SVID", func(_ *workload.X509SVIDResponse, s *workload.X509SVID) { s.X509Svid = s.GetX509Svid()[1:] }},
		{"no key", "PKCS#8", func(_ *workload.X509SVIDResponse, s *workload.X509SVID) { s.X509SvidKey = nil }},
		{"another's key", "does not belong", func(_ *workload.X509SVIDResponse, s *workload.X509SVID) { s.X509SvidKey = other.GetX509SvidKey() }},
		{"another's name", "the message calls it", func(_ *workload.X509SVIDResponse, s *workload.X509SVID) {
			s.SpiffeId = "spiffe://example.org/ns/shop/sa/admin"
		}},
		{"no bundle", "holds no authority", func(_ *workload.X509SVIDResponse, s *workload.X509SVID) { s.Bundle = nil }},
		{"a broken bundle", "bundle of", func(_ *workload.X509SVIDResponse, s *workload.X509SVID) { s.Bundle = []byte("x") }},
		{"a leaf as authority", "cannot be an authority", func(_ *workload.X509SVIDResponse, s *workload.X509SVID) { s.Bundle = s.GetX509Svid() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := message(t)
			tt.spoil(r, r.GetSvids()[0])
			m, _, err := parse(r)
			if m != nil || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, %v; want an error with %q", m, err, tt.want)
			}
		})
	}
}

func TestBadFederatedBundleIsLeftOut(t *testing.T) {
	r := message(t)
	r.FederatedBundles["spiffe://broken.test"] = []byte("x")
	r.FederatedBundles["bare.test"] = r.GetFederatedBundles()["spiffe://partner.test"]
	r.FederatedBundles["spiffe://example.org"] = r.GetFederatedBundles()["spiffe://partner.test"] // who would be believed here
	m, skipped, err := parse(r)
	if err != nil || len(skipped) != 3 || len(m.bundles) != 2 {
		t.Fatalf("%v, %v, %v", m, skipped, err)
	}
	own, err := x509.ParseCertificates(r.GetSvids()[0].GetBundle())
	if err != nil {
		t.Fatal(err)
	}
	if got := m.bundles[m.svid.ID().TrustDomain()].Authorities(); len(got) != 1 || !got[0].Equal(own[0]) {
		t.Errorf("the own domain's bundle is %v", got)
	}
}

// Keys are in the messages, and no log may hear of them.
func TestErrorsDoNotRepeatKeys(t *testing.T) {
	r := message(t)
	key := append([]byte("canary"), r.GetSvids()[0].GetX509SvidKey()...)
	r.GetSvids()[0].X509SvidKey = key
	_, _, err := parse(r)
	if err == nil || bytes.Contains([]byte(err.Error()), []byte("canary")) {
		t.Errorf("%v", err)
	}
}

func TestRunEndsWhileNobodyAnswers(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // accepts nobody
	runSource(t, l.Addr().String())
}

func FuzzParse(f *testing.F) {
	r := message(f)
	s := r.GetSvids()[0]
	f.Add(s.GetSpiffeId(), s.GetX509Svid(), s.GetX509SvidKey(), s.GetBundle(), "spiffe://partner.test", r.GetFederatedBundles()["spiffe://partner.test"])
	f.Add("", []byte(nil), []byte(nil), []byte(nil), "", []byte(nil))
	f.Fuzz(func(t *testing.T, id string, chain, key, bundle []byte, name string, federated []byte) {
		m, _, err := parse(&workload.X509SVIDResponse{
			Svids:            []*workload.X509SVID{{SpiffeId: id, X509Svid: chain, X509SvidKey: key, Bundle: bundle}},
			FederatedBundles: map[string][]byte{name: federated},
		})
		if (m == nil) == (err == nil) {
			t.Fatal("neither or both")
		}
		if m != nil && (m.svid.ID().String() != id || m.bundles[m.svid.ID().TrustDomain()] == nil) {
			t.Fatal("what was accepted is not whole")
		}
	})
}

// stuckLog is a log that nobody reads.
type stuckLog struct {
	slog.Handler
	freed chan struct{}
}

func (l stuckLog) Handle(context.Context, slog.Record) error {
	<-l.freed
	return nil
}

func (l stuckLog) Enabled(context.Context, slog.Level) bool { return true }

// A log that nobody reads must not hold up handshakes, which ask for the SVID
// and the bundles.
func TestT18_AStuckLogHoldsUpNoHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := stuckLog{slog.DiscardHandler, make(chan struct{})}
		defer close(log.freed)
		s, err := New(Config{Socket: "agent.sock", Log: slog.New(log)})
		if err != nil {
			t.Fatal(err)
		}
		ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))
		changed := s.Changed()
		go s.take(&material{svid: ca.SVID(t, identitytest.ID(t, cartID)), bundles: map[identity.TrustDomain]*identity.Bundle{ca.TrustDomain: ca.Bundle()}})
		<-changed
		synctest.Wait()
		if !s.mu.TryLock() {
			t.Fatal("the line is written with the lock held that every handshake takes")
		}
		s.mu.Unlock()
		if _, err := s.SVID(); err != nil {
			t.Error(err)
		}
	})
}
