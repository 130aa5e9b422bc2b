package agent

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/sds"
	"github.com/meshca/meshca/wire"
	"github.com/meshca/meshca/wire/meshcav1"
)

// podToken looks like a token of that pod; its signature is nobody's.
func podToken(pod, account string) string {
	claims := fmt.Sprintf(`{"exp":4102444800,"kubernetes.io":{"namespace":"shop","serviceaccount":{"name":%q},"pod":{"name":%q,"uid":%q},"node":{"name":"node-1","uid":"n"}}}`, account, pod, pod)
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(`{"alg":"none"}`)) + "." + enc([]byte(claims)) + "." + enc([]byte("canary-signature"))
}

// hostRig is a host at the CA of a rig, whose streams the test speaks itself.
type hostRig struct {
	*rig
	host    *Host
	streams chan *caclienttest.Stream
	stop    func()
}

// newHostRig runs a host whose CA gives every caller the identity in its token.
func newHostRig(t *testing.T) *hostRig {
	r := &hostRig{rig: newRig(t), streams: make(chan *caclienttest.Stream, 10)}
	r.metrics = prometheus.NewRegistry() // that one has a single agent's already
	t.Cleanup(r.client.Close)
	r.ca.OnSign = func(token string, req *signRequest) (*signResponse, error) {
		c, err := caclient.ReadClaims(token)
		if err != nil || c.ServiceAccount == "" {
			return nil, status.Error(codes.Unauthenticated, "the credentials are not accepted (ref 5f0c)")
		}
		return r.ca.SignAs(identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/"+c.ServiceAccount), req)
	}
	r.ca.OnStream = func(s *caclienttest.Stream) error {
		r.streams <- s
		<-s.Context().Done()
		return nil
	}
	r.setToken(podToken("agent", "meshca-agent"))
	var err error
	r.host, err = NewHost(HostConfig{
		CA: r.client, Token: func() (string, error) { return *r.token.Load(), nil },
		Now: r.clock.now, Metrics: r.metrics, Draw: func() float64 { return 0.5 },
		Log: slog.New(slog.NewTextHandler(&r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	r.stop = r.background(r.host.Run)
	return r
}

func (r *hostRig) background(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("in the background: %v", err)
		}
	}
	r.t.Cleanup(stop)
	return stop
}

// pod runs the agent of a pod whose token is for an account of namespace shop.
func (r *hostRig) pod(name, account string, token caclient.TokenSource) (*Agent, *sds.Feed, func()) {
	r.t.Helper()
	feed := sds.NewFeed()
	a, err := r.host.Agent(Workload{
		Name: name, ID: identitytest.ID(r.t, "spiffe://cluster.local/ns/shop/sa/"+account), Token: token, Feed: feed,
		Log: slog.New(slog.NewTextHandler(&r.log, nil)).With("pod", name),
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return a, feed, r.background(a.Run)
}

func fixed(token string) caclient.TokenSource { return func() (string, error) { return token, nil } }

// about is what a CA sends about one pod.
func (r *hostRig) about(s *caclienttest.Stream, nonce, pod, account string, sequence uint64) error {
	w := &meshcav1.Workload{
		SpiffeId: "spiffe://cluster.local/ns/shop/sa/" + account,
		Bundle:   r.ca.Workload(sequence).Bundle,
		Policy:   &meshcav1.Policy{Version: sequence, Mode: meshcav1.Mode_MODE_STRICT},
	}
	content, err := anypb.New(w)
	if err != nil {
		return err
	}
	return errors.Join(s.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: wire.TypeURL, Nonce: nonce,
		Resources: []*discovery.Resource{{Name: pod, Version: fmt.Sprint(sequence), Resource: content}}}), s.Answer(nonce))
}

// Many identities, one stream: each pod gets the certificate of its own token
// and the news that bear its name.
func TestV39_HostFeedsEachPodItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHostRig(t)
		r.serve()
		s := <-r.streams
		if got := s.First.GetResourceNamesSubscribe(); fmt.Sprint(got) != "[agent]" || s.Token != podToken("agent", "meshca-agent") {
			t.Errorf("opened with %q", got)
		}
		if r.host.Ready() == nil {
			t.Error("ready before the CA has said anything")
		}
		if err := r.about(s, "n0", "agent", "meshca-agent", 5); err != nil || r.host.Ready() != nil {
			t.Errorf("NACK %v, ready: %v", err, r.host.Ready())
		}
		cartAgent, cartFeed, stopCart := r.pod("pod-cart", "cart", fixed(podToken("pod-cart", "cart")))
		_, payFeed, _ := r.pod("pod-pay", "pay", fixed(podToken("pod-pay", "pay")))
		if err := cartAgent.First(t.Context()); err != nil {
			t.Fatal(err)
		}
		change, err := s.Recv()
		if err != nil || fmt.Sprint(change.GetResourceNamesSubscribe()) != "[pod-cart pod-pay]" {
			t.Fatalf("subscribed to %q, %v", change.GetResourceNamesSubscribe(), err)
		}
		if err := r.about(s, "n1", "pod-cart", "cart", 6); err != nil {
			t.Errorf("NACK: %v", err)
		}
		// A resource about somebody else, under this pod's name.
		if err := r.about(s, "n2", "pod-pay", "cart", 7); err == nil || !strings.Contains(err.Error(), "it is about spiffe://cluster.local/ns/shop/sa/cart") {
			t.Errorf("the CA was told %v", err)
		}
		synctest.Wait()
		cart, _ := cartFeed.State()
		pay, _ := payFeed.State()
		if cart.SVID.ID().Path() != "/ns/shop/sa/cart" || cart.Bundle.Sequence() != 6 || cart.Policy.Version != 6 {
			t.Errorf("cart has %v", cart)
		}
		if pay.SVID.ID().Path() != "/ns/shop/sa/pay" || pay.Bundle.Sequence() != 0 || pay.Policy != nil {
			t.Errorf("pay has %v", pay)
		}
		if n := r.metric("meshca_agent_workloads", "state", "serving"); n != 2 {
			t.Errorf("%v workloads are served", n)
		}
		// A pod that the CA has not seen yet, and then has: nothing is lost by it.
		if err := s.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: wire.TypeURL, Nonce: "n3", RemovedResources: []string{"pod-cart", "pod-pay"}}); err != nil {
			t.Fatal(err)
		}
		if err := s.Answer("n3"); err != nil {
			t.Error(err)
		}
		if err := r.about(s, "n4", "pod-pay", "pay", 7); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		pay, _ = payFeed.State()
		cart, _ = cartFeed.State()
		if pay.Bundle.Sequence() != 7 || cart.Bundle.Sequence() != 6 || cart.SVID == nil {
			t.Errorf("cart has %v, pay has %v", cart, pay)
		}
		if len(r.log.lines("does not know this workload yet")) != 1 || len(r.log.lines("no longer has this workload")) != 1 {
			t.Errorf("the log:\n%s", r.log.String())
		}
		stopCart()
		if change, err = s.Recv(); err != nil || fmt.Sprint(change.GetResourceNamesUnsubscribe()) != "[pod-cart]" {
			t.Errorf("unsubscribed from %q, %v", change.GetResourceNamesUnsubscribe(), err)
		}
	})
}

// The CA calls a pod by another name than the kubelet does: not taken, and told.
func TestV39_CertificateOfAnotherAccountIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHostRig(t)
		r.serve()
		a, feed, _ := r.pod("pod-cart", "cart", fixed(podToken("pod-cart", "admin")))
		var denied *DeniedError
		if err := a.First(t.Context()); !errors.As(err, &denied) || !strings.Contains(err.Error(), "it is about spiffe://cluster.local/ns/shop/sa/admin, but this agent is spiffe://cluster.local/ns/shop/sa/cart") {
			t.Errorf("got %v", err)
		}
		if s, _ := feed.State(); s.SVID != nil {
			t.Errorf("it has %v", s.SVID.ID())
		}
		if n := r.metric("meshca_agent_workloads", "state", "refused"); n != 1 {
			t.Errorf("%v workloads are refused", n)
		}
	})
}

// A pod whose token proves nothing is refused, the others are not; a good token
// heals it at once.
func TestF35_RefusedPodHealsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHostRig(t)
		r.serve()
		token := "no.token.at-all"
		a, _, _ := r.pod("pod-cart", "cart", func() (string, error) { return token, nil })
		b, _, _ := r.pod("pod-pay", "pay", fixed(podToken("pod-pay", "pay")))
		var refused *caclient.RefusedError
		if err := a.First(t.Context()); !errors.As(err, &refused) || refused.Code != codes.Unauthenticated {
			t.Errorf("got %v", err)
		}
		if err := b.First(t.Context()); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		token = podToken("pod-cart", "cart")
		a.Refresh()
		before := time.Now()
		synctest.Wait()
		if err := a.First(t.Context()); err != nil || time.Since(before) != 0 {
			t.Errorf("after %v: %v", time.Since(before), err)
		}
	})
}

// The stream ends with the host's token, and goes on where it was; a token that
// names no pod opens none, and says so.
func TestHostStreamResumesAndNeedsAPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHostRig(t)
		ends := make(chan struct{})
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			r.streams <- s
			<-ends
			return nil
		}
		r.pod("pod-cart", "cart", fixed(podToken("pod-cart", "cart")))
		r.serve()
		s := <-r.streams
		if err := errors.Join(r.about(s, "n1", "agent", "meshca-agent", 5), r.about(s, "n2", "pod-cart", "cart", 5)); err != nil {
			t.Error(err)
		}
		ends <- struct{}{}
		s = <-r.streams
		if v := s.First.GetInitialResourceVersions(); len(v) != 2 || v["pod-cart"] != "5" {
			t.Errorf("it resumes from %v", v)
		}
		r.setToken("no.token.at-all")
		ends <- struct{}{}
		time.Sleep(time.Minute)
		if len(r.streams) != 0 || len(r.log.lines("this agent's own token")) == 0 {
			t.Errorf("the log:\n%s", r.log.String())
		}
		r.setToken(podToken("agent-2", "meshca-agent"))
		time.Sleep(tick)
		synctest.Wait()
		s = <-r.streams
		if got := s.First.GetResourceNamesSubscribe(); fmt.Sprint(got) != "[agent-2 pod-cart]" {
			t.Errorf("subscribed to %q", got)
		}
		close(ends)
		r.stop()
		if strings.Contains(r.log.String(), base64.RawURLEncoding.EncodeToString([]byte("canary-signature"))) {
			t.Error("the log holds a token")
		}
	})
}

// 250 workloads make no more series than one.
func TestT15_HostMetricsDoNotGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHostRig(t)
		r.serve()
		series := func() (n int) {
			families, err := r.metrics.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range families {
				n += len(f.GetMetric())
			}
			return n
		}
		before := series()
		for i := range 50 {
			name := fmt.Sprintf("pod-%d", i)
			r.pod(name, "cart", fixed(podToken(name, "cart")))
		}
		synctest.Wait()
		if n := series(); n != before {
			t.Errorf("%d series, before %d", n, before)
		}
		if n := r.metric("meshca_agent_renewals_total", "result", "ok"); n != 50 {
			t.Errorf("%v renewals", n)
		}
	})
}
