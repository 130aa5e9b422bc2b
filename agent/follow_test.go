package agent

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/wire/meshcav1"
)

// A lagging replica, or a replayed bundle: refused, the newer one stays, and
// another CA is asked.
func TestT12_F18_F69_OlderBundleIsRefusedAndAnotherCAAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		behind, nacked := make(chan struct{}), make(chan error, 1)
		streams := 0
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			if streams++; streams == 1 {
				err := errors.Join(s.SendWorkload("8-x", r.ca.Workload(8)), s.Answer("8-x"))
				<-behind
				return err // in good order; the agent comes back, and meets an older one
			}
			err := s.SendWorkload("7-x", r.ca.Workload(7))
			nacked <- errors.Join(err, s.Answer("7-x"))
			return s.Drain()
		}
		current := caclienttest.New(t, r.ca.ID)
		current.CA = r.ca.CA
		current.OnStream = func(s *caclienttest.Stream) error {
			if v := s.First.GetInitialResourceVersions()[caclienttest.Resource]; v != "8-x" {
				t.Errorf("resumed from %q", v)
			}
			return errors.Join(s.SendWorkload("9-x", r.ca.Workload(9)), s.Answer("9-x"), s.Drain())
		}
		current.Serve(r.net.Listen("b:1"), r.ca.TLS(serverName))
		r.serve()
		r.run()
		if s := r.state(); s.Bundle.Sequence() != 8 {
			t.Fatalf("sequence %d", s.Bundle.Sequence())
		}
		close(behind)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if len(nacked) == 0 {
			t.Fatalf("the replica that is behind got no answer:\n%s", r.log.String())
		}
		if err := <-nacked; err == nil || !strings.Contains(err.Error(), "the bundle has sequence 7; sequence 8 is in use already") {
			t.Errorf("the CA was told %v", err)
		}
		if s := r.state(); s.Bundle.Sequence() != 9 {
			t.Errorf("sequence %d; the CA that is up to date was not asked", s.Bundle.Sequence())
		}
		if r.metric("meshca_agent_bundle_updates_total", "result", "nack") != 1 || r.metric("meshca_agent_bundle_sequence") != 9 {
			t.Error("not counted")
		}
	})
}

// A new bundle reaches the feed, and one about somebody else does not.
func TestF17_BundleOfAnotherWorkloadIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		answers := make(chan error, 2)
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			mine := r.ca.Workload(2)
			mine.Bundle.X509Authorities = append(mine.Bundle.X509Authorities, identitytest.NewCA(t, r.ca.TrustDomain).Root.Certificate.Raw)
			answers <- errors.Join(s.SendWorkload("1", mine), s.Answer("1"))
			other := r.ca.Workload(3)
			other.SpiffeId = "spiffe://cluster.local/ns/shop/sa/admin"
			answers <- errors.Join(s.SendWorkload("2", other), s.Answer("2"))
			return s.Drain()
		}
		r.serve()
		r.run()
		if err := <-answers; err != nil {
			t.Errorf("a good bundle: %v", err)
		}
		if err := <-answers; err == nil || !strings.Contains(err.Error(), "it is about spiffe://cluster.local/ns/shop/sa/admin") {
			t.Errorf("another's: %v", err)
		}
		if s := r.state(); s.Bundle.Sequence() != 2 || len(s.Bundle.Authorities()) != 2 {
			t.Errorf("sequence %d, %d authorities", s.Bundle.Sequence(), len(s.Bundle.Authorities()))
		}
	})
}

// A stream that the CA ends in good order is opened again at once; one that
// keeps ending so, or fails, is not hammered.
func TestStreamEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		opened := make(chan time.Time, 1000)
		var lives atomic.Int64
		lives.Store(int64(30 * time.Minute))
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			opened <- time.Now()
			if err := errors.Join(s.SendWorkload("1", r.ca.Workload(1)), s.Answer("1")); err != nil {
				return err
			}
			select {
			case <-time.After(time.Duration(lives.Load())):
			case <-s.Context().Done():
			}
			return nil
		}
		r.serve()
		r.run()
		time.Sleep(91 * time.Minute)
		synctest.Wait()
		if len(opened) != 4 {
			t.Fatalf("opened %d times", len(opened))
		}
		first := <-opened
		for i := range 3 {
			if at := (<-opened).Sub(first); at != time.Duration(i+1)*30*time.Minute {
				t.Errorf("opened again after %v", at)
			}
		}
		lives.Store(0)
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(opened); n < 60 || n > 150 {
			t.Errorf("opened %d times in an hour", n)
		}
	})
}

// The CA's wish brings a renewal forward, once, and never puts it off.
func TestRenewalHint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		wishes := make(chan time.Time)
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			for i := uint64(1); ; i++ {
				w := r.ca.Workload(i)
				select {
				case at := <-wishes:
					w.RenewAt = timestamppb.New(at)
				case <-s.Context().Done():
					return nil
				}
				if err := errors.Join(s.SendWorkload("n", w), s.Answer("n")); err != nil {
					return err
				}
			}
		}
		r.serve()
		r.run()
		first := r.svid()
		wishes <- time.Now().Add(50 * time.Minute) // later than half of the life
		if time.Sleep(24 * time.Minute); r.svid() != first {
			t.Fatal("renewed too early")
		}
		if time.Sleep(2 * time.Minute); r.svid() == first {
			t.Fatal("the wish put the renewal off")
		}
		second := r.svid()
		past := time.Now().Add(-time.Hour)
		wishes <- past
		if r.svid() == second {
			t.Fatal("a wish in the past does not mean now")
		}
		third := r.svid()
		wishes <- past
		if time.Sleep(time.Minute); r.svid() != third {
			t.Error("the same wish was obeyed twice")
		}
		wishes <- time.Now().Add(10 * time.Minute)
		if time.Sleep(9 * time.Minute); r.svid() != third {
			t.Error("renewed before the wish")
		}
		if time.Sleep(61 * time.Second); r.svid() == third {
			t.Error("the wish was not obeyed")
		}
	})
}

// A CA whose every word is a wish for a renewal gets one a second, not more.
func TestRenewalsCannotBeMadeAFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			for i := range 1000 {
				w := r.ca.Workload(1)
				w.RenewAt = timestamppb.New(time.Now().Add(-time.Duration(i) * time.Minute))
				if err := errors.Join(s.SendWorkload("n", w), s.Answer("n")); err != nil {
					return err
				}
				time.Sleep(10 * time.Millisecond)
			}
			return s.Drain()
		}
		r.serve()
		r.run()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := r.metric("meshca_agent_renewals_total", "result", "ok"); n < 5 || n > 11 {
			t.Errorf("%v renewals in 10 s", n)
		}
	})
}

// When a new bundle no longer holds the authority that signed our certificate,
// peers stop to believe it: renew now, not at half of the life.
func TestT12_RenewsWhenTheBundleDropsItsAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		next := identitytest.NewCA(t, r.ca.TrustDomain)
		swap := make(chan struct{})
		var signer atomic.Pointer[identitytest.CA]
		signer.Store(r.ca.CA)
		r.ca.OnSign = func(_ string, req *signRequest) (*signResponse, error) {
			by := signer.Load().Intermediate
			return r.ca.Sign(req, identitytest.WithIssuer(by, by.Certificate))
		}
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			<-swap
			w := r.ca.Workload(5)
			w.Bundle = &meshcav1.Bundle{TrustDomain: r.ca.TrustDomain.String(), Sequence: 5, X509Authorities: [][]byte{next.Root.Certificate.Raw}}
			return errors.Join(s.SendWorkload("5", w), s.Answer("5"), s.Drain())
		}
		r.serve()
		r.run()
		before := r.svid()
		signer.Store(next)
		close(swap)
		time.Sleep(leastTerm)
		s := r.state()
		if s.SVID == before || s.Bundle.Sequence() != 5 {
			t.Fatalf("still the old one\n%s", r.log.String())
		}
		if _, err := identity.Verify(s.SVID.Certificates(), identity.Server, s.Bundle, time.Now()); err != nil {
			t.Error(err)
		}
		warned := r.log.lines("has no authority for the certificate in use")
		chain := before.Certificates()
		if len(warned) != 1 || !strings.Contains(warned[0], "level=WARN") ||
			!strings.Contains(warned[0], "authority="+keyID(chain[len(chain)-1].AuthorityKeyId)) ||
			!strings.Contains(warned[0], "bundle="+keyID(next.Root.Certificate.SubjectKeyId)) {
			t.Errorf("the log says %q", warned)
		}
	})
}
