package census

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshca/meshca/identity"
)

// Most is how many workloads a census holds.
const Most = 50_000

const (
	shards   = 16
	perShard = Most / shards
	mostText = 256
	lookedAt = 256 // of a full shard, for somebody to forget
)

// Workload is what is known of one. The zero time means never.
type Workload struct {
	Name string      // the pod's UID, or the SPIFFE ID where there is no pod
	ID   identity.ID // zero until a certificate was issued or a stream showed it
	Node string

	Streams int       // that show it now
	Since   time.Time // when the first of these began, or the last one ended

	Issued, Ends time.Time // of the last certificate from here

	Sent, Acked Version
	SentAt      time.Time // when Sent was sent; zero if the client had it already
	Nacked      Remark    // its last refusal of a resource; none after an ACK
	Refused     Remark    // the last refusal of a call of its
}

// Version is what a resource said.
type Version struct {
	Resource       string // its xDS version; empty for none
	Bundle, Policy uint64 // sequence, and version; 0 where there is none
}

// Remark is something that was said once.
type Remark struct {
	At     time.Time
	Reason string
}

// Census holds workloads. It is safe for concurrent use. Use [New].
type Census struct {
	seed maphash.Seed
	by   [shards]shard
	left atomic.Int64
}

type shard struct {
	mu  sync.Mutex
	all map[string]*Workload
}

// New makes an empty census.
func New() *Census {
	c := &Census{seed: maphash.MakeSeed()}
	for i := range c.by {
		c.by[i].all = make(map[string]*Workload)
	}
	return c
}

// with calls do with the workload of a name, under its lock; not if there is no room.
func (c *Census) with(name string, do func(*Workload)) {
	s := &c.by[maphash.String(c.seed, name)%shards]
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.all[name]
	if w == nil {
		if len(s.all) >= perShard && !s.makeRoomLocked() {
			c.left.Add(1)
			return
		}
		w = &Workload{Name: name}
		s.all[name] = w
	}
	do(w)
}

// makeRoomLocked forgets somebody without a stream: of a few, which are others each
// time, the one whose certificate ends first.
func (s *shard) makeRoomLocked() bool {
	var oldest *Workload
	looked := 0
	for _, w := range s.all {
		if looked++; looked > lookedAt {
			break
		}
		if w.Streams == 0 && (oldest == nil || w.Ends.Before(oldest.Ends)) {
			oldest = w
		}
	}
	if oldest == nil {
		return false
	}
	delete(s.all, oldest.Name)
	return true
}

// Issued notes a certificate.
func (c *Census) Issued(name string, id identity.ID, node string, now, ends time.Time) {
	c.with(name, func(w *Workload) {
		w.ID, w.Node, w.Issued, w.Ends = id, node, now, ends
		w.Refused = Remark{}
	})
}

// Holds reports whether a certificate from here that has not ended is known.
func (c *Census) Holds(name string, now time.Time) bool {
	s := &c.by[maphash.String(c.seed, name)%shards]
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.all[name]
	return w != nil && now.Before(w.Ends)
}

// Refused notes that a call was refused for good.
func (c *Census) Refused(name string, now time.Time, reason string) {
	c.with(name, func(w *Workload) { w.Refused = Remark{now, cut(reason)} })
}

// Shown notes that a stream begins to show a workload, until the seat is left.
func (c *Census) Shown(name string, id identity.ID, node string, now time.Time) *Seat {
	c.with(name, func(w *Workload) {
		w.ID, w.Node = id, node
		if w.Streams++; w.Streams == 1 {
			w.Since = now
		}
	})
	return &Seat{c: c, name: name}
}

// Seat is a workload on one stream. One goroutine uses it.
type Seat struct {
	c    *Census
	name string
	sent Version
	left bool
}

// Sent notes what has been sent. Held says that nothing was, since the client has it
// from its last stream.
func (s *Seat) Sent(v Version, held bool, now time.Time) {
	if s.left || s.sent == v {
		return
	}
	s.sent = v
	s.update(func(w *Workload) {
		switch {
		case held:
			w.Sent, w.Acked, w.SentAt, w.Nacked = v, v, time.Time{}, Remark{}
		case w.Sent == w.Acked || w.SentAt.IsZero():
			w.Sent, w.SentAt = v, now
		default: // it owes an answer since the first that it did not give
			w.Sent = v
		}
	})
}

// Acked notes that the client has taken the resource of that version.
func (s *Seat) Acked(resource string) {
	if s.left || resource != s.sent.Resource {
		return
	}
	s.update(func(w *Workload) { w.Acked, w.Nacked, w.SentAt = s.sent, Remark{}, time.Time{} })
}

// Nacked notes that the client has refused its resource.
func (s *Seat) Nacked(reason string, now time.Time) {
	if s.left {
		return
	}
	s.update(func(w *Workload) { w.Nacked = Remark{now, cut(reason)} })
}

// Leave notes that the stream shows the workload no more. It may be called twice.
func (s *Seat) Leave(now time.Time) {
	if s == nil || s.left {
		return
	}
	s.left = true
	s.update(func(w *Workload) {
		if w.Streams--; w.Streams == 0 {
			w.Since = now
		}
	})
}

// update is with for somebody who may have been left out.
func (s *Seat) update(do func(*Workload)) {
	sh := &s.c.by[maphash.String(s.c.seed, s.name)%shards]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if w := sh.all[s.name]; w != nil && w.Streams > 0 {
		do(w)
	}
}

// Each calls do with a copy of each workload, and forgets those for which it returns
// false, unless a stream shows them. Do must not call the census.
func (c *Census) Each(do func(Workload) (keep bool)) {
	for i := range c.by {
		s := &c.by[i]
		s.mu.Lock()
		all := make([]Workload, 0, len(s.all))
		for _, w := range s.all {
			all = append(all, *w)
		}
		s.mu.Unlock()
		var gone []string
		for _, w := range all {
			if !do(w) && w.Streams == 0 {
				gone = append(gone, w.Name)
			}
		}
		s.mu.Lock()
		for _, name := range gone {
			if w := s.all[name]; w != nil && w.Streams == 0 {
				delete(s.all, name)
			}
		}
		s.mu.Unlock()
	}
}

// Left returns how often a workload was not taken in, for want of room.
func (c *Census) Left() int64 { return c.left.Load() }

func cut(s string) string {
	if len(s) <= mostText {
		return s
	}
	return s[:mostText] + "…"
}
