package check

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// times measures how far the API server's clock is ahead of this machine's, by the
// Date of its answers. An answer that came fast says it most exactly.
type times struct {
	now func() time.Time

	mu     sync.Mutex
	known  bool
	offset time.Duration
	bound  time.Duration // the offset is right within this
}

// timed hands requests on and looks at answers.
type timed struct {
	next http.RoundTripper
	*times
}

func (t *timed) RoundTrip(req *http.Request) (*http.Response, error) {
	sent := t.now()
	resp, err := t.next.RoundTrip(req)
	if err == nil {
		t.see(resp.Header.Get("Date"), sent, t.now())
	}
	return resp, err
}

func (t *times) see(date string, sent, received time.Time) {
	said, err := http.ParseTime(date)
	if err != nil {
		return
	}
	// Date has no fractions, and was written between the two.
	took := received.Sub(sent)
	offset := said.Add(500 * time.Millisecond).Sub(sent.Add(took / 2))
	bound := took/2 + 500*time.Millisecond
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.known || bound < t.bound {
		t.known, t.offset, t.bound = true, offset, bound
	}
}

// serverTime is the API server's clock, as far as it is known.
func (r *run) serverTime() time.Time {
	offset, _, _ := r.times.best()
	return r.times.now().Add(offset)
}

func (t *times) best() (offset, bound time.Duration, known bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.offset, t.bound, t.known
}

// Limits of clocks. The CA allows tokens 30 s.
const (
	clockTolerance = 2 * time.Second
	clockLeeway    = 30 * time.Second
	// A kubelet renews its Lease each 10 s, and after 40 s its node counts as lost.
	heartbeatLost = 40 * time.Second
)

func (r *run) clock(context.Context) Result {
	offset, bound, known := r.times.best()
	if !known {
		return unknown(fmt.Errorf("the API server's answers have no date"))
	}
	if offset.Abs() > clockTolerance+bound {
		return attention("set this machine's clock (NTP); until then, times that meshca's commands print are off by as much",
			"it is %v %s the API server's", offset.Abs().Round(time.Second), side(-offset))
	}
	return holds("within %v of the API server's", (clockTolerance + bound).Round(100*time.Millisecond))
}

func side(d time.Duration) string {
	if d > 0 {
		return "ahead of"
	}
	return "behind"
}

// heartbeats judges nodes by the Leases that their kubelets renew, which carry the
// node's own time, and judges them by the API server's.
func (r *run) heartbeats(ctx context.Context) Result {
	nodes, err := r.readNodes(ctx)
	if err != nil {
		return unknown(err)
	}
	list, err := r.client.CoordinationV1().Leases(corev1.NamespaceNodeLease).List(ctx, metav1.ListOptions{})
	if err != nil {
		return unknown(fmt.Errorf("reading the Leases of nodes: %w", err))
	}
	offset, bound, known := r.times.best()
	if !known {
		return unknown(fmt.Errorf("the API server's answers have no date"))
	}
	now := r.Now().Add(offset)
	renewed := make(map[string]time.Time)
	for _, l := range list.Items {
		if l.Spec.RenewTime != nil {
			renewed[l.Name] = l.Spec.RenewTime.Time
		}
	}
	var odd []string
	worst := Holds
	for _, n := range nodes {
		if text, s := heartbeat(n.Name, renewed, now, bound); s != Holds {
			odd = append(odd, text)
			if s == Broken {
				worst = Broken
			}
		}
	}
	slices.Sort(odd)
	switch {
	case worst == Broken:
		return broken("set those nodes' clocks (NTP): with more than 30 s, tokens and certificates are refused",
			"%d of %d nodes are late or have another time", len(odd), len(nodes)).about(odd)
	case len(odd) > 0:
		return attention("see whether those nodes run, and whether their clocks are right: kubectl get nodes",
			"%d of %d nodes are late or have another time", len(odd), len(nodes)).about(odd)
	case len(nodes) == 0:
		return holds("there is no node yet")
	}
	return holds("%s", plural(len(nodes), "node"))
}

func heartbeat(node string, renewed map[string]time.Time, now time.Time, bound time.Duration) (string, Status) {
	at, ok := renewed[node]
	if !ok {
		return node + ": its kubelet has never renewed its Lease", Attention
	}
	switch age := now.Sub(at); {
	case age < -clockLeeway-bound:
		return fmt.Sprintf("%s: its clock is at least %v ahead", node, -age.Round(time.Second)), Broken
	case age < -clockTolerance-bound:
		return fmt.Sprintf("%s: its clock is at least %v ahead", node, -age.Round(time.Second)), Attention
	case age > heartbeatLost+bound:
		return fmt.Sprintf("%s: no heartbeat for %v; it is down, or its clock is behind", node, age.Round(time.Second)), Attention
	}
	return "", Holds
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
