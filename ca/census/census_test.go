package census

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/identity/identitytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func at(seconds int) time.Time { return noon.Add(time.Duration(seconds) * time.Second) }

func one(t *testing.T, c *Census, name string) Workload {
	t.Helper()
	var found Workload
	c.Each(func(w Workload) bool {
		if w.Name == name {
			found = w
		}
		return true
	})
	return found
}

// What a stream brings and what becomes of it, in the order of a pod's life.
func TestTheLifeOfAWorkload(t *testing.T) {
	c, id := New(), identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/cart")
	c.Refused("u", at(0), strings.Repeat("x", 1000))
	if w := one(t, c, "u"); len(w.Refused.Reason) > mostText+3 || !w.Refused.At.Equal(at(0)) {
		t.Errorf("after a refusal: %+v", w)
	}
	c.Issued("u", id, "node-0", at(1), at(3601))
	if w := one(t, c, "u"); w.Refused != (Remark{}) || !w.Ends.Equal(at(3601)) || w.Node != "node-0" || w.ID != id {
		t.Errorf("after a certificate: %+v", w)
	}
	first, second := Version{"1-a", 1, 10}, Version{"2-b", 2, 11}
	s := c.Shown("u", id, "node-0", at(2))
	s.Sent(first, false, at(2))
	s.Nacked("too old", at(3))
	s.Sent(second, false, at(4))
	if w := one(t, c, "u"); w.Sent != second || w.Acked != (Version{}) || !w.SentAt.Equal(at(2)) || w.Nacked.Reason != "too old" || w.Streams != 1 || !w.Since.Equal(at(2)) {
		t.Errorf("behind since the first that was not taken: %+v", w)
	}
	s.Acked("1-a") // of what is not current
	if w := one(t, c, "u"); w.Acked != (Version{}) {
		t.Errorf("an old ACK counts: %+v", w)
	}
	s.Acked("2-b")
	if w := one(t, c, "u"); w.Acked != second || w.Nacked != (Remark{}) || !w.SentAt.IsZero() {
		t.Errorf("after the ACK: %+v", w)
	}
	// It comes back before its old stream has ended.
	again := c.Shown("u", id, "node-0", at(7))
	again.Sent(second, true, at(7))
	s.Leave(at(8))
	s.Leave(at(8))
	s.Nacked("late", at(9))
	if w := one(t, c, "u"); w.Streams != 1 || w.Nacked != (Remark{}) || w.Acked != second || !w.Since.Equal(at(2)) {
		t.Errorf("on two streams, one of which ended: %+v", w)
	}
	again.Leave(at(10))
	if w := one(t, c, "u"); w.Streams != 0 || !w.Since.Equal(at(10)) {
		t.Errorf("without a stream: %+v", w)
	}
	c.Each(func(Workload) bool { return false })
	if w := one(t, c, "u"); w.Name != "" {
		t.Errorf("it is gone and remembered: %+v", w)
	}
}

// Who is shown is never forgotten; others make room.
func TestT17_MemoryIsBounded(t *testing.T) {
	c := New()
	id := identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/cart")
	for i := range Most + 1000 {
		c.Issued(fmt.Sprint("issued", i), id, "", at(0), at(i))
	}
	count := func() (n int) {
		c.Each(func(Workload) bool { n++; return true })
		return n
	}
	if n := count(); n > Most {
		t.Errorf("%d workloads are held", n)
	}
	var seats []*Seat
	for i := range Most + 1000 {
		seats = append(seats, c.Shown(fmt.Sprint("shown", i), id, "", at(1)))
	}
	if n, left := count(), c.Left(); n > Most || left < 1000 {
		t.Errorf("%d are held, %d left out", n, left)
	}
	for _, s := range seats { // whoever was left out must not take away from others
		s.Leave(at(2))
	}
	c.Each(func(w Workload) bool {
		if w.Streams != 0 {
			t.Errorf("%+v", w)
		}
		return false
	})
	if n := count(); n != 0 {
		t.Errorf("%d are remembered", n)
	}
}

func TestConcurrently(t *testing.T) {
	c, id := New(), identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/cart")
	var all sync.WaitGroup
	for g := range 4 {
		all.Go(func() {
			for i := range 2000 {
				name := fmt.Sprint(i % 50)
				s := c.Shown(name, id, "", at(i))
				s.Sent(Version{Resource: fmt.Sprint(g)}, false, at(i))
				c.Issued(name, id, "", at(i), at(i))
				s.Acked(fmt.Sprint(g))
				s.Leave(at(i))
				if i%100 == 0 {
					c.Each(func(Workload) bool { return false })
				}
			}
		})
	}
	all.Wait()
	c.Each(func(w Workload) bool {
		if w.Streams != 0 {
			t.Errorf("%+v", w)
		}
		return true
	})
}

func BenchmarkIssued(b *testing.B) {
	c, id := New(), identitytest.ID(b, "spiffe://cluster.local/ns/shop/sa/cart")
	names := make([]string, 10_000)
	for i := range names {
		names[i] = fmt.Sprintf("eeeeeeee-0000-4000-8000-%012d", i)
		c.Issued(names[i], id, "", at(0), at(1))
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		c.Issued(names[i%len(names)], id, "node", at(1), at(2))
	}
}

func BenchmarkEach(b *testing.B) {
	c, id := New(), identitytest.ID(b, "spiffe://cluster.local/ns/shop/sa/cart")
	for i := range 10_000 {
		c.Issued(fmt.Sprint(i), id, "", at(0), at(1))
	}
	b.ReportAllocs()
	for b.Loop() {
		c.Each(func(Workload) bool { return true })
	}
}
