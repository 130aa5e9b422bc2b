package relays

import (
	"net"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/test/bench/table"
)

// The load works without a relay, too.
func TestLoad(t *testing.T) {
	ctx := t.Context()
	b, err := newBackend()
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	to := target{address: b.address()}
	if err := to.connections(ctx, 20); err != nil {
		t.Error(err)
	}
	if err := kept(ctx, to, b, 4, func(conns []net.Conn) error {
		if err := b.awaitOpen(ctx, 4); err != nil {
			return err
		}
		if n, err := pingPong(ctx, conns, 50*time.Millisecond); err != nil || n < 4 {
			t.Errorf("%d requests: %v", n, err)
		}
		if n, err := bulk(ctx, conns, 50*time.Millisecond); err != nil || n < 4*chunk || n%chunk != 0 {
			t.Errorf("%d bytes in bulk: %v", n, err)
		}
		took, err := openLoop(ctx, conns, 1000, 100*time.Millisecond)
		if err != nil || len(took) == 0 || slices.Min(took) <= 0 {
			t.Errorf("open loop: %v, %v", took, err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// What ends under the load is told, and nothing hangs.
func TestLoadWithoutBackend(t *testing.T) {
	ctx := t.Context()
	for name, load := range map[string]func([]net.Conn) error{
		"ping-pong": func(conns []net.Conn) error { _, err := pingPong(ctx, conns, time.Minute); return err },
		"bulk":      func(conns []net.Conn) error { _, err := bulk(ctx, conns, time.Minute); return err },
		"open loop": func(conns []net.Conn) error { _, err := openLoop(ctx, conns, 100, time.Minute); return err },
	} {
		b, err := newBackend()
		if err != nil {
			t.Fatal(err)
		}
		conns, err := target{address: b.address()}.open(ctx, 2)
		if err != nil {
			t.Fatal(err)
		}
		b.close()
		if err := load(conns); err == nil {
			t.Errorf("%s: no error", name)
		}
		closeAll(conns)
	}
}

func TestGoals(t *testing.T) {
	p := &table.Part{}
	for i, name := range []string{ours, bare, envoy, nginx} {
		for _, group := range []string{p99Group, p50Group, idleGroup(7), connectionGroup, requestGroup, bulkGroup, throughputGroup} {
			p.Add(group, name, "", float64(i+1))
		}
	}
	goals(p, []int{7})
	var groups []string
	for _, f := range p.Figures {
		if !slices.Contains(groups, f.Group) {
			groups = append(groups, f.Group)
		} else if groups[len(groups)-1] != f.Group {
			t.Errorf("the figures of %q are not together", f.Group)
		}
		if f.Goal == nil && f.Of == ours || !f.Met() && f.Group != throughputGroup {
			t.Errorf("%s of %s: goal %+v", f.Group, f.Of, f.Goal)
		}
	}
	if got := p.Find(requestGroup, ours).Goal; got.Limit != 2 || got.From != "the best of the others, "+bare {
		t.Errorf("the goal of requests is %+v", got)
	}
	if turn := turned([]int{1, 2, 3}, 4); !slices.Equal(turn, []int{2, 3, 1}) {
		t.Errorf("the fifth round's order is %v", turn)
	}
}
