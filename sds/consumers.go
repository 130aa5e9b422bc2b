package sds

import (
	"sync"
	"time"
)

// Consumer says what one open stream has been given, for whoever must know
// that a new bundle has arrived everywhere before it is used.
type Consumer struct {
	// Kind is sds_sotw, sds_delta, x509_svid, x509_bundles or workload.
	Kind string
	// Delivered is the sequence of the own domain's bundle that was sent last,
	// and DeliveredAt when; zero if none was.
	Delivered   uint64
	DeliveredAt time.Time
	// Acknowledged is the sequence that the client said it accepted. It stays
	// zero for the Workload API, whose clients cannot say.
	Acknowledged uint64
}

// consumers are the open streams.
type consumers struct {
	mu   sync.Mutex
	open map[*stream]struct{}
}

// stream is the record of one open stream.
type stream struct {
	kind consumer

	mu       sync.Mutex
	consumer Consumer
}

// Consumers returns a record for each open stream, in no order.
func (s *Server) Consumers() []Consumer {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	list := make([]Consumer, 0, len(s.consumers.open))
	for c := range s.consumers.open {
		c.mu.Lock()
		list = append(list, c.consumer)
		c.mu.Unlock()
	}
	return list
}

func (s *Server) open(kind consumer) *stream {
	c := &stream{kind: kind, consumer: Consumer{Kind: string(kind)}}
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	if s.consumers.open == nil {
		s.consumers.open = make(map[*stream]struct{})
	}
	s.consumers.open[c] = struct{}{}
	s.metrics.streams.WithLabelValues(string(kind)).Inc()
	return c
}

func (s *Server) close(c *stream) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	delete(s.consumers.open, c)
	s.metrics.streams.WithLabelValues(string(c.kind)).Dec()
}

func (c *stream) sent(d delivery, now time.Time) {
	if d.sequence == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.consumer.Delivered, c.consumer.DeliveredAt = d.sequence, now
}

func (c *stream) acknowledged(sequence uint64) {
	if sequence == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.consumer.Acknowledged = sequence
}
