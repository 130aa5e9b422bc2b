package vault

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
)

// Six hours of a sealed Vault, by the clock: certificates are issued and renewed all
// the while, the state says since when, Vault is looked for every 5 s and asked for
// nothing else, and once it is unsealed there is a new intermediate within 10 s.
func TestF44_SixHoursSealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		k.run(t)
		a := catest.New(t, catest.WithUpstream(func(ca.Upstream) ca.Upstream { return k.up }))
		first := a.Authority.Status()
		time.Sleep(35 * time.Hour) // an hour before half of its life
		synctest.Wait()
		k.set(func() { k.health = `{"initialized":true,"sealed":true,"standby":true}` })
		time.Sleep(time.Hour)
		logins, signs := k.asked(loginPath), k.asked(signPath)
		for range 6 {
			looks := k.asked("sys/health")
			time.Sleep(time.Hour)
			synctest.Wait()
			if n := k.asked("sys/health") - looks; n < 715 || n > 1500 {
				t.Errorf("looked %d times in an hour", n)
			}
			a.SVID(t, "shop", "cart", time.Hour)
			k.state(t, Sealed)
			s := a.Authority.Status()
			if err := a.Authority.Ready(); err != nil || s.Authority != first.Authority || s.UpstreamErr == nil {
				t.Fatalf("ready %v, status %+v", err, s)
			}
			if !s.SignsUntil.Equal(first.SignsUntil) || time.Until(s.SignsUntil) < 29*time.Hour {
				t.Errorf("it says that it signs until %v", s.SignsUntil)
			}
		}
		r := k.up.Report()
		for _, want := range []string{"since 2000-01-02T11:0", "sealed", "vault operator unseal", "restarted now could not sign"} {
			if !strings.Contains(r.Detail, want) {
				t.Errorf("detail %q lacks %q", r.Detail, want)
			}
		}
		if r.Next != "look whether Vault is back" || time.Until(r.NextAt) > pollAway {
			t.Errorf("next: %q in %v", r.Next, time.Until(r.NextAt))
		}
		if n := testutil.ToFloat64(k.up.metrics.loses); n != 1 {
			t.Errorf("restart_loses_signing %v", n)
		}
		if l, s := k.asked(loginPath)-logins, k.asked(signPath)-signs; l != 0 || s != 0 {
			t.Errorf("%d logins and %d requests for signatures while it was sealed", l, s)
		}
		k.set(func() { k.health = healthy })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if s := a.Authority.Status(); s.Authority == first.Authority || s.UpstreamErr != nil {
			t.Errorf("10 s after: %+v", s)
		}
		k.state(t, OK)
		if n := testutil.ToFloat64(k.up.metrics.loses); n != 0 {
			t.Errorf("restart_loses_signing %v", n)
		}
	})
}

// The states of a Vault that is away are told apart, and each heals by itself.
func TestF44_F45_F48_StatesAreToldApart(t *testing.T) {
	refused := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	away := func(health string) func(*fake) { return func(f *fake) { f.health = health } }
	all := func(a *fakeAnswer) func(*fake) {
		return func(f *fake) { f.respond = func(string) *fakeAnswer { return a } }
	}
	for state, breakIt := range map[State]func(*fake){
		Sealed:        away(`{"initialized":true,"sealed":true}`),
		Uninitialised: away(`{"initialized":false,"sealed":true}`),
		Standby:       away(`{"initialized":true,"sealed":false,"standby":true}`),
		Slow:          func(f *fake) { f.hang = true },
		Unreachable:   all(&fakeAnswer{err: refused}),
		Refused:       all(&fakeAnswer{status: 200, body: "<html>"}),
	} {
		t.Run(string(state), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := newKit(t)
				k.run(t)
				time.Sleep(time.Second)
				k.state(t, OK)
				k.set(func() { breakIt(k.fake) })
				_, err := k.up.SignIntermediate(t.Context(), k.request(t))
				if e := new(Error); !errors.As(err, &e) || e.State != state {
					t.Errorf("error %v, want state %s", err, state)
				}
				changed := k.up.Changed()
				k.state(t, state)
				time.Sleep(time.Minute)
				k.state(t, state)
				select {
				case <-changed:
					t.Error("said to have changed")
				default:
				}
				k.set(func() { k.health, k.hang, k.respond = healthy, false, nil })
				time.Sleep(10 * time.Second)
				select {
				case <-changed:
				default:
					t.Error("not said to have changed within 10 s")
				}
				_, err = k.up.SignIntermediate(t.Context(), k.request(t))
				check(t, err)
				k.state(t, OK)
			})
		})
	}
}

// Nothing is woken that had nothing to wait for.
func TestF44_NobodyIsWokenInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		k.run(t)
		time.Sleep(time.Second)
		_, err := k.up.SignIntermediate(t.Context(), k.request(t))
		check(t, err)
		changed := k.up.Changed()
		k.set(func() { k.health = `{"initialized":true,"sealed":true}` })
		time.Sleep(time.Hour)
		k.set(func() { k.health = healthy })
		time.Sleep(time.Hour)
		k.state(t, OK)
		select {
		case <-changed:
			t.Error("said to have changed")
		default:
		}
	})
}

// A token that Vault does not know any more is replaced once, within the call. If
// Vault then knows none, there is no storm of logins.
func TestF46_OneNewLoginThenPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		k.run(t)
		time.Sleep(time.Second)
		k.set(func() { clear(k.tokens) })
		_, err := k.up.SignIntermediate(t.Context(), k.request(t))
		check(t, err)
		if n := k.asked(loginPath); n != 2 {
			t.Errorf("%d logins, want 2", n)
		}
		k.set(func() {
			k.respond = func(path string) *fakeAnswer {
				if path == signPath || path == lookupPath {
					return &fakeAnswer{status: 403, body: `{"errors":["permission denied"]}`}
				}
				return nil
			}
		})
		began, before := time.Now(), k.asked(loginPath)
		for time.Since(began) < time.Hour {
			if _, err := k.up.SignIntermediate(t.Context(), k.request(t)); err == nil {
				t.Fatal("signed")
			}
			time.Sleep(time.Second)
		}
		// 5 s, 10 s, … 5 min, each halved by jitter on average.
		if n := k.asked(loginPath) - before; n < 10 || n > 60 {
			t.Errorf("%d logins in an hour of asking each second", n)
		}
		k.state(t, Forbidden)
	})
}

// A policy that has gone causes no login at all, and its path is named.
func TestF47_NoLoginForAPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		k.run(t)
		time.Sleep(time.Second)
		k.set(func() { k.denied = true })
		logins := k.asked(loginPath)
		for range 600 {
			if _, err := k.up.SignIntermediate(t.Context(), k.request(t)); err == nil || !strings.Contains(err.Error(), signPath) {
				t.Fatalf("error %v", err)
			}
			time.Sleep(time.Second)
		}
		k.state(t, Forbidden)
		if n := k.asked(loginPath) - logins; n != 0 {
			t.Errorf("%d logins", n)
		}
		k.set(func() { k.denied = false })
		_, err := k.up.SignIntermediate(t.Context(), k.request(t))
		check(t, err)
		k.state(t, OK)
	})
}

// A request that fails again and again while Vault looks well wakes the authority ever
// more slowly.
func TestF48_WakingHasPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		k.run(t)
		time.Sleep(time.Second)
		k.set(func() {
			k.respond = func(path string) *fakeAnswer {
				if path == signPath {
					return &fakeAnswer{err: &net.OpError{Op: "read", Err: syscall.ECONNRESET}}
				}
				return nil
			}
		})
		ask := func() { _, _ = k.up.SignIntermediate(t.Context(), k.request(t)) }
		ask()
		wakes, end := 0, time.NewTimer(time.Hour)
		for done := false; !done; {
			select {
			case <-k.up.Changed():
				wakes++
				ask()
			case <-end.C:
				done = true
			}
		}
		if wakes < 5 || wakes > 60 {
			t.Errorf("woken %d times in an hour", wakes)
		}
	})
}

// The token is renewed between a half and two thirds of its life, and near its longest
// life there is a new login while the old one is still good.
func TestF46_RenewalAndNewLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		k.set(func() { k.renewals = 3 })
		k.run(t)
		time.Sleep(30 * time.Minute)
		synctest.Wait()
		if n := k.asked(renewPath); n != 0 {
			t.Errorf("%d renewals before half of its life", n)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := k.asked(renewPath); n != 1 {
			t.Errorf("%d renewals after two thirds of its life", n)
		}
		for range 24 * 60 {
			time.Sleep(time.Minute)
			synctest.Wait()
			k.state(t, OK)
			if k.sessionOver(t) {
				t.Fatal("the token has ended")
			}
		}
		if n := k.asked(loginPath); n < 5 || n > 40 {
			t.Errorf("%d logins in a day", n)
		}
	})
}

// A SecretID that Vault refuses is not shown again, however long that lasts; a new one
// is taken at once.
func TestF46_ARefusedSecretIDIsShownOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		check(t, os.WriteFile(k.secretID, []byte("used-up"), 0o600))
		k.run(t)
		time.Sleep(time.Hour)
		synctest.Wait()
		k.state(t, Expired)
		if n := k.asked(loginPath); n != 1 {
			t.Errorf("%d logins", n)
		}
		check(t, os.WriteFile(k.secretID, []byte("secret-canary"), 0o600))
		time.Sleep(pollAway)
		synctest.Wait()
		k.state(t, OK)
	})
}

// A login that is refused for what Vault is set to is tried ever more slowly.
func TestF46_RefusedLoginsHavePauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const path = "auth/kubernetes/login"
		token := filepath.Join(t.TempDir(), "token")
		check(t, os.WriteFile(token, []byte("jwt"), 0o600))
		k := newKit(t, func(c *Config) { c.Auth = Kubernetes{Mount: "kubernetes", Role: "meshca", TokenFile: token} })
		k.set(func() {
			k.respond = func(asked string) *fakeAnswer {
				if asked != path {
					return nil
				}
				return &fakeAnswer{status: 403, body: `{"errors":["permission denied"]}`}
			}
		})
		k.run(t)
		time.Sleep(time.Hour)
		synctest.Wait()
		k.state(t, Forbidden)
		if n := k.asked(path); n < 10 || n > 100 {
			t.Errorf("%d logins in an hour", n)
		}
	})
}

// A crash loop beside a Vault that is away uses no SecretID.
func TestF71_NoLoginWhileVaultIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		k.set(func() { k.health = `{"initialized":true,"sealed":true}` })
		stop := k.run(t)
		time.Sleep(time.Minute)
		stop()
		if n := k.asked(loginPath); n != 0 {
			t.Errorf("%d logins", n)
		}
	})
}

// Vault is slow: a call ends by its deadline, and the authority's is kept.
func TestF48_Deadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKit(t)
		k.run(t)
		time.Sleep(time.Second)
		k.set(func() { k.hang = true })
		began := time.Now()
		_, err := k.up.SignIntermediate(t.Context(), k.request(t))
		if e := new(Error); !errors.As(err, &e) || e.State != Slow {
			t.Errorf("error %v", err)
		}
		if took := time.Since(began); took != signTimeout {
			t.Errorf("took %v", took)
		}
		k.state(t, Slow)
	})
}
