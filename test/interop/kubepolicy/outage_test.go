package kubepolicy

import (
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/policy"
)

// link is the way from one replica to the API server, which can be cut.
type link struct {
	listener net.Listener
	to       string

	mu    sync.Mutex
	isCut bool
	open  map[net.Conn]struct{}
	all   sync.WaitGroup

	lists atomic.Int64 // of policies, that were asked for over it
}

func newLink(t *testing.T, w *world) *link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	l := &link{listener: listener, to: strings.TrimPrefix(w.URL(), "https://"), open: make(map[net.Conn]struct{})}
	l.all.Go(l.accept)
	t.Cleanup(func() {
		listener.Close()
		l.cut()
		l.all.Wait()
	})
	return l
}

// config is for a client that goes over the link.
func (l *link) config(w *world) *rest.Config {
	conf := w.asAdmin()
	conf.Host = "https://" + l.listener.Addr().String()
	conf.WrapTransport = func(next http.RoundTripper) http.RoundTripper {
		return roundTrip(func(r *http.Request) (*http.Response, error) {
			if strings.HasSuffix(r.URL.Path, "/peerauthentications") && r.URL.Query().Get("watch") == "" {
				l.lists.Add(1)
			}
			return next.RoundTrip(r)
		})
	}
	return conf
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func (l *link) accept() {
	for {
		from, err := l.listener.Accept()
		if err != nil {
			return
		}
		to, err := net.Dial("tcp", l.to)
		if err != nil || !l.keep(from, to) {
			from.Close()
			if err == nil {
				to.Close()
			}
			continue
		}
		for _, pair := range [][2]net.Conn{{from, to}, {to, from}} {
			l.all.Go(func() {
				io.Copy(pair[0], pair[1])
				pair[0].Close()
				pair[1].Close()
			})
		}
	}
}

func (l *link) keep(conns ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range conns {
		l.open[c] = struct{}{}
	}
	return !l.isCut
}

func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.isCut = true
	for c := range l.open {
		c.Close()
	}
	clear(l.open)
}

func (l *link) mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.isCut = false
}

func (w *world) restartAPIServer(t *testing.T) {
	t.Helper()
	must(t, w.APIServer().Kill())
	must(t, w.RestartAPIServer(t.Context()))
}

// While the API server is away what was in force stays; what happens afterwards is
// found without hands. A replica that starts meanwhile knows nothing.
func TestT10_F21_APIServerIsKilledAndComesBack(t *testing.T) {
	w := newWorld(t, "killed")
	w.define(t)
	w.apply(t, "default", `{"mtls": {"mode": "STRICT"}}`)
	r := w.replica(t, w.asAdmin())
	before := r.awaits(w.id(t), "", "STRICT", says(policy.Strict, policy.LevelNamespace))
	must(t, w.APIServer().Kill())
	fresh := w.replica(t, w.asAdmin())
	fresh.awaits(w.id(t), "", "not known", says(policy.Strict, policy.LevelClosed))
	r.logsSoon("the API server does not tell of policies")
	if p, _ := r.Policy(w.id(t), ""); p.Mode != policy.Strict || p.Version < before.Version {
		t.Errorf("while it is away: %s", show(p))
	}
	must(t, w.RestartAPIServer(t.Context()))
	fresh.awaits(w.id(t), "", "STRICT", says(policy.Strict, policy.LevelNamespace))
	w.served(t)
	w.delete(t, "default")
	for _, r := range []*replica{r, fresh} {
		p := r.awaits(w.id(t), "", "without policy", says(policy.Permissive, policy.LevelDefault))
		if p.Version <= before.Version {
			t.Errorf("%s after version %d", show(p), before.Version)
		}
	}
	r.logsSoon("the API server tells of policies again")
}

// A replica that was cut off for longer than the API server remembers lists anew, and
// misses neither what was deleted nor what was made meanwhile.
func TestT10_F25_WatchThatIsTooOldListsAnew(t *testing.T) {
	w := newWorld(t, "gone")
	w.define(t)
	w.apply(t, "default", `{"mtls": {"mode": "DISABLE"}}`)
	w.apply(t, "cart", `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}}`)
	l := newLink(t, w)
	r := w.replica(t, l.config(w))
	cart := w.pod(t, "cart", map[string]string{"app": "cart"})
	r.awaits(w.id(t), cart, "DISABLE", says(policy.Disable, policy.LevelWorkload))
	l.cut()
	w.delete(t, "cart")
	w.apply(t, "default", `{"mtls": {"mode": "STRICT"}}`)
	w.restartAPIServer(t) // begins its memory anew
	w.served(t)
	before := l.lists.Load()
	l.mend()
	r.awaits(w.id(t), cart, "STRICT", says(policy.Strict, policy.LevelNamespace))
	if l.lists.Load() == before {
		t.Error("the watch went on; the API server was to refuse it")
	}
}

// An agent goes back and forth between two replicas of which one is cut off, while
// policies and labels change: it never takes what is older, and has what holds once
// both have caught up.
func TestT10_F69_TwoReplicas(t *testing.T) {
	w := newWorld(t, "two")
	w.define(t)
	cart := w.pod(t, "cart", map[string]string{"app": "cart"})
	l := newLink(t, w)
	near, far := w.replica(t, w.asAdmin()), w.replica(t, l.config(w))
	id := w.id(t)
	for _, r := range []*replica{near, far} {
		r.awaits(id, cart, "known", func(p *policy.Resolved) bool { return p != nil && p.WorkloadVersion > 0 })
	}
	var held *policy.Resolved
	refused := 0
	ask := func(r *replica) {
		t.Helper()
		p, _ := r.Policy(id, cart)
		newer, err := p.Succeeds(held)
		if err != nil {
			refused++
		}
		if newer {
			held = p
		}
	}
	steps := []struct {
		change func()
		is     func(*policy.Resolved) bool
	}{
		{func() { w.apply(t, "default", `{"mtls": {"mode": "STRICT"}}`) }, says(policy.Strict, policy.LevelNamespace)},
		{func() {
			w.apply(t, "pay", `{"selector": {"matchLabels": {"app": "pay"}}, "mtls": {"mode": "DISABLE"}}`)
		}, says(policy.Strict, policy.LevelNamespace)},
		{func() { w.label(t, "cart", map[string]string{"app": "pay"}) }, says(policy.Disable, policy.LevelWorkload)},
		{func() { w.delete(t, "pay") }, says(policy.Strict, policy.LevelNamespace)},
		{func() { w.label(t, "cart", map[string]string{"app": "cart"}) }, says(policy.Strict, policy.LevelNamespace)},
	}
	for i, step := range steps {
		if i == 1 {
			l.cut()
		}
		step.change()
		near.awaits(id, cart, "what was written", step.is)
		for range 3 {
			ask(near)
			ask(far)
			if !step.is(held) {
				t.Fatalf("step %d: the agent has %s", i, show(held))
			}
		}
	}
	if refused == 0 {
		t.Error("the replica that is behind was not refused once")
	}
	l.mend()
	now, _ := near.Policy(id, cart)
	caught := far.awaits(id, cart, "as far as the other", func(p *policy.Resolved) bool {
		return p.Version >= now.Version && p.WorkloadVersion >= now.WorkloadVersion
	})
	if !caught.Equal(now.Result) {
		t.Errorf("%s, and the other one %s", show(caught), show(now))
	}
	began := time.Now()
	w.apply(t, "default", `{"mtls": {"mode": "PERMISSIVE"}}`)
	for _, r := range []*replica{far, near} {
		r.awaits(id, cart, "PERMISSIVE", says(policy.Permissive, policy.LevelNamespace))
		ask(r)
		if held.Mode != policy.Permissive {
			t.Errorf("the agent has %s", show(held))
		}
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("after %v", took)
	}
}
