package kubestate

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/audit"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/identity/identitytest"
)

// authority runs a CA on a replica's store, wired as meshca serve does it.
func authority(t *testing.T, r *replica) *ca.Authority {
	t.Helper()
	trail, err := audit.Open(filepath.Join(t.TempDir(), "audit.jsonl"), time.Now)
	check(t, err)
	a, err := ca.New(ca.Config{
		TrustDomain: identitytest.TrustDomain(t, "cluster.local"), Upstream: r.Store, MaySign: r.MaySign, Audit: trail,
	})
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		check(t, errors.Join(<-ended, trail.Close()))
	})
	return a
}

// issues has the CA sign a certificate, verified by the root that is in the cluster.
func issues(t *testing.T, a *ca.Authority, root *x509.Certificate) error {
	t.Helper()
	chain, err := a.IssueServing(t.Context(), ca.ServingNames{DNS: []string{"meshca.test"}}, identitytest.NewKey(t).Public())
	if err != nil {
		return err
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err = chain[0].Verify(x509.VerifyOptions{DNSName: "meshca.test", Roots: roots, Intermediates: between})
	return err
}

// Two CAs from an empty namespace: each has an intermediate of its own under one
// root, and goes on signing while the state is gone, unless a rotation is running.
func TestF14_F64_AuthoritiesOnOneRoot(t *testing.T) {
	ns := newNamespace(t)
	var skew, cutOff atomic.Int64
	first := start(t, ns, options{
		now: func() time.Time { return time.Now().Add(time.Duration(skew.Load())) },
		judge: func(*request) fault {
			if cutOff.Load() > 0 {
				return before
			}
			return pass
		},
	})
	second := start(t, ns, options{})
	a, b := authority(t, first), authority(t, second)
	for _, x := range []*ca.Authority{a, b} {
		eventually(t, "ready", x.Ready)
		check(t, issues(t, x, onlyRoot(t, ns)))
	}
	if a.Status().Authority == b.Status().Authority {
		t.Error("both have one intermediate")
	}
	root := onlyRoot(t, ns)
	check(t, admin(t).Secrets(ns).Delete(t.Context(), state.SecretName(1), metav1.DeleteOptions{}))
	check(t, issues(t, a, root))

	from, _, _ := second.State()
	to := from
	to.Step = state.StepActivate
	eventually(t, "a rotation", func() error {
		if from, _, _ = second.State(); from.Step == state.StepActivate {
			return nil
		}
		to.Epoch, to.Sequence = from.Epoch, from.Sequence
		return second.Advance(t.Context(), from, to)
	})
	eventually(t, "the first knows", func() error {
		if s, _, _ := first.State(); s.Step != state.StepActivate {
			return errors.New("not yet")
		}
		return nil
	})
	cutOff.Store(1)
	eventually(t, "cut off", func() error {
		if first.Trouble() == nil {
			return errors.New("not yet")
		}
		return nil
	})
	check(t, issues(t, a, root))
	skew.Store(int64(state.Patience))
	if err := issues(t, a, root); !errors.As(err, new(*state.StaleError)) {
		t.Errorf("signing blindly during a rotation: %v", err)
	}
	if err := a.Ready(); !errors.As(err, new(*state.StaleError)) {
		t.Errorf("Ready = %v", err)
	}
	check(t, issues(t, b, root))
	cutOff.Store(0)
	eventually(t, "signing again", a.Ready)
	check(t, issues(t, a, root))
}

// An older backup is made the newest version under CAs that run: their bundle is the
// new one within the store's interval, and not at half of an intermediate's life.
func TestT12_NewestVersionReachesRunningAuthorities(t *testing.T) {
	ns := newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	a, b := authority(t, r), authority(t, start(t, ns, options{}))
	settled(t, ns)
	reaches := func(sequence uint64) {
		t.Helper()
		for _, authority := range []*ca.Authority{a, b} {
			eventually(t, "the bundle", func() error {
				bundle, _ := authority.Bundle()
				if bundle == nil || bundle.Sequence() != sequence {
					return fmt.Errorf("the bundle is %v, not %d", bundle, sequence)
				}
				return issues(t, authority, root)
			})
		}
	}
	reaches(1)
	backup, err := state.TakeBackup(t.Context(), admin(t), ns, time.Now())
	check(t, err)
	from, _, _ := r.State()
	to := from
	to.Sequence++
	check(t, r.Advance(t.Context(), from, to))
	reaches(2)
	eventually(t, "the marker", func() error {
		_, err := backup.Restore(t.Context(), admin(t), ns, true)
		return err
	})
	reaches(3)
}

// A CA that was refused its first intermediate goes on at once when the root is back,
// and not at the end of a pause of minutes.
func TestF13_AuthorityGoesOnWhenTheRootIsBack(t *testing.T) {
	ns := newNamespace(t)
	r := start(t, ns, options{})
	root := r.root(t)
	settled(t, ns)
	r.stop()
	backup, err := state.TakeBackup(t.Context(), admin(t), ns, time.Now())
	check(t, err)
	check(t, admin(t).Secrets(ns).Delete(t.Context(), state.SecretName(1), metav1.DeleteOptions{}))
	r = start(t, ns, options{})
	a := authority(t, r)
	eventually(t, "a refusal", func() error {
		if a.Status().UpstreamErr == nil {
			return errors.New("none yet")
		}
		return nil
	})
	_, err = backup.Restore(t.Context(), admin(t), ns, false)
	check(t, err)
	eventually(t, "signing", func() error { return issues(t, a, root) })
}
