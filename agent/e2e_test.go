package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/test/bufconn"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/server"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/token/tokenissuer"
	"github.com/meshca/meshca/sds"
)

// The whole path of real parts: an authority on a state directory, its server,
// tokens of a real issuer, the agent, the feed.

const caName = "meshca.meshca-system.svc"

// serve runs the real CA server on l until stop is called or the test ends.
func serve(tb testing.TB, kit *catest.Kit, l net.Listener) (stop func()) {
	tb.Helper()
	s, err := server.New(server.Config{
		Authority: kit.Authority, Authenticator: kit.Authenticator,
		Names: ca.ServingNames{DNS: []string{caName}},
	})
	if err != nil {
		tb.Fatal(err)
	}
	return background(tb, func(ctx context.Context) error { return s.Serve(ctx, l) })
}

// background runs f until stop is called or the test ends.
func background(tb testing.TB, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f(ctx); err != nil && !errors.Is(err, context.Canceled) {
			tb.Errorf("in the background: %v", err)
		}
	})
	stop = func() { cancel(); wg.Wait() }
	tb.Cleanup(stop)
	return stop
}

// newAgent makes an agent for the CA at the end of dial.
func newAgent(tb testing.TB, kit *catest.Kit, log *slog.Logger, token caclient.TokenSource, dial func(context.Context, string, string) (net.Conn, error)) (*agent.Agent, *sds.Feed) {
	tb.Helper()
	client, err := caclient.New(caclient.Config{
		Addresses: []string{"ca:15012"}, ServerName: caName, TrustDomain: kit.TrustDomain,
		AnchorFile: kit.Anchor, Now: time.Now, Dial: dial,
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(client.Close)
	feed := sds.NewFeed()
	a, err := agent.New(agent.Config{
		CA: client, Token: token, Feed: feed, Now: time.Now, Log: log, Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		tb.Fatal(err)
	}
	return a, feed
}

func TestWholePath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kit := catest.New(t)
		l := bufconn.Listen(64 << 10)
		stop := serve(t, kit, l)
		synctest.Wait() // until then it has no certificate to serve with
		fresh := func() (string, error) { return kit.Token(t, "shop", "cart"), nil }
		var dialer dialer
		dialer.set(l)
		var log strings.Builder
		a, feed := newAgent(t, kit, slog.New(slog.NewTextHandler(&log, nil)), fresh, dialer.dial)
		stopAgent := background(t, a.Run)

		synctest.Wait()
		state, changed := feed.State()
		if state.SVID == nil || a.Ready() != nil {
			t.Fatalf("no SVID: %v", a.Ready())
		}
		if got := state.SVID.ID().String(); got != "spiffe://cluster.local/ns/shop/sa/cart" {
			t.Errorf("the identity is %s", got)
		}
		bundle, _ := kit.Authority.Bundle()
		if state.Bundle.Sequence() != bundle.Sequence() || !state.Bundle.Equal(bundle) {
			t.Errorf("the feed has bundle %d, the CA %d", state.Bundle.Sequence(), bundle.Sequence())
		}

		// Ten hours: twenty renewals and as many ends of the stream, new
		// intermediates none. There is a valid SVID at every change.
		seen := map[string]bool{state.SVID.Serial(): true}
		for len(seen) <= 20 {
			<-changed
			synctest.Wait()
			state, changed = feed.State()
			if seen[state.SVID.Serial()] {
				continue
			}
			seen[state.SVID.Serial()] = true
			for _, role := range []identity.Role{identity.Server, identity.Client} {
				if _, err := identity.Verify(state.SVID.Certificates(), role, state.Bundle, time.Now()); err != nil {
					t.Fatal(err)
				}
			}
		}
		if strings.Contains(log.String(), "level=WARN") || strings.Contains(log.String(), "level=ERROR") {
			t.Errorf("on a good day:\n%s", log.String())
		}

		// The CA restarts at another "address": the agent comes back by itself.
		stop()
		time.Sleep(10 * time.Minute)
		again := bufconn.Listen(64 << 10)
		serve(t, kit, again)
		dialer.set(again)
		time.Sleep(time.Hour)
		synctest.Wait()
		if last, _ := feed.State(); seen[last.SVID.Serial()] || a.Ready() != nil {
			t.Error("no renewal after the CA's restart")
		}
		stopAgent()
	})
}

// dialer connects to the newest listener.
type dialer struct {
	mu sync.Mutex
	l  *bufconn.Listener
}

func (d *dialer) set(l *bufconn.Listener) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.l = l
}

func (d *dialer) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	d.mu.Lock()
	l := d.l
	d.mu.Unlock()
	return l.DialContext(ctx)
}

// A token for somebody else is refused; the program that waits learns so, the
// log says why, and a good token heals it within 10 s.
func TestF35_WrongAudienceAtARealCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kit := catest.New(t)
		l := bufconn.Listen(64 << 10)
		serve(t, kit, l)
		file := filepath.Join(t.TempDir(), "token")
		write := func(token string) {
			if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		wrong, err := kit.Tokens.Issue(tokenissuer.Claims{
			Namespace: "shop", ServiceAccount: "cart", PodName: "cart-0", PodUID: "7f9c1e2a-4f0e-4c3e-9d55-0a1b2c3d4e5f",
			NodeName: "node-1", NodeUID: "1b4e28ba-2fa1-11d2-883f-0016d3cca427", Audience: []string{"vault"}, Lifetime: time.Hour,
		})
		if err != nil {
			t.Fatal(err)
		}
		write(wrong)
		var log strings.Builder
		a, feed := newAgent(t, kit, slog.New(slog.NewTextHandler(&log, nil)), caclient.TokenFile(file),
			func(ctx context.Context, _, _ string) (net.Conn, error) { return l.DialContext(ctx) })
		stop := background(t, a.Run)
		time.Sleep(time.Minute)
		synctest.Wait()
		state, _ := feed.State()
		var refused *caclient.RefusedError
		if !errors.As(state.Denied, &refused) || state.SVID != nil {
			t.Errorf("denied: %v", state.Denied)
		}
		write(kit.Token(t, "shop", "cart"))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if state, _ := feed.State(); state.SVID == nil || state.Denied != nil {
			t.Error("10 s after the token was repaired: no SVID")
		}
		stop()
		if !strings.Contains(log.String(), "vault") || strings.Contains(log.String(), wrong) {
			t.Errorf("the log holds the token, or not its audience:\n%s", log.String())
		}
	})
}

// BenchmarkTokenToFeed is the time from a token file to the first SVID in the
// feed, over TCP on loopback: connecting, TLS, signing and verifying.
func BenchmarkTokenToFeed(b *testing.B) {
	kit := catest.New(b)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	serve(b, kit, l)
	file := filepath.Join(b.TempDir(), "token")
	if err := os.WriteFile(file, []byte(kit.Token(b, "shop", "cart")), 0o600); err != nil {
		b.Fatal(err)
	}
	var took []time.Duration
	for b.Loop() {
		began := time.Now()
		a, feed := newAgent(b, kit, slog.New(slog.DiscardHandler), caclient.TokenFile(file),
			func(ctx context.Context, network, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, network, l.Addr().String())
			})
		_, changed := feed.State()
		stop := background(b, a.Run)
		<-changed
		took = append(took, time.Since(began))
		stop()
	}
	slices.Sort(took)
	for share, unit := range map[float64]string{0.5: "ms-p50", 0.99: "ms-p99", 1: "ms-max"} {
		b.ReportMetric(float64(took[int(share*float64(len(took)-1))].Microseconds())/1000, unit)
	}
}
