package sds

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// unaryMethods are calls that gRPC hands over when the request is whole.
func unaryMethods() []string {
	return []string{
		secretservice.SecretDiscoveryService_FetchSecrets_FullMethodName,
		healthpb.Health_Check_FullMethodName,
		workload.SpiffeWorkloadAPI_ValidateJWTSVID_FullMethodName,
	}
}

// halfSent opens a call and never says what it wants.
func halfSent(ctx context.Context, t *testing.T, conn *grpc.ClientConn, method string) grpc.ClientStream {
	t.Helper()
	s, err := conn.NewStream(withHeader(ctx), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (k *kit) openCalls() int {
	k.server.admission.open.mu.Lock()
	defer k.server.admission.open.mu.Unlock()
	return k.server.admission.open.held
}

// Calls that are never finished count from their headers on, whatever their
// kind, are refused when they are too many, and end.
func TestT17_HalfSentCallsCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most, each = 9, 10
		k := start(t, func(c *Config) { c.MaxStreams = most })
		k.ready()
		results := make(chan codes.Code, 1000)
		calls := 0
		for range 4 {
			conn := k.dial()
			for _, method := range unaryMethods() {
				for range each {
					s := halfSent(inTime(t), t, conn, method)
					calls++
					go func() { results <- status.Code(s.RecvMsg(&discovery.DiscoveryResponse{})) }()
				}
			}
		}
		synctest.Wait()
		if n := k.openCalls(); n != most {
			t.Errorf("%d of %d half-sent calls are counted; at most %d may be in", n, calls, most)
		}
		if len(results) != calls-most {
			t.Fatalf("%d calls were refused at once, want %d", len(results), calls-most)
		}
		for range calls - most {
			if code := <-results; code != codes.Unavailable {
				t.Fatalf("a call too many: %v", code)
			}
		}
		time.Sleep(requestTimeout)
		synctest.Wait()
		if n := k.openCalls(); n != 0 || len(results) != most {
			t.Errorf("after %v: %d calls are in, %d have ended", requestTimeout, n, len(results))
		}
		for range len(results) {
			if code := <-results; code != codes.DeadlineExceeded {
				t.Errorf("a half-sent call: %v", code)
			}
		}
		if k.metric("meshca_sds_refused_total", "slow") != most {
			t.Error("not counted")
		}
	})
}

// A stream, too, must say what it wants; one that has said it may stay for ever.
func TestT17_SilentStreamsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		silent := k.sotw(inTime(t))
		half := halfSent(inTime(t), t, k.conn, workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName)
		said := k.sotw(inTime(t))
		sendSotW(t, said, sotwRequest("", nameSVID))
		recv(t, said)
		for name, err := range map[string]error{"SDS": recvError(silent), "Workload API": half.RecvMsg(&workload.X509SVIDResponse{})} {
			if status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("%s without a request: %v", name, err)
			}
		}
		time.Sleep(time.Hour)
		k.ready()
		recv(t, said)
	})
}

// flood sends one request as fast as it is taken.
func flood[Req any](x interface{ Send(*Req) error }, r *Req) {
	for x.Send(r) == nil {
	}
}

// A client that asks for the same thing again and again, or rejects without end,
// is slowed down; neither the log nor anybody else feels it.
func TestT17_RequestsOfAStreamAreBounded(t *testing.T) {
	const seconds = 3
	const most = requestsBurst + seconds*requestsPerSecond + 2
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		ctx, cancel := context.WithCancel(inTime(t))
		x := k.delta(ctx)
		got := 0
		go func() {
			for ; recvError(x) == nil; got++ {
			}
		}()
		go flood(x, subscribe(nameSVID))
		time.Sleep(seconds * time.Second)
		synctest.Wait()
		if lines := strings.Count(k.log.String(), "\n"); got > most || lines > most+1 {
			t.Errorf("%d responses and %d log lines in %d s; at most %d", got, lines, seconds, most)
		}
		if n := strings.Count(k.log.String(), "slowed down"); n != 1 || k.metric("meshca_sds_slowed_streams_total") != 1 {
			t.Errorf("said %d times", n)
		}
		recv(t, k.fetchSVID(inTime(t)))
		cancel()
		synctest.Wait()
		if n := k.openCalls(); n != 1 {
			t.Errorf("%d calls are in after the stream has gone", n)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		x := k.sotw(inTime(t))
		sendSotW(t, x, sotwRequest("", nameSVID))
		nack := nackOf(recv(t, x))
		go flood(x, nack)
		time.Sleep(seconds * time.Second)
		synctest.Wait()
		if n := k.metric("meshca_sds_responses_total", "sds_sotw", "stale"); n > most {
			t.Errorf("%v rejections were looked at", n)
		}
		k.ready() // who is slowed down still gets what is new
		recv(t, x)
	})
}

func nackOf(r *discovery.DiscoveryResponse) *discovery.DiscoveryRequest {
	nack := sotwRequest(r.GetNonce(), nameSVID)
	nack.ErrorDetail = status.New(codes.InvalidArgument, "no").Proto()
	return nack
}

// A panic costs the call that it happens in, and is told with its stack; a log
// and an agent go on.
func TestV62_APanicCostsItsCallAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		open := k.fetchSVID(inTime(t))
		recv(t, open)
		synctest.Wait()
		good := k.server.current.Load()
		bad := *good
		bad.names, bad.resources = []string{nameSVID}, map[string]*resource{nameSVID: nil}
		k.server.current.Store(&bad)
		x := k.delta(inTime(t))
		if err := x.Send(subscribe(nameSVID)); err != nil {
			t.Fatal(err)
		}
		_, fetched := secretservice.NewSecretDiscoveryServiceClient(k.conn).FetchSecrets(inTime(t), sotwRequest("", nameSVID))
		for name, err := range map[string]error{"stream": recvError(x), "unary": fetched} {
			if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "nil") {
				t.Errorf("%s: %v", name, err)
			}
		}
		if n := strings.Count(k.log.String(), "sds/exchange.go"); n == 0 || strings.Count(k.log.String(), "ended in a panic") != 2 {
			t.Errorf("the log has not each stack once:\n%s", k.log.String())
		}
		k.server.current.Store(good)
		synctest.Wait()
		if n := k.openCalls(); n != 1 {
			t.Errorf("%d calls are in", n)
		}
		k.ready()
		recv(t, open)
	})
}

// stuckLog is a log that nobody reads.
type stuckLog struct {
	slog.Handler
	only  string // the lines that stick
	freed chan struct{}
}

func (l stuckLog) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, l.only) {
		<-l.freed
	}
	return nil
}

func (l stuckLog) Enabled(context.Context, slog.Level) bool { return true }

// What cannot be logged is served all the same.
func TestT18_AStuckLogHoldsUpNoCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := stuckLog{slog.DiscardHandler, "not handed out", make(chan struct{})}
		k := start(t, func(c *Config) { c.Log = slog.New(log) })
		defer close(log.freed)
		waiting := k.sotw(inTime(t))
		sendSotW(t, waiting, sotwRequest("", nameSVID))
		synctest.Wait()
		k.feed.Publish(State{SVID: k.svid(), Bundle: emptyBundle(t, k.ca)})
		recv(t, waiting)
	})
}
