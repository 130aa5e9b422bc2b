package vault

import (
	"errors"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/vault"
)

// Vault is away for longer than an intermediate lives: the CA signs to its end, then
// says that it is not ready and why, and is ready soon after Vault is back.
func TestF50_F20_AwayPastTheEnd(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	u, _ := start(t, w.config())
	state(t, u, 10*time.Second, vault.OK)
	k := authority(t, w, u)
	must(t, k.Authority.Ready())
	must(t, w.Kill())
	killed, before := time.Now(), k.Authority.Status()
	var err error
	within(t, brief+15*time.Second, "not ready", func() error {
		if err = k.Authority.Ready(); err == nil {
			k.SVID(t, "shop", "cart", 0) // ready means that it signs
			return errors.New("it is ready")
		}
		return nil
	})
	// The last leaf has to fit: shorter than the floor it would be of no use.
	if now := time.Now(); now.Before(before.SignsUntil.Add(-brief)) || now.Sub(killed) > brief+5*time.Second {
		t.Errorf("not ready at %v; killed at %v, and the intermediate ended at %v", now, killed, before.SignsUntil)
	}
	// The end comes into view while the upstream is away, so the reason is both.
	no, e := new(ca.NotReadyError), new(vault.Error)
	if !errors.As(err, &no) || no.Reason == "" || !errors.As(err, &e) || e.State != vault.Unreachable {
		t.Errorf("not ready because of %v", err)
	}
	within(t, brief+5*time.Second, "the end of the intermediate", func() error {
		if end := k.Authority.Status().SignsUntil; time.Now().Before(end) {
			return errors.New("it ends at " + end.String())
		}
		return nil
	})
	if _, err := k.Authority.Issue(t.Context(), k.Caller(t, "shop", "cart"), catest.NewKey(t).Public(), 0); err == nil {
		t.Error("issued by an intermediate that is over")
	}
	s := k.Authority.Status()
	if s.Upstream.State != string(vault.Unreachable) || !s.Upstream.Away || !s.RestartLoses() {
		t.Errorf("status %+v", s)
	}
	must(t, w.Restart(t.Context()))
	must(t, w.Unseal(t.Context()))
	ready(t, k, 10*time.Second)
	k.SVID(t, "shop", "cart", 0)
	if s := k.Authority.Status(); s.Authority == before.Authority || s.Upstream.Away {
		t.Errorf("status %+v", s)
	}
}
