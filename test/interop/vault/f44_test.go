package vault

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/vault"
)

// brief is the shortest life that an intermediate may have.
const brief = 2 * ca.TestLeafFloor

// authority runs an authority whose intermediates are brief: a new one is due after
// half of that.
func authority(t *testing.T, w *world, u ca.Upstream, more ...catest.Option) *catest.Kit {
	t.Helper()
	w.script(t, []string{"INTERMEDIATE_LIFETIME=" + vault.TTL(brief)}, "policy")
	return catest.New(t, append([]catest.Option{
		catest.WithUpstream(func(ca.Upstream) ca.Upstream { return u }),
		catest.WithLeaf(ca.LeafConfig{TestLifetimes: true, Ceiling: brief / 2}), catest.WithIntermediateLifetime(brief),
	}, more...)...)
}

// ready waits until the authority can sign.
func ready(t *testing.T, k *catest.Kit, d time.Duration) {
	t.Helper()
	within(t, d, "ready", k.Authority.Ready)
}

// fails has a request for a signature fail, soon and for a reason.
func fails(t *testing.T, w *world, u *vault.Upstream, d time.Duration, want ...vault.State) *vault.Error {
	t.Helper()
	began := time.Now()
	_, err := u.SignIntermediate(t.Context(), w.request(t))
	took := time.Since(began)
	e := new(vault.Error)
	if !errors.As(err, &e) {
		t.Fatalf("error %v; want an Error of ca/vault", err)
	}
	for _, s := range want {
		if e.State == s {
			if took > d {
				t.Errorf("it took %v to fail; want at most %v", took, d)
			}
			return e
		}
	}
	t.Fatalf("state %q, want one of %q: %v", e.State, want, err)
	return nil
}

// counted is the sum of a counter's values; with a label's value, of that alone.
func counted(t *testing.T, r prometheus.Gatherer, name, value string) (sum float64) {
	t.Helper()
	all, err := r.Gather()
	must(t, err)
	for _, family := range all {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			if value == "" || len(m.GetLabel()) > 0 && m.GetLabel()[0].GetValue() == value {
				sum += m.GetCounter().GetValue()
			}
		}
		return sum
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func logins(t *testing.T, w *world, result string) float64 {
	t.Helper()
	return counted(t, w.metrics, "meshca_vault_logins_total", result)
}

// counting is a configuration whose metrics are the world's. It is for one upstream.
func counting(w *world) vault.Config {
	c := w.config()
	c.Metrics = w.metrics
	return c
}

// A sealed Vault is named, asked for nothing, and used again once it is unsealed; what
// has an intermediate signs on meanwhile.
func TestF44_SealedAndUnsealed(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	u, _ := start(t, w.config())
	state(t, u, 10*time.Second, vault.OK)
	k := authority(t, w, u)
	must(t, w.Seal(t.Context()))
	sealed := time.Now()
	before := k.Authority.Status()

	fails(t, w, u, 3*time.Second, vault.Sealed)
	r := state(t, u, 10*time.Second-time.Since(sealed), vault.Sealed)
	holds(t, r.Detail, "vault operator unseal", w.URL())
	if !r.Away || r.Next != "look whether Vault is back" {
		t.Errorf("report %+v", r)
	}
	for range 3 { // it is known, and costs one look each
		fails(t, w, u, time.Second, vault.Sealed)
	}
	within(t, brief/2+5*time.Second, "the authority in want of an intermediate", func() error {
		// Every round: nothing of what goes on above may stop the signing.
		k.SVID(t, "shop", "cart", 0)
		if s := k.Authority.Status(); s.UpstreamErr == nil {
			return fmt.Errorf("status %+v", s)
		}
		return nil
	})
	s := k.Authority.Status()
	if s.Authority != before.Authority || !s.RestartLoses() || s.Upstream.State != string(vault.Sealed) {
		t.Errorf("status %+v, was %+v", s, before)
	}
	must(t, k.Authority.Ready())

	must(t, w.Unseal(t.Context()))
	unsealed := time.Now()
	state(t, u, 10*time.Second, vault.OK)
	within(t, 10*time.Second-time.Since(unsealed), "a new intermediate", func() error {
		if s := k.Authority.Status(); s.Authority == before.Authority || s.UpstreamErr != nil {
			return fmt.Errorf("status %+v", s)
		}
		return nil
	})
	k.SVID(t, "shop", "cart", 0)
}

// A CA that starts while Vault is sealed is not ready, says why, and becomes ready by
// itself.
func TestF71_RestartWhileAway(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	must(t, w.Seal(t.Context()))
	u, _ := start(t, w.config())
	r := state(t, u, 10*time.Second, vault.Sealed)
	holds(t, r.Detail, "could not sign", "vault operator unseal")
	if !r.Away {
		t.Errorf("report %+v", r)
	}
	k := catest.New(t, catest.WithoutWaiting(), catest.WithUpstream(func(ca.Upstream) ca.Upstream { return u }))
	within(t, 5*time.Second, "not ready because of Vault", func() error {
		err, e := k.Authority.Ready(), new(vault.Error)
		if !errors.As(err, &e) || e.State != vault.Sealed {
			return fmt.Errorf("ready: %v", err)
		}
		return nil
	})
	if s := k.Authority.Status(); !s.RestartLoses() || s.UpstreamErr == nil || s.Authority != "" {
		t.Errorf("status %+v", s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := k.Authority.Issue(ctx, k.Caller(t, "shop", "cart"), catest.NewKey(t).Public(), 0); err == nil {
		t.Error("issued without an intermediate")
	}
	must(t, w.Unseal(t.Context()))
	ready(t, k, 10*time.Second)
	k.SVID(t, "shop", "cart", 0)
}
