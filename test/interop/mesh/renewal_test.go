package mesh

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/test/envoytest"
)

// shortLife is the shortest life that the CA gives: renewed every 3.3 to 5 s.
const shortLife = 10 * time.Second

// TestF36_EnvoysUnderLoadThroughFiftyRenewals: requests run all the time through
// two Envoys whose certificates are replaced fifty times, while their agents
// and the CA are killed. Not one request may fail.
func TestF36_EnvoysUnderLoadThroughFiftyRenewals(t *testing.T) {
	t.Parallel()
	for name, sds := range map[string]envoytest.SDSType{
		"state of the world": envoytest.StateOfTheWorld,
		"delta":              envoytest.Delta,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			renewUnderLoad(t, sds)
		})
	}
}

func renewUnderLoad(t *testing.T, sds envoytest.SDSType) {
	ctx := t.Context()
	m := newMesh(t, shortLife)
	ca := m.startCA(t)
	cart := m.workload(t, "cart").startReadyAgent(t, ca)
	frontend := m.workload(t, "frontend").startReadyAgent(t, ca)
	names := func(peer *Agent) envoytest.TLS {
		return envoytest.TLS{Certificate: "default", Validation: "ROOTCA", PeerIDs: []string{peer.id}}
	}
	server := startReadyEnvoy(t, envoytest.Bootstrap{NodeID: "cart", Socket: cart.socket, SDS: sds, Servers: []envoytest.Server{
		{Name: "inbound", Upstream: backend(t), TLS: names(frontend)},
	}})
	inbound := listener(t, server, "inbound")
	client := startReadyEnvoy(t, envoytest.Bootstrap{NodeID: "frontend", Socket: frontend.socket, SDS: sds, Clients: []envoytest.Client{
		{Name: "outbound", Upstream: inbound, TLS: names(cart)},
	}})
	r := newRenewals(t, server, client)
	l := startLoad(ctx, httpThrough(t, listener(t, client, "outbound")))
	defer l.stop()

	r.waitTotal(t, 16)
	cart.Kill9(t)
	frontend.Kill9(t)
	cart.Restart(t)
	frontend.Restart(t)
	r.waitEach(t, 2)

	r.waitTotal(t, 32)
	before := issuerAt(t, inbound)
	ca.Kill9(t)
	waitOutageNoticed(t, cart, frontend)
	ca.Restart(t)
	r.waitEach(t, 2)
	if after := issuerAt(t, inbound); after == before {
		t.Errorf("the certificates are still signed by %q, which the killed CA took with it", after)
	}

	r.waitTotal(t, 50)
	l.stop()
	l.wantNoFailure(t)
	counts := r.counts(t)
	t.Logf("certificates replaced in the server %d times, in the client %d times; %s", counts[0], counts[1], l)
}

// TestF36_EnvoyIsServedAnewAfterARestart: a restarted agent numbers its versions
// from the beginning, so what Envoy says that it has looks like what the agent
// has to give, and is not. No renewal comes to help: Envoy must get the new
// certificate at once.
func TestF36_EnvoyIsServedAnewAfterARestart(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 0)
	a := m.workload(t, "cart").startReadyAgent(t, m.startCA(t))
	var servers []string
	for _, sds := range []envoytest.SDSType{envoytest.StateOfTheWorld, envoytest.Delta} {
		e := startReadyEnvoy(t, envoytest.Bootstrap{NodeID: "cart", Socket: a.socket, SDS: sds, Servers: []envoytest.Server{
			{Name: "inbound", Upstream: backend(t), TLS: envoytest.TLS{Certificate: "default", Validation: "ROOTCA"}},
		}})
		servers = append(servers, listener(t, e, "inbound"))
	}
	before := make([]*x509.Certificate, len(servers))
	for i, address := range servers {
		before[i] = leafAt(t, address)
	}
	a.Kill9(t)
	for i, address := range servers {
		if !leafAt(t, address).Equal(before[i]) {
			t.Error("without its agent, Envoy shows another certificate")
		}
	}
	a.Restart(t)
	for i, address := range servers {
		err := eventually(t.Context(), "Envoy to show the restarted agent's certificate", func() error {
			if leafAt(t, address).Equal(before[i]) {
				return errors.New("it shows the old one")
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// renewals counts, by Envoys' own statistics, how often their TLS contexts were
// made anew because a secret had changed.
type renewals struct {
	envoys []*envoytest.Envoy
	base   []uint64
}

func newRenewals(t *testing.T, envoys ...*envoytest.Envoy) *renewals {
	t.Helper()
	r := &renewals{envoys: envoys, base: make([]uint64, len(envoys))}
	r.base = r.counts(t)
	return r
}

func (r *renewals) counts(t *testing.T) []uint64 {
	t.Helper()
	counts := make([]uint64, len(r.envoys))
	for i, e := range r.envoys {
		stats, err := e.Stats(t.Context(), "ssl_context_update_by_sds")
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range stats {
			counts[i] = n - r.base[i]
		}
	}
	return counts
}

// waitTotal waits for that many renewals, those of all Envoys together.
func (r *renewals) waitTotal(t *testing.T, n uint64) {
	t.Helper()
	r.wait(t, func(now []uint64) bool {
		sum := uint64(0)
		for _, c := range now {
			sum += c
		}
		return sum >= n
	})
}

// waitEach waits for that many more renewals of each Envoy.
func (r *renewals) waitEach(t *testing.T, n uint64) {
	t.Helper()
	before := r.counts(t)
	r.wait(t, func(now []uint64) bool {
		for i := range now {
			if now[i] < before[i]+n {
				return false
			}
		}
		return true
	})
}

// wait gives up when nothing has been renewed for a certificate's whole life.
func (r *renewals) wait(t *testing.T, enough func([]uint64) bool) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	last, since := r.counts(t), time.Now()
	for !enough(last) {
		select {
		case <-t.Context().Done():
			t.Fatal("the test ended")
		case <-tick.C:
		}
		for i, n := range r.counts(t) {
			if n != last[i] {
				last[i], since = n, time.Now()
			}
		}
		if time.Since(since) > shortLife {
			t.Fatalf("no Envoy has got a new certificate for %s; so far %v", shortLife, last)
		}
	}
}

// waitOutageNoticed returns when the first of the agents has failed to renew.
// Not later: the others' certificates may be older.
func waitOutageNoticed(t *testing.T, agents ...*Agent) {
	t.Helper()
	err := eventually(t.Context(), "an agent to notice that the CA is away", func() error {
		for _, a := range agents {
			if a.count(t, stillServing) > 0 {
				return nil
			}
		}
		return errors.New("none has")
	})
	if err != nil {
		t.Fatal(err)
	}
}

// stillServing matches the line about a renewal that failed while the current
// certificate is good.
func stillServing(l logLine) bool {
	return strings.Contains(l.text("msg"), "serving the current one, good for")
}

// issuerAt names the intermediate of the certificate that a server shows.
func issuerAt(t *testing.T, address string) string {
	t.Helper()
	return leafAt(t, address).Issuer.String()
}

// leafAt is the certificate that a server shows.
func leafAt(t *testing.T, address string) *x509.Certificate {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	chain, err := certificatesAt(ctx, address)
	if err != nil {
		t.Fatal(err)
	}
	return chain[0]
}
