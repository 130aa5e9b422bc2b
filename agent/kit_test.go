package agent

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/sds"
)

const (
	serverName = "meshca.meshca-system.svc"
	cart       = "spiffe://cluster.local/ns/shop/sa/cart"
	canary     = "eyJhbGciOiJub25lIn0.Y2FuYXJ5.c2VjcmV0"
)

// clock is the wall clock of an agent: the bubble's, set wrong by an offset.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time      { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) set(d time.Duration) { c.offset.Store(int64(d)) }

// rig is an agent with CAs at "a:1" and, where there is a second, "b:1", in a
// bubble's memory.
type rig struct {
	t       *testing.T
	ca      *caclienttest.CA
	net     *caclienttest.Network
	client  *caclient.Client
	feed    *sds.Feed
	agent   *Agent
	clock   clock
	log     logBuffer
	metrics *prometheus.Registry
	anchor  string

	token atomic.Pointer[string]
	stop  func() // of the CA at a:1
}

// newRig makes everything but runs nothing. The draw is always the middle.
func newRig(t *testing.T, change ...func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, net: caclienttest.NewNetwork(t), feed: sds.NewFeed(), metrics: prometheus.NewRegistry()}
	r.ca = caclienttest.New(t, identitytest.ID(t, cart), identitytest.WithClock(r.clock.now))
	r.setToken(canary)
	r.anchor = r.ca.AnchorFile()
	var err error
	r.client, err = caclient.New(caclient.Config{
		Addresses: []string{"a:1", "b:1"}, ServerName: serverName, TrustDomain: r.ca.TrustDomain,
		AnchorFile: r.anchor, Now: r.clock.now, Dial: r.net.Dial,
	})
	if err != nil {
		t.Fatal(err)
	}
	conf := Config{
		CA: r.client, Feed: r.feed, Now: r.clock.now, Metrics: r.metrics,
		Token: func() (string, error) { return *r.token.Load(), nil },
		Log:   slog.New(slog.NewTextHandler(&r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Draw:  func() float64 { return 0.5 },
	}
	for _, f := range change {
		f(&conf)
	}
	if r.agent, err = New(conf); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) setToken(s string) { r.token.Store(&s) }

// serve starts the CA at a:1.
func (r *rig) serve() { r.stop = r.ca.Serve(r.net.Listen("a:1"), r.ca.TLS(serverName)) }

// cutOff makes all CAs swallow everything.
func (r *rig) cutOff() {
	r.stop()
	r.net.Swallow("a:1")
	r.net.Swallow("b:1")
}

// run runs the agent until the test ends.
func (r *rig) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.agent.Run(ctx) }()
	r.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("Run: %v", err)
		}
		r.client.Close()
	})
}

// svid returns what is served now, once everybody has done what there is to do.
func (r *rig) svid() *identity.SVID {
	synctest.Wait()
	s, _ := r.feed.State()
	return s.SVID
}

func (r *rig) state() sds.State {
	synctest.Wait()
	s, _ := r.feed.State()
	return s
}

// metric returns the value of one series of a gauge or counter; labels as
// name, value.
func (r *rig) metric(name string, labels ...string) float64 {
	r.t.Helper()
	families, err := r.metrics.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	series:
		for _, m := range f.GetMetric() {
			for i := 0; i < len(labels); i += 2 {
				found := false
				for _, l := range m.GetLabel() {
					found = found || l.GetName() == labels[i] && l.GetValue() == labels[i+1]
				}
				if !found {
					continue series
				}
			}
			return m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	r.t.Fatalf("no metric %s %q", name, labels)
	return 0
}

// logBuffer keeps the log.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// lines returns the lines that contain a text.
func (l *logBuffer) lines(text string) []string {
	var out []string
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, text) {
			out = append(out, line)
		}
	}
	return out
}

func containsToken(s string) bool {
	for part := range strings.SplitSeq(canary, ".") {
		if strings.Contains(s, part) {
			return true
		}
	}
	return false
}
