package sds

import (
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// BenchmarkFanOut measures how long a renewal takes to reach 1000 streams on
// 10 connections, both ends counted.
func BenchmarkFanOut(b *testing.B) {
	const conns, perConn = 10, 100
	k := start(b, func(c *Config) {
		c.MaxStreams = conns * perConn
		c.Log = discard()
		var mu sync.Mutex
		var asked time.Duration // the limit on opens is not what is measured
		c.Now = func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			asked += 50 * time.Millisecond
			return time.Now().Add(asked)
		}
	})
	svids := []*identity.SVID{k.ca.SVID(b, mustID(b, cartID), identitytest.WithLifetime(24*time.Hour)), k.ca.SVID(b, mustID(b, cartID), identitytest.WithLifetime(24*time.Hour))}
	state := State{SVID: svids[0], Bundle: newBundle(b, k.ca, 1)}
	k.feed.Publish(state)
	received := make(chan error, conns*perConn)
	for range conns {
		k.conn = k.dial()
		for range perConn {
			x := k.sotw(b.Context())
			if err := x.Send(sotwRequest("", "default", "ROOTCA")); err != nil {
				b.Fatal(err)
			}
			go func() {
				for {
					if _, err := x.Recv(); err != nil {
						return
					}
					received <- nil
				}
			}()
		}
	}
	wait := func() {
		for range conns * perConn {
			<-received
		}
	}
	wait()
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		state.SVID = svids[(i+1)%2]
		k.feed.Publish(state)
		wait()
	}
	b.StopTimer()
	_ = k.conn.Close()
}

// BenchmarkRespond measures what one stream costs beyond the shared encoding.
func BenchmarkRespond(b *testing.B) {
	m := newMaterial(b)
	v1 := mustView(b, emptyView(), m.state())
	s := m.state()
	s.SVID = m.ca.SVID(b, mustID(b, cartID))
	v2 := mustView(b, v1, s)
	var x sotw
	if _, err := x.request(sotwRequest("", "default", "ROOTCA")); err != nil {
		b.Fatal(err)
	}
	x.respond(v1)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		// Going back and forth, each view holds a version that was not sent last.
		if resp, _ := x.respond([]*view{v2, v1}[i%2]); resp == nil {
			b.Fatal("nothing was sent")
		}
	}
}

// BenchmarkEncode measures the encoding of one state, once for all streams.
func BenchmarkEncode(b *testing.B) {
	m := newMaterial(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := newView(emptyView(), m.state(), time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}
