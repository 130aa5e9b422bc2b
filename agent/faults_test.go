package agent

import (
	"crypto/x509"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/identity/identitytest"
)

// An outage of a day: what is held is served to its end, somebody is told at a
// quarter of the life, tries never stop and are never far apart, and the end of
// the outage is the end of the trouble.
func TestF33_CutOffFromTheCAForADay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ca.Lifetime = 24 * time.Hour
		r.serve()
		r.run()
		svid := r.svid()
		r.cutOff()

		time.Sleep(time.Until(svid.NotAfter()) - 6*time.Hour - 10*time.Second)
		synctest.Wait()
		if len(r.log.lines("the certificate ends in")) != 0 || r.metric("meshca_agent_svid_alarm") != 0 {
			t.Error("an alarm before a quarter of the life is left")
		}
		if lines := r.log.lines(" for a certificate: no answer in 5 s (tried 2 CAs, next try in "); len(lines) == 0 || !strings.Contains(lines[0], "serving the current one, good for ") {
			t.Errorf("log:\n%.2000s", r.log.String())
		}
		time.Sleep(time.Minute + 20*time.Second)
		synctest.Wait()
		alarm := r.log.lines("the certificate ends in 5 h and could not be renewed")
		if len(alarm) != 1 || !strings.Contains(alarm[0], "level=ERROR") || !strings.Contains(alarm[0], "no answer in 5 s") || r.metric("meshca_agent_svid_alarm") != 1 {
			t.Errorf("no alarm at a quarter of the life: %q", alarm)
		}
		time.Sleep(time.Until(svid.NotAfter()) - time.Second)
		if s := r.state(); s.SVID != svid || s.Denied != nil || r.agent.Ready() != nil {
			t.Error("not served to the end")
		}
		time.Sleep(time.Hour)
		if err := r.agent.Ready(); err == nil || !strings.Contains(err.Error(), "no answer in 5 s") {
			t.Errorf("with an ended certificate: %v", err)
		}

		dials := len(r.net.Dials())
		time.Sleep(time.Hour)
		if tries := len(r.net.Dials()) - dials; tries < 2*2*60*60/80 {
			t.Errorf("%d dials in an hour; a try a minute at two CAs was promised", tries)
		}
		r.serve()
		time.Sleep(2 * time.Minute)
		if r.svid() == svid || r.agent.Ready() != nil || r.metric("meshca_agent_svid_alarm") != 0 {
			t.Error("it did not heal")
		}
	})
}

// A life of 10 s with the CA away for a part of it that is shorter than half.
func TestShortLifetimesSurviveAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ca.Lifetime = 10 * time.Second
		r.serve()
		r.run()
		for range 10 {
			synctest.Wait()
			r.stop()
			r.net.Refuse("a:1")
			time.Sleep(4500 * time.Millisecond)
			if err := r.agent.Ready(); err != nil {
				t.Fatal(err)
			}
			r.serve()
			time.Sleep(7 * time.Second)
			if err := r.agent.Ready(); err != nil {
				t.Fatalf("%v\n%s", err, r.log.String())
			}
		}
	})
}

// The wall clock decides, whatever the timers think: after a suspend past the
// end (time jumps, the monotonic clock did not move), the renewal is at once.
func TestF42_WallClockDecides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.serve()
		r.run()
		for _, jump := range []time.Duration{40 * time.Minute, 30 * time.Hour} {
			before := r.svid()
			r.clock.set(time.Duration(r.clock.offset.Load()) + jump)
			time.Sleep(30 * time.Second)
			if r.svid() == before || r.agent.Ready() != nil {
				t.Errorf("30 s after a jump of %v: still the old one", jump)
			}
		}
		// Set back by an hour: what was drawn for the monotonic clock still counts.
		before := r.svid()
		r.clock.set(time.Duration(r.clock.offset.Load()) - time.Hour)
		time.Sleep(30*time.Minute + 30*time.Second)
		if r.svid() == before {
			t.Error("a clock set back puts the renewal off")
		}
	})
}

func TestF52_NewCertificateNotYetValidKeepsTheOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var ahead atomic.Int64
		r.ca.OnSign = func(_ string, req *signRequest) (*signResponse, error) {
			return r.ca.Sign(req, identitytest.WithTemplate(func(c *x509.Certificate) {
				by := time.Duration(ahead.Load())
				c.NotBefore, c.NotAfter = c.NotBefore.Add(by), c.NotAfter.Add(by)
			}))
		}
		r.serve()
		r.run()
		before := r.svid()
		ahead.Store(int64(time.Hour))
		time.Sleep(26 * time.Minute) // due at 25
		if r.svid() != before {
			t.Fatal("a certificate that is not valid yet was taken")
		}
		lines := r.log.lines("the new certificate begins at 2000-01-01T01:2")
		if len(lines) == 0 || !strings.Contains(lines[0], "level=ERROR") || !strings.Contains(lines[0], "but the clock here says 2000-01-01T00:25:00Z") || !strings.Contains(lines[0], "good for 35 min") {
			t.Errorf("log:\n%s", r.log.String())
		}
		if r.metric("meshca_agent_renewals_total", "result", "clock") == 0 {
			t.Error("not counted")
		}
		ahead.Store(0)
		time.Sleep(time.Minute)
		if r.svid() == before {
			t.Error("it did not heal")
		}
	})
}

// Token and anchor are looked at again even while a long wait is on.
func TestF35_RepairedFilesHealWithin10s(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Draw = func() float64 { return 0.99 } }) // the longest waits
		r.ca.OnSign = func(token string, req *signRequest) (*signResponse, error) {
			if token != canary {
				return nil, status.Error(codes.Unauthenticated, "ref 1")
			}
			return r.ca.Sign(req)
		}
		r.setToken("expired")
		r.serve()
		r.run()
		time.Sleep(30 * time.Minute)
		if r.svid() != nil {
			t.Fatal("an expired token was enough")
		}
		r.setToken(canary)
		time.Sleep(10 * time.Second)
		if r.svid() == nil {
			t.Error("10 s after the token was repaired: no certificate")
		}

		// Now the anchor, while the stream is cut: both loops must come back.
		good, err := os.ReadFile(r.anchor)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(r.anchor, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		r.stop()
		r.serve()
		before := r.svid()
		time.Sleep(32 * time.Minute)
		if r.svid() != before || len(r.log.lines("trust anchor file")) == 0 || r.metric("meshca_agent_ca_connected") != 0 {
			t.Fatal("an empty anchor file was enough")
		}
		if err := os.WriteFile(r.anchor, good, 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		if r.svid() == before || r.metric("meshca_agent_ca_connected") != 1 {
			t.Error("10 s after the anchor was repaired: not healed")
		}
	})
}
