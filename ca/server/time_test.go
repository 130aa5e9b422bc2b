package server

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// Inside a bubble time stands still until everybody waits; nothing here takes
// longer than the work that is done.

// withToken has no deadline of its own.
func withToken(t *testing.T, raw string) context.Context {
	return metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+raw)
}

// A stream outlives neither its token nor 33 minutes, and ends with status OK.
func TestStreamEndsWithItsProof(t *testing.T) {
	for name, tt := range map[string]struct{ token, least, most time.Duration }{
		"with the token":  {10 * time.Minute, 10*time.Minute - time.Second, 10 * time.Minute},
		"at its own age":  {time.Hour, 27 * time.Minute, 33 * time.Minute},
		"age at its most": {33 * time.Minute, 27 * time.Minute, 33 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := start(t, func(s *settings) { s.bubble = true })
				raw := h.token(t, func(c *tokenissuer.Claims) { c.Lifetime = tt.token })
				began := time.Now()
				stream := h.delta(t, withToken(t, raw))
				exchange(t, stream, subscribe())
				_, err := stream.Recv()
				if !errors.Is(err, io.EOF) {
					t.Fatalf("the stream ended with %v; want status OK", err)
				}
				if took := time.Since(began); took < tt.least || took > tt.most {
					t.Errorf("the stream ended after %v; want %v to %v", took, tt.least, tt.most)
				}
			})
		})
	}
}

// A machine that slept wakes up with its timers where they were. The end is
// seen by the wall clock within 30 s.
func TestF42_StreamEndsByTheWallClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slept atomic.Int64
		h := start(t, func(s *settings) {
			s.bubble = true
			s.server.Now = func() time.Time { return time.Now().Add(time.Duration(slept.Load())) }
		})
		stream := h.delta(t, withToken(t, h.token(t, nil)))
		exchange(t, stream, subscribe())
		slept.Store(int64(2 * time.Hour))
		began := time.Now()
		_, err := stream.Recv()
		if !errors.Is(err, io.EOF) {
			t.Fatalf("the stream ended with %v; want status OK", err)
		}
		if took := time.Since(began); took > 30*time.Second {
			t.Errorf("the end was seen after %v", took)
		}
	})
}

// growing raises the sequence with each intermediate, as an upstream does that
// changes its roots.
type growing struct {
	ca.Upstream
	mu       sync.Mutex
	sequence uint64
}

func (g *growing) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	signed, err := g.Upstream.SignIntermediate(ctx, req)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sequence++
	signed.Sequence = g.sequence
	return signed, nil
}

func shortLives(s *settings) {
	s.bubble = true
	s.authority.Leaf = ca.LeafConfig{Lifetime: 10 * time.Minute, Ceiling: 10 * time.Minute}
	s.authority.IntermediateLifetime = 40 * time.Minute
	s.upstream = func(u ca.Upstream) ca.Upstream { return &growing{Upstream: u} }
}

func TestDeltaPushesChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, shortLives)
		stream := h.delta(t, withToken(t, h.token(t, nil)))
		first := exchange(t, stream, subscribe())
		if s := workload(t, first).GetBundle().GetSequence(); s != 1 {
			t.Fatalf("sequence %d; want 1", s)
		}
		resp, err := stream.Recv() // when the authority has a new intermediate, after 20 minutes
		must(t, err)
		if s := workload(t, resp).GetBundle().GetSequence(); s != 2 || resp.GetResources()[0].GetVersion() == first.GetResources()[0].GetVersion() {
			t.Errorf("response %v", resp)
		}
	})
}

// The serving certificate is replaced, with its key, at half of its life and
// when the authority signs with another intermediate.
func TestServingCertificateIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, shortLives)
		first := h.server.serving.current.Load()
		<-time.After(4 * time.Minute)
		if h.server.serving.current.Load() != first {
			t.Error("renewed before half of its life")
		}
		<-time.After(90 * time.Second)
		second := h.server.serving.current.Load()
		if second == first || second.tls.PrivateKey == first.tls.PrivateKey {
			t.Error("not renewed at half of its life, or with the same key")
		}
		for range 50 { // through the change of the intermediate at 20 minutes
			<-time.After(31 * time.Second)
			if got, want := h.server.serving.current.Load().authority, h.authority.Status().Authority; got != want {
				// The one tick that it may take to be seen.
				<-time.After(tick)
				if got := h.server.serving.current.Load().authority; got != h.authority.Status().Authority {
					t.Fatalf("served under authority %s; it signs with %s", got, want)
				}
			}
			must(t, h.server.Ready())
		}
		if h.server.serving.current.Load().authority == first.authority {
			t.Error("the authority has not changed; the test shows nothing")
		}
	})
}

// When no new one can be had, the old one serves to its end and not beyond.
func TestT18_ServingCertificateEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ahead atomic.Int64
		h := start(t, func(s *settings) {
			shortLives(s)
			s.server.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
		})
		c := h.server.serving.current.Load()
		ahead.Store(int64(time.Until(c.ends)) - int64(time.Second))
		if _, err := h.server.serving.certificate(); err != nil {
			t.Errorf("a second before its end: %v", err)
		}
		ahead.Store(int64(time.Until(c.ends)))
		if _, err := h.server.serving.certificate(); err == nil {
			t.Error("a certificate was served that has ended")
		}
		if err := h.server.Ready(); err == nil {
			t.Error("ready without a certificate to serve with")
		}
	})
}

// A stream may make ten requests a second, and fifty at once; then it ends.
func TestT17_RequestsOfAStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, func(s *settings) { s.bubble = true })
		stream := h.delta(t, withToken(t, h.token(t, nil)))
		for range requestsBurst {
			exchange(t, stream, subscribe(podUID))
		}
		for range 20 {
			<-time.After(time.Second / requestsPerSecond)
			exchange(t, stream, subscribe(podUID))
		}
		must(t, stream.Send(subscribe(podUID)))
		_, err := stream.Recv()
		if status.Code(err) != codes.ResourceExhausted {
			t.Fatalf("%v; want ResourceExhausted", err)
		}
		h.log.wait(t, referenceOf(t, err), "10 requests a second")
	})
}
