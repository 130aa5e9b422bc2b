package sds

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// socketKit serves a real Unix socket.
type socketKit struct {
	t    *testing.T
	ca   *identitytest.CA
	path string
}

func newSocketKit(t *testing.T) *socketKit {
	dir, err := os.MkdirTemp("", "meshca") // t.TempDir may be too long for a client's socket address
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return &socketKit{
		t: t, path: filepath.Join(dir, "agent.sock"),
		ca: identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org")),
	}
}

func (k *socketKit) state(opts ...identitytest.Option) State {
	return State{SVID: k.ca.SVID(k.t, mustID(k.t, cartID), opts...), Bundle: newBundle(k.t, k.ca, 1)}
}

// run starts an agent's server in a new process's stead.
func (k *socketKit) run(feed *Feed) (stop func()) {
	k.t.Helper()
	l, err := Listen(k.path, 0)
	if err != nil {
		k.t.Fatal(err)
	}
	s := newServer(k.t, Config{Feed: feed, Log: discard(), Metrics: prometheus.NewRegistry(), Now: time.Now})
	return serve(k.t, s, l)
}

func (k *socketKit) source(ctx context.Context) *workloadapi.X509Source {
	k.t.Helper()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(
		workloadapi.WithAddr("unix://"+k.path), workloadapi.WithBackoffStrategy(noBackoff{})))
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { _ = source.Close() })
	return source
}

// noBackoff makes a client come back at once.
type noBackoff struct{}

func (noBackoff) NewBackoff() workloadapi.Backoff { return noBackoff{} }
func (noBackoff) Next() time.Duration             { return time.Millisecond }
func (noBackoff) Reset()                          {}

// holds waits until source has the SVID.
func holds(ctx context.Context, t *testing.T, source *workloadapi.X509Source, want *identity.SVID) {
	t.Helper()
	for {
		updated := source.Updated()
		got, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if got.Certificates[0].Equal(want.Leaf()) {
			return
		}
		select {
		case <-updated:
		case <-ctx.Done():
			t.Fatalf("the client still has serial %x, not %s", got.Certificates[0].SerialNumber, want.Serial())
		}
	}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// go-spiffe's own client, over a real socket, without TLS and without
// showing anything of itself.
func TestSPIFFE39_SPIFFE42_SPIFFE43_X509SourceSeesRotation(t *testing.T) {
	k, ctx := newSocketKit(t), testContext(t)
	feed := NewFeed()
	state := k.state()
	feed.Publish(state)
	k.run(feed)
	source := k.source(ctx)
	holds(ctx, t, source, state.SVID)
	bundle, err := source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("example.org"))
	if err != nil || len(bundle.X509Authorities()) != 1 || !bundle.X509Authorities()[0].Equal(k.ca.Root.Certificate) {
		t.Errorf("bundle: %v, %v", bundle, err)
	}
	for range 20 {
		state.SVID = k.ca.SVID(t, mustID(t, cartID))
		feed.Publish(state)
		holds(ctx, t, source, state.SVID)
	}
	partner := identitytest.NewCA(t, identitytest.TrustDomain(t, "partner.test"))
	state.Federated = []*identity.Bundle{newBundle(t, partner, 1)}
	state.SVID = k.ca.SVID(t, mustID(t, cartID))
	feed.Publish(state)
	holds(ctx, t, source, state.SVID)
	td := spiffeid.RequireTrustDomainFromString("partner.test")
	if _, err := source.GetX509BundleForTrustDomain(td); err != nil {
		t.Errorf("federated bundle: %v", err)
	}
	state.Federated = nil
	state.SVID = k.ca.SVID(t, mustID(t, cartID))
	feed.Publish(state)
	holds(ctx, t, source, state.SVID)
	if _, err := source.GetX509BundleForTrustDomain(td); err == nil {
		t.Error("a removed federated bundle is still trusted by the client")
	}
}

func TestF36_ClientsSurviveARestart(t *testing.T) {
	k, ctx := newSocketKit(t), testContext(t)
	feed := NewFeed()
	before := k.state()
	feed.Publish(before)
	stop := k.run(feed)
	old := k.source(ctx)
	holds(ctx, t, old, before.SVID)

	stop()
	if _, err := old.GetX509SVID(); err != nil {
		t.Errorf("while the agent is away: %v", err)
	}
	feed = NewFeed() // a new process, with a new key
	after := k.state()
	feed.Publish(after)
	k.run(feed)
	holds(ctx, t, k.source(ctx), after.SVID)
	holds(ctx, t, old, after.SVID)
}

func TestF36_EnvoyStreamIsServedAnewAfterARestart(t *testing.T) {
	k, ctx := newSocketKit(t), testContext(t)
	conn, err := grpc.NewClient("unix://"+k.path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", k.path)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sk := &kit{t: t, conn: conn}
	for range 2 {
		feed := NewFeed()
		feed.Publish(k.state())
		stop := k.run(feed)
		conn.ResetConnectBackoff()
		x := sk.delta(ctx)
		r := subscribe("default")
		r.InitialResourceVersions = map[string]string{"default": "1"} // what the process before called it
		if err := x.Send(r); err != nil {
			t.Fatal(err)
		}
		if got := recv(t, x); len(got.GetResources()) != 1 {
			t.Errorf("%d resources", len(got.GetResources()))
		}
		stop()
		if err := recvError(x); err == nil {
			t.Error("the stream outlived its server")
		}
	}
}
