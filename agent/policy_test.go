package agent

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/wire/meshcav1"
)

// policyMessage is what a CA says of r's workload under a version and a mode.
func (r *rig) policyMessage(version uint64, mode meshcav1.Mode) *meshcav1.Workload {
	w := r.ca.Workload(1)
	w.Policy = &meshcav1.Policy{Version: version, Mode: mode, Source: &meshcav1.Source{Level: "namespace", Namespace: "shop", Name: "default"}}
	return w
}

// A replica that is behind cannot take a proxy from STRICT back to PERMISSIVE: its
// policy is refused, the newer one stays, and another CA is asked.
func TestT10_F69_OlderPolicyIsRefusedAndAnotherCAAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		behind, nacked := make(chan struct{}), make(chan error, 1)
		streams := 0
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			if streams++; streams == 1 {
				err := errors.Join(s.SendWorkload("a", r.policyMessage(8, meshcav1.Mode_MODE_STRICT)), s.Answer("a"))
				<-behind
				return err
			}
			err := s.SendWorkload("b", r.policyMessage(7, meshcav1.Mode_MODE_PERMISSIVE))
			nacked <- errors.Join(err, s.Answer("b"))
			return s.Drain()
		}
		current := caclienttest.New(t, r.ca.ID)
		current.CA = r.ca.CA
		current.OnStream = func(s *caclienttest.Stream) error {
			return errors.Join(s.SendWorkload("c", r.policyMessage(9, meshcav1.Mode_MODE_DISABLE)), s.Answer("c"), s.Drain())
		}
		current.Serve(r.net.Listen("b:1"), r.ca.TLS(serverName))
		r.serve()
		r.run()
		if p := r.state().Policy; p == nil || p.Version != 8 || p.Mode != policy.Strict {
			t.Fatalf("policy %+v", p)
		}
		close(behind)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if len(nacked) == 0 {
			t.Fatalf("the replica that is behind got no answer:\n%s", r.log.String())
		}
		want := "the policy has version 7 (PERMISSIVE, namespace shop/default); version 8 (STRICT, namespace shop/default) is in use already"
		if err := <-nacked; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the CA was told %v, want %s", err, want)
		}
		if p := r.state().Policy; p.Version != 9 || p.Mode != policy.Disable {
			t.Errorf("policy %+v; the CA that is up to date was not asked", p)
		}
	})
}

// What a CA does not know takes nothing away, the same under another version is
// nothing to refuse, and a policy that is refused does not keep a bundle out.
func TestT10_PolicyStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		answers := make(chan error, 8)
		steps := make(chan *meshcav1.Workload, 1)
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			for w := range steps {
				err := errors.Join(s.SendWorkload("n", w), s.Answer("n"))
				answers <- err
				if err != nil { // whoever refuses goes elsewhere, and comes back
					break
				}
			}
			return s.Drain()
		}
		r.serve()
		r.run()
		send := func(w *meshcav1.Workload) error {
			steps <- w
			return <-answers
		}
		if err := send(r.ca.Workload(1)); err != nil || r.state().Policy != nil {
			t.Fatalf("before there is a policy: %v, %+v", err, r.state().Policy)
		}
		const none = 1 << 40
		sequence := uint64(1)
		for _, tt := range []struct {
			name    string
			version uint64
			labels  uint64
			mode    meshcav1.Mode
			refused bool
			held    uint64
			now     policy.Mode
		}{
			{"the first", 5, 0, meshcav1.Mode_MODE_STRICT, false, 5, policy.Strict},
			{"not sent", none, 0, 0, false, 5, policy.Strict},
			{"not known", 0, 0, meshcav1.Mode_MODE_DISABLE, false, 5, policy.Strict},
			{"older, the same", 4, 0, meshcav1.Mode_MODE_STRICT, false, 5, policy.Strict},
			{"newer, the same", 6, 0, meshcav1.Mode_MODE_STRICT, false, 6, policy.Strict},
			{"the same version, other content", 6, 0, meshcav1.Mode_MODE_DISABLE, true, 6, policy.Strict},
			{"older, other content", 5, 0, meshcav1.Mode_MODE_DISABLE, true, 6, policy.Strict},
			{"newer, other content", 7, 0, meshcav1.Mode_MODE_PERMISSIVE, false, 7, policy.Permissive},
			{"newer labels", 7, 50, meshcav1.Mode_MODE_STRICT, false, 7, policy.Strict},
			{"newer policies, older labels", 8, 49, meshcav1.Mode_MODE_PERMISSIVE, true, 7, policy.Strict},
			{"newer policies, labels not known", 8, 0, meshcav1.Mode_MODE_PERMISSIVE, true, 7, policy.Strict},
			{"both newer", 8, 51, meshcav1.Mode_MODE_DISABLE, false, 8, policy.Disable},
		} {
			w := r.policyMessage(tt.version, tt.mode)
			if tt.version == none {
				w.Policy = nil
			} else {
				w.Policy.WorkloadVersion = tt.labels
			}
			if tt.refused {
				sequence++ // comes in beside it
			}
			w.Bundle.Sequence = sequence
			if err := send(w); (err != nil) != tt.refused {
				t.Errorf("%s: %v", tt.name, err)
			}
			s := r.state()
			if s.Policy.Version != tt.held || s.Policy.Mode != tt.now || s.Bundle.Sequence() != sequence {
				t.Errorf("%s: version %d, %v, bundle %d", tt.name, s.Policy.Version, s.Policy.Mode, s.Bundle.Sequence())
			}
		}
		close(steps)
	})
}
