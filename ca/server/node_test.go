package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/kube/apitest"
	"github.com/meshca/meshca/ca/kube/pods"
	"github.com/meshca/meshca/identity/token/tokenissuer"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/wire"
	"github.com/meshca/meshca/wire/meshcav1"
)

// cluster is an API server in memory, what the CA knows of it, and a CA.
type cluster struct {
	*harness
	api     *apitest.API
	pods    *pods.Pods
	mu      sync.Mutex
	refused []Refusal
}

// startCluster runs a cluster with nodes and an agent on each.
func startCluster(t *testing.T, nodes int, change func(*settings)) *cluster {
	t.Helper()
	c := &cluster{api: &apitest.API{}}
	for _, ns := range []string{"shop", "bank", "meshca-agents"} {
		c.api.Put("namespaces", apitest.Named("", ns, "ns-"+ns))
		for _, sa := range []string{"cart", "meshca-agent"} {
			c.api.Put("serviceaccounts", apitest.Named(ns, sa, "sa-"+ns+"-"+sa))
		}
	}
	for i := range nodes {
		c.api.Put("nodes", apitest.Named("", nodeName(i), nodeName(i)+"-uid"))
		c.api.Put("pods", apitest.Pod("meshca-agents", "agent-"+nodeName(i), "agent-"+nodeName(i), "meshca-agent", nodeName(i)))
	}
	var err error
	c.pods, err = pods.New(pods.Config{API: c.api.Config()})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = c.pods.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	c.harness = start(t, func(s *settings) {
		s.cluster = &caller.Cluster{Liveness: c.pods, Agents: []caller.ServiceAccount{{Namespace: "meshca-agents", Name: "meshca-agent"}}}
		s.server.Pods = c.pods
		s.server.CallersReady = c.pods.Ready
		s.server.Refused = func(r Refusal) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.refused = append(c.refused, r)
		}
		if change != nil {
			change(s)
		}
	})
	return c
}

func nodeName(i int) string { return fmt.Sprintf("node-%d", i) }

// as makes a context with the token of a pod.
func (c *cluster) as(t *testing.T, namespace, account, pod, uid, node string) context.Context {
	t.Helper()
	return bearer(t, "Bearer "+c.token(t, func(k *tokenissuer.Claims) {
		*k = tokenissuer.Claims{
			Namespace: namespace, ServiceAccount: account, ServiceAccountUID: "sa-" + namespace + "-" + account, PodName: pod, PodUID: uid,
			NodeName: node, NodeUID: node + "-uid", Audience: k.Audience, Lifetime: k.Lifetime,
		}
	}))
}

func (c *cluster) agent(t *testing.T, node int) *view {
	t.Helper()
	name := nodeName(node)
	return newView(t, c.delta(t, c.as(t, "meshca-agents", "meshca-agent", "agent-"+name, "agent-"+name, name)))
}

// view is what a client has learnt on its stream. It answers each response.
type view struct {
	t        *testing.T
	stream   deltaClient
	ended    chan error
	received chan *discovery.DeltaDiscoveryResponse
	has      map[string]*meshcav1.Workload
	removed  map[string]int
	nack     string // the name to refuse
	sendMu   sync.Mutex
}

func newView(t *testing.T, stream deltaClient) *view {
	v := &view{
		t: t, stream: stream, ended: make(chan error, 1), received: make(chan *discovery.DeltaDiscoveryResponse, 4096),
		has: make(map[string]*meshcav1.Workload), removed: make(map[string]int),
	}
	go func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				v.ended <- err
				return
			}
			answer := &discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResponseNonce: resp.GetNonce()}
			if r := resp.GetResources(); len(r) == 1 && r[0].GetName() == v.nack {
				answer.ErrorDetail = &rpcstatus.Status{Message: "not this one"}
			}
			v.send(answer)
			v.received <- resp
		}
	}()
	return v
}

func (v *view) send(req *discovery.DeltaDiscoveryRequest) {
	v.sendMu.Lock()
	defer v.sendMu.Unlock()
	_ = v.stream.Send(req) // Recv says why not
}

// next takes in one response, and returns the name that it is about.
func (v *view) next() string {
	v.t.Helper()
	select {
	case resp := <-v.received:
		if n := len(resp.GetResources()) + len(resp.GetRemovedResources()); n != 1 {
			v.t.Fatalf("a response about %d resources; want one", n)
		}
		for _, r := range resp.GetResources() {
			w := &meshcav1.Workload{}
			must(v.t, r.GetResource().UnmarshalTo(w))
			v.has[r.GetName()] = w
			return r.GetName()
		}
		name := resp.GetRemovedResources()[0]
		delete(v.has, name)
		v.removed[name]++
		return name
	case err := <-v.ended:
		v.t.Fatalf("the stream ended: %v", err)
	case <-time.After(20 * time.Second):
		v.t.Fatal("no response within 20 s")
	}
	return ""
}

// ask subscribes to names and takes in the answer about each.
func (v *view) ask(names ...string) {
	v.t.Helper()
	v.send(subscribe(names...))
	for range names {
		v.next()
	}
}

// random makes a pod of a random kind, and says whether it lives.
func random(i, nodes int) (o apitest.Object, id, node string, alive bool) {
	ns := []string{"shop", "bank"}[rand.N(2)]
	account := []string{"cart", "other"}[rand.N(2)]
	node = nodeName(rand.N(nodes))
	name := fmt.Sprintf("pod-%d", i)
	o = apitest.Pod(ns, name, uidOf(i), account, node)
	id, alive = "spiffe://cluster.local/ns/"+ns+"/sa/"+account, true
	switch rand.N(8) {
	case 0:
		o, alive = o.InPhase("Failed"), false
	case 1:
		o, alive = o.InPhase("Succeeded"), false
	case 2:
		o = o.Deleting(time.Now().Add(time.Hour))
	case 3:
		o, alive = o.Deleting(time.Now().Add(-5*time.Minute)), false
	case 4:
		o["spec"].(map[string]any)["nodeName"] = ""
		alive = false
	case 5:
		o = o.InPhase("Pending")
	}
	return o, id, node, alive
}

func uidOf(i int) string { return fmt.Sprintf("eeeeeeee-0000-4000-8000-%012d", i) }

// Whatever pods there are, on whatever nodes: a node's agent that asks for all of
// them, for their IDs and for everything, is shown those that live on its node, and
// nothing else.
func TestV1_T3_V59_AnAgentSeesThePodsOfItsNode(t *testing.T) {
	const nodes, count = 3, 60
	c := startCluster(t, nodes, nil)
	var names []string
	want := make([]map[string]string, nodes) // by node, UID to ID
	for n := range want {
		want[n] = map[string]string{"agent-" + nodeName(n): "spiffe://cluster.local/ns/meshca-agents/sa/meshca-agent"}
		names = append(names, "agent-"+nodeName(n))
	}
	for i := range count {
		o, id, node, alive := random(i, nodes)
		c.api.Put("pods", o)
		names = append(names, uidOf(i))
		if n := int(node[len(node)-1] - '0'); alive {
			want[n][uidOf(i)] = id
		}
	}
	for i := range 10 { // that never were
		names = append(names, uidOf(count+i), fmt.Sprintf("spiffe://cluster.local/ns/shop/sa/%d", i))
	}
	known := func(uid string) {
		changed, stop := c.pods.Watch(uid)
		defer stop()
		if _, ok := c.pods.Pod(uid); !ok {
			<-changed
		}
	}
	known(uidOf(count - 1))
	for n := range nodes {
		v := c.agent(t, n)
		v.send(subscribe("*"))
		rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		for half := range slices.Chunk(names, len(names)/2+1) {
			v.ask(half...)
		}
		got := map[string]string{}
		for uid, w := range v.has {
			got[uid] = w.GetSpiffeId()
		}
		if !maps.Equal(got, want[n]) {
			t.Errorf("%s: shown %v; want %v", nodeName(n), got, want[n])
		}
		for name, times := range v.removed {
			if times != 1 {
				t.Errorf("%s was removed %d times", name, times)
			}
		}
	}
}

// A pod is shown when it comes to live on the node and taken away when it goes, once
// each, while nobody asks.
func TestT3_PodsComeAndGo(t *testing.T) {
	c := startCluster(t, 2, nil)
	v := c.agent(t, 0)
	v.ask(uidOf(1))
	expect := func(what string, seen bool) {
		t.Helper()
		if v.next() != uidOf(1) || (v.has[uidOf(1)] != nil) != seen {
			t.Errorf("%s: shown %v", what, v.has)
		}
	}
	c.api.Put("pods", apitest.Pod("shop", "cart-0", uidOf(1), "cart", "node-1"))
	c.api.Delete("pods", "shop", "cart-0") // elsewhere: nothing is said of it
	c.api.Put("pods", apitest.Pod("shop", "cart-0", uidOf(1), "cart", "node-0"))
	expect("it comes", true)
	c.api.Put("pods", apitest.Pod("shop", "cart-0", uidOf(1), "cart", "node-0").Deleting(time.Now().Add(time.Hour)))
	c.api.Put("pods", apitest.Pod("shop", "cart-0", uidOf(1), "cart", "node-0").InPhase("Failed"))
	expect("it fails", false)
	c.api.Delete("pods", "shop", "cart-0")
	c.api.Put("pods", apitest.Pod("shop", "cart-0", uidOf(1), "cart", "node-0"))
	expect("it comes again", true)
	v.send(&discovery.DeltaDiscoveryRequest{TypeUrl: wire.TypeURL, ResourceNamesUnsubscribe: []string{uidOf(1)}})
	v.ask(uidOf(2))
	if v.removed[uidOf(1)] != 2 || v.removed[uidOf(2)] != 1 {
		t.Errorf("removed %v", v.removed)
	}
}

// Only an agent sees more than itself, and an agent only by a token for its node.
func TestT3_WhoIsNoAgentSeesItself(t *testing.T) {
	c := startCluster(t, 1, nil)
	c.api.Put("pods", apitest.Pod("shop", "cart-0", uidOf(1), "cart", "node-0"))
	c.api.Put("pods", apitest.Pod("shop", "agent", uidOf(2), "meshca-agent", "node-0"))
	for name, ctx := range map[string]context.Context{
		"a workload":                         c.as(t, "shop", "cart", "cart-0", uidOf(1), "node-0"),
		"the agents' account, not namespace": c.as(t, "shop", "meshca-agent", "agent", uidOf(2), "node-0"),
	} {
		v := newView(t, c.delta(t, ctx))
		v.ask("agent-node-0")
		if len(v.has) != 0 {
			t.Errorf("%s is shown %v", name, v.has)
		}
	}
}

// An answer is about one workload, and a change is sent to those whom it concerns.
func TestT10_AnAgentIsSentWhatChanged(t *testing.T) {
	perPod := &podPolicies{by: make(map[string]*policies)}
	c := startCluster(t, 1, func(s *settings) { s.server.Policies = perPod })
	for i := range 250 {
		c.api.Put("pods", apitest.Pod("shop", fmt.Sprintf("cart-%d", i), uidOf(i), "cart", "node-0"))
	}
	v := c.agent(t, 0)
	v.nack = uidOf(7)
	var names []string
	for i := range 250 {
		names = append(names, uidOf(i))
	}
	v.ask(names...)
	for len(v.has) < 250 { // those that the watch had not brought yet
		v.next()
	}
	line := c.log.wait(t, "an agent refuses its resource")
	if line["spiffe_id"] != cartURI || line["error"] != "not this one" {
		t.Errorf("log line %v", line)
	}
	if got := c.metric(t, "meshca_ca_stream_acks_total", "nack"); got != 1 {
		t.Errorf("%v NACKs; want 1", got)
	}
	strict := policy.Decided(policy.Strict, policy.Source{Level: policy.LevelWorkload}, policy.Ref{}, nil)
	perPod.of(uidOf(42)).set(&policy.Resolved{Version: 1, Result: strict})
	if name := v.next(); name != uidOf(42) || v.has[name].GetPolicy().GetMode() != meshcav1.Mode_MODE_STRICT {
		t.Errorf("the policy of one changed, and %s is sent", name)
	}
	v.ask(uidOf(1)) // and nothing else before
	if len(v.received) != 0 {
		t.Errorf("%d more responses", len(v.received))
	}
}

// podPolicies has a policy, and a channel, for each pod.
type podPolicies struct {
	mu sync.Mutex
	by map[string]*policies
}

func (p *podPolicies) of(uid string) *policies {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.by[uid] == nil {
		p.by[uid] = &policies{changed: make(chan struct{})}
	}
	return p.by[uid]
}

func (p *podPolicies) Policy(s Subject) (*policy.Resolved, <-chan struct{}) {
	return p.of(s.PodUID).Policy(s)
}

// Numbers that rise by themselves do not make a policy another one. Where a change made
// them rise the channel is another, and its name is looked at anew even if nobody came to
// be told.
func TestT10_F69_NumbersAloneSayNothing(t *testing.T) {
	strict := policy.Decided(policy.Strict, policy.Source{Level: policy.LevelWorkload}, policy.Ref{}, nil)
	before := said{policy: &policy.Resolved{Version: 7, WorkloadVersion: 50, Result: strict}}
	for _, tt := range []struct {
		next *policy.Resolved
		same bool
	}{
		{&policy.Resolved{Version: 8, WorkloadVersion: 51, Result: strict}, true},
		{&policy.Resolved{Version: 8, WorkloadVersion: 50}, false},
		{&policy.Resolved{Result: strict}, false},
		{nil, false},
	} {
		if got := before.of(wire.Workload{Policy: tt.next}); got != tt.same {
			t.Errorf("%+v: %v", tt.next, got)
		}
	}
	p := newPolicyWatch(t.Context(), func(...string) {})
	defer p.close()
	first, second := make(chan struct{}), make(chan struct{})
	for i, told := range []chan struct{}{first, first, second} {
		if another := p.watch("pod", told); another != (told == second) {
			t.Errorf("channel %d is seen to be another: %v", i, another)
		}
	}
}

// More names than a node has pods end the stream.
func TestV12_AnAgentsNamesAreBounded(t *testing.T) {
	c := startCluster(t, 1, nil)
	v := c.agent(t, 0)
	for i := 0; i < wire.MaxNames+1; i += 205 {
		var names []string
		for j := range 205 {
			names = append(names, uidOf(i+j))
		}
		v.send(subscribe(names...))
	}
	select {
	case err := <-v.ended:
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it goes on")
	}
}

// The agent's stream ends with its own pod, and comes back to be refused.
func TestT3_AnAgentThatIsGone(t *testing.T) {
	c := startCluster(t, 1, nil)
	v := c.agent(t, 0)
	v.ask("agent-node-0")
	c.api.Delete("pods", "meshca-agents", "agent-node-0")
	if err := <-v.ended; !errors.Is(err, io.EOF) {
		t.Errorf("the stream ended with %v", err)
	}
	stream := c.delta(t, c.as(t, "meshca-agents", "meshca-agent", "agent-node-0", "agent-node-0", "node-0"))
	if _, err := stream.Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("it comes back: %v", err)
	}
}

// Refusals of pods are told once each, and nothing else is.
func TestRefusalsOfPodsAreTold(t *testing.T) {
	c := startCluster(t, 1, nil)
	c.api.Put("pods", apitest.Pod("shop", "cart-0", uidOf(1), "cart", "node-0").InPhase("Failed"))
	c.api.Put("pods", apitest.Pod("shop", "cart-1", uidOf(2), "cart", "node-0"))
	_, err := c.create(t, c.as(t, "shop", "cart", "cart-0", uidOf(1), "node-0"), nil)
	if status.Code(err) != codes.Unauthenticated {
		t.Errorf("a pod that failed: %v", err)
	}
	_, err = c.create(t, c.as(t, "shop", "cart", "cart-1", uidOf(2), "node-0"), nil) // no CSR
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("no CSR: %v", err)
	}
	_, _ = c.create(t, bearer(t, "Bearer x"), nil)
	line := c.log.wait(t, "it has finished")
	if line["subject"] != "system:serviceaccount:shop:cart" {
		t.Errorf("log line %v", line)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.refused) != 2 {
		t.Fatalf("told were %v", c.refused)
	}
	for i, want := range []Refusal{
		{Namespace: "shop", Pod: "cart-0", PodUID: uidOf(1), Code: codes.Unauthenticated, Reason: "it has finished"},
		{Namespace: "shop", Pod: "cart-1", PodUID: uidOf(2), Code: codes.InvalidArgument, Reason: "CSR"},
	} {
		got := c.refused[i]
		if !strings.Contains(got.Reason, want.Reason) {
			t.Errorf("reason %q; want %q in it", got.Reason, want.Reason)
		}
		if got.Reason = want.Reason; got != want {
			t.Errorf("told was %+v; want %+v", got, want)
		}
	}
}

func credentialsFor(t testing.TB, h *harness) caller.Credentials {
	return caller.Credentials{Bearer: h.token(t, nil)}
}
