package ca_test

import (
	"errors"
	"sync/atomic"
	"testing"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity/identitytest"
)

// A replica that may have missed that another issuer is in force signs nothing,
// although it could, and says why.
func TestF14_NothingIsSignedThatMayNotBe(t *testing.T) {
	stale := errors.New("the shared state is stale")
	var stopped atomic.Bool
	k := catest.New(t, catest.WithMaySign(func() error {
		if stopped.Load() {
			return stale
		}
		return nil
	}))
	names, pub := ca.ServingNames{DNS: []string{"localhost"}}, identitytest.NewKey(t).Public()
	sign := func() error {
		_, err := k.Authority.IssueServing(t.Context(), names, pub)
		return err
	}
	check(t, errors.Join(sign(), k.Authority.Ready()))
	stopped.Store(true)
	for what, err := range map[string]error{"signing": sign(), "readiness": k.Authority.Ready()} {
		if !errors.Is(err, stale) || !errors.As(err, new(*ca.NotReadyError)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	stopped.Store(false)
	check(t, errors.Join(sign(), k.Authority.Ready()))
}
