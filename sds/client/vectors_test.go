package client

import (
	"bytes"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/meshca/meshca/identity/identitytest"
)

// scripted is an agent that sends what a test gives it.
type scripted struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	messages chan *workload.X509SVIDResponse
}

func (s scripted) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	for {
		select {
		case m := <-s.messages:
			if err := stream.Send(m); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

// runScripted runs a source against a scripted agent, which sends what send is
// given. The source's log tells of each message that it has refused.
func runScripted(t *testing.T, refusals refusals) (_ *Source, send func(*workload.X509SVIDResponse)) {
	t.Helper()
	path := newAgent(t).path
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	script := scripted{messages: make(chan *workload.X509SVIDResponse)}
	server := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(server, script)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return runLogging(t, path, slog.New(slog.NewTextHandler(refusals, nil))), func(m *workload.X509SVIDResponse) {
		t.Helper()
		select {
		case script.messages <- m:
		case <-time.After(20 * time.Second):
			t.Fatal("nobody asks the agent")
		}
	}
}

// refusals takes a log, and tells of each message that it says cannot be used.
type refusals chan struct{}

func (r refusals) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("cannot be used")) {
		r <- struct{}{}
	}
	return len(p), nil
}

// What cannot be used takes nothing away: neither an empty message nor one
// without a bundle, nor the end of the stream. The next good one counts.
func TestV21_F17_BadMessagesTakeNothingAway(t *testing.T) {
	refused := make(refusals, 1)
	s, send := runScripted(t, refused)
	good := message(t)
	send(good)
	first, _, err := parse(good)
	if err != nil {
		t.Fatal(err)
	}
	holds(t, s, first.svid)
	for name, spoil := range map[string]func(*workload.X509SVIDResponse){
		"empty":           func(r *workload.X509SVIDResponse) { proto.Reset(r) },
		"no bundle":       func(r *workload.X509SVIDResponse) { r.Svids[0].Bundle = nil },
		"corrupt bundle":  func(r *workload.X509SVIDResponse) { r.Svids[0].Bundle[10] ^= 0xff },
		"no key":          func(r *workload.X509SVIDResponse) { r.Svids[0].X509SvidKey = nil },
		"an empty SVID":   func(r *workload.X509SVIDResponse) { r.Svids[0] = &workload.X509SVID{} },
		"a foreign first": func(r *workload.X509SVIDResponse) { r.Svids = slices.Insert(r.Svids, 0, &workload.X509SVID{Hint: "x"}) },
	} {
		bad := proto.CloneOf(good)
		spoil(bad)
		send(bad)
		select {
		case <-refused:
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: it was not refused", name)
		}
		if got, err := s.SVID(); err != nil || got.Serial() != first.svid.Serial() {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		if b, err := s.Bundle(first.svid.ID().TrustDomain()); err != nil || len(b.Authorities()) != 1 {
			t.Errorf("%s: %v, %v", name, b, err)
		}
	}
	next := message(t)
	send(next)
	second, _, err := parse(next)
	if err != nil {
		t.Fatal(err)
	}
	holds(t, s, second.svid)
}

// Of SVIDs with one hint, and of all where no hint is asked for, the first
// counts (SPIFFE_Workload_API §5.2.1), and what follows it spoils nothing.
func TestSPIFFE54_SPIFFE55_TheFirstSVIDCounts(t *testing.T) {
	r := message(t)
	first := r.GetSvids()[0]
	first.Hint = "internal"
	ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))
	other := ca.SVID(t, identitytest.ID(t, "spiffe://example.org/ns/shop/sa/admin"))
	key, err := other.MarshalKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, second := range map[string]*workload.X509SVID{
		"another with the same hint": {SpiffeId: other.ID().String(), X509Svid: other.MarshalChain(), X509SvidKey: key, Bundle: ca.Bundle().MarshalDER(), Hint: "internal"},
		"nonsense":                   {SpiffeId: "x", X509Svid: []byte("x"), Hint: "internal"},
		"a hint without end":         {Hint: strings.Repeat("x", 1<<20)},
	} {
		r.Svids = []*workload.X509SVID{first, second}
		m, _, err := parse(r)
		if err != nil || m.svid.ID().String() != cartID {
			t.Errorf("%s: %v, %v", name, m, err)
			continue
		}
		if b := m.bundles[m.svid.ID().TrustDomain()]; len(b.Authorities()) != 1 || b.Authorities()[0].Equal(ca.Root.Certificate) {
			t.Errorf("%s: the bundle is not the first SVID's", name)
		}
	}
}

// The message as it stands on the wire.
func FuzzMessage(f *testing.F) {
	good := message(f)
	two := proto.CloneOf(good)
	two.Svids = append(two.Svids, two.GetSvids()[0])
	bare := proto.CloneOf(good)
	bare.Svids[0].Bundle = nil
	for _, m := range []*workload.X509SVIDResponse{good, two, bare, {}} {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
		f.Add(raw[:len(raw)/2])
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var r workload.X509SVIDResponse
		if proto.Unmarshal(raw, &r) != nil {
			return
		}
		m, skipped, err := parse(&r)
		if (m == nil) == (err == nil) {
			t.Fatal("neither or both")
		}
		for _, e := range append(skipped, err) {
			if e != nil && (len(e.Error()) > 4<<10 || strings.ContainsAny(e.Error(), "\n\x00\x1b")) {
				t.Errorf("a text of %d bytes: %.300q", len(e.Error()), e)
			}
		}
		if m == nil {
			return
		}
		for td, b := range m.bundles {
			if b.TrustDomain() != td {
				t.Errorf("the bundle of %s is held for %s", b.TrustDomain(), td)
			}
		}
		if own := m.bundles[m.svid.ID().TrustDomain()]; own == nil || len(own.Authorities()) == 0 {
			t.Error("an identity without anybody to believe")
		}
	})
}
