package server

import (
	"errors"
	"fmt"
	"testing"
	"time"

	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/census"
	"github.com/meshca/meshca/ca/kube/apitest"
	"github.com/meshca/meshca/identity/identitytest"
)

// known waits for what is known of a workload.
func known(t *testing.T, c *census.Census, name string, holds func(census.Workload) error) {
	t.Helper()
	end, tick := time.After(20*time.Second), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for {
		err := errors.New("it is not known")
		c.Each(func(w census.Workload) bool {
			if w.Name == name {
				err = holds(w)
			}
			return true
		})
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-end:
			t.Fatal(err)
		}
	}
}

// What a node's agent shows, takes and refuses is known, pod by pod, and so is what
// was issued and refused.
func TestTheCensusIsTold(t *testing.T) {
	told := census.New()
	c := startCluster(t, 1, func(s *settings) { s.server.Census = told })
	for i := range 3 {
		c.api.Put("pods", apitest.Pod("shop", fmt.Sprintf("cart-%d", i), uidOf(i), "cart", "node-0"))
	}
	as := c.as(t, "shop", "cart", "cart-0", uidOf(0), "node-0")
	if _, err := c.create(t, as, &istio.IstioCertificateRequest{Csr: newCSR(t, identitytest.NewKey(t), nil)}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.create(t, c.as(t, "shop", "cart", "cart-2", uidOf(2), "node-0"), nil); err == nil {
		t.Fatal("a certificate without a CSR")
	}
	v := c.agent(t, 0)
	v.nack = uidOf(1)
	v.ask(uidOf(0), uidOf(1))
	known(t, told, uidOf(0), func(w census.Workload) error {
		if w.Streams != 1 || w.Node != "node-0" || w.ID.String() != cartURI || w.Acked.Bundle != 1 || w.Acked != w.Sent || !w.Ends.After(w.Issued) {
			return fmt.Errorf("taken: %+v", w)
		}
		return nil
	})
	known(t, told, uidOf(1), func(w census.Workload) error {
		if w.Streams != 1 || w.Acked.Bundle != 0 || w.Sent.Bundle != 1 || w.Nacked.Reason != "not this one" || w.SentAt.IsZero() {
			return fmt.Errorf("refused by the agent: %+v", w)
		}
		return nil
	})
	known(t, told, uidOf(2), func(w census.Workload) error {
		if w.Streams != 0 || w.Refused.Reason == "" || !w.Ends.IsZero() {
			return fmt.Errorf("refused by the CA: %+v", w)
		}
		return nil
	})
	must(t, v.stream.CloseSend())
	known(t, told, uidOf(0), func(w census.Workload) error {
		if w.Streams != 0 || w.Acked.Bundle != 1 {
			return fmt.Errorf("after the stream: %+v", w)
		}
		return nil
	})
}

// A caller of its own is known by its stream too, and one that resumes is taken at its
// word for what it has.
func TestTheCensusKnowsWhoResumes(t *testing.T) {
	told := census.New()
	h := start(t, func(s *settings) { s.server.Census = told })
	first := exchange(t, h.delta(t, h.good(t)), subscribe())
	req := subscribe()
	req.InitialResourceVersions = map[string]string{podUID: first.GetResources()[0].GetVersion()}
	req.ResourceNamesSubscribe = []string{"x"} // so that there is an answer
	req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, "*")
	exchange(t, h.delta(t, h.good(t)), req)
	known(t, told, podUID, func(w census.Workload) error {
		if w.Streams != 2 || w.Acked.Resource != first.GetResources()[0].GetVersion() || w.Acked.Bundle != 1 || !w.SentAt.IsZero() {
			return fmt.Errorf("%+v", w)
		}
		return nil
	})
}
