package sds

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestFetchSecrets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		c := secretservice.NewSecretDiscoveryServiceClient(k.conn)
		if _, err := c.FetchSecrets(inTime(t), sotwRequest("", "default")); status.Code(err) != codes.Unavailable {
			t.Errorf("before the first SVID: %v", err)
		}
		k.ready()
		synctest.Wait()
		got, err := c.FetchSecrets(inTime(t), sotwRequest("", "default", "ROOTCA", "nope"))
		if err != nil || len(got.GetResources()) != 2 {
			t.Errorf("%d resources, %v", len(got.GetResources()), err)
		}
		got, err = c.FetchSecrets(inTime(t), sotwRequest("", payID))
		if err != nil || len(got.GetResources()) != 0 {
			t.Errorf("another's name: %d resources, %v", len(got.GetResources()), err)
		}
	})
}

// A client that half-closes, as command-line tools do, goes on listening.
func TestHalfClosedStreamIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		x := k.sotw(inTime(t))
		sendSotW(t, x, sotwRequest("", "default"))
		if err := x.CloseSend(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		s := k.ready()
		recv(t, x)
		s.SVID = k.svid()
		k.feed.Publish(s)
		recv(t, x)
	})
}

// What a client sends ends up in the log as one line that parses, cut.
func TestT14_NACKIsLoggedSafely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		x := k.sotw(inTime(t))
		sendSotW(t, x, sotwRequest("", "default"))
		recv(t, x)
		evil := "\n{\"level\":\"INFO\",\"msg\":\"forged\"}\x1b[2J\x00" + strings.Repeat("A", 5000) + "the end"
		nack := sotwRequest("1", "default")
		nack.ErrorDetail = &rpcstatus.Status{Code: 13, Message: evil}
		nack.Node = &corev3.Node{Id: evil}
		sendSotW(t, x, nack)
		synctest.Wait()
		log := k.log.String()
		for line := range strings.Lines(log) {
			var fields map[string]any
			if err := json.Unmarshal([]byte(line), &fields); err != nil {
				t.Errorf("a line does not parse: %v\n%s", err, line)
			}
			if fields["msg"] == "forged" {
				t.Error("a client wrote a line of its own")
			}
			detail, _ := fields["detail"].(string)
			if strings.ContainsAny(detail, "\n\x1b\x00") || len(detail) > 600 {
				t.Errorf("the detail is raw or long: %q", detail)
			}
		}
		if !strings.Contains(log, "forged") || strings.Contains(log, "the end") {
			t.Errorf("the log has not the beginning of the text alone:\n%s", log)
		}
	})
}

func TestDeliveriesAreLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		s := k.ready()
		x := k.sotw(inTime(t))
		sendSotW(t, x, sotwRequest("", "default", "ROOTCA"))
		recv(t, x)
		recv(t, k.fetchSVID(inTime(t)))
		synctest.Wait()
		for _, kind := range []string{"sds_sotw", "x509_svid"} {
			want := fmt.Sprintf(`"msg":"delivered","kind":%q`, kind)
			found := false
			for line := range strings.Lines(k.log.String()) {
				found = found || strings.Contains(line, want) && strings.Contains(line, s.SVID.Serial()) &&
					strings.Contains(line, cartID) && strings.Contains(line, `"bundle_sequence":1`)
			}
			if !found {
				t.Errorf("no line with %s, serial and ID:\n%s", want, k.log)
			}
		}
		if strings.Contains(k.log.String(), "PRIVATE KEY") {
			t.Error("a key is in the log")
		}
	})
}

// Labels come from closed sets: what clients ask for adds no series.
func TestT15_NamesAddNoSeries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		x := k.sotw(inTime(t))
		series := func() (n int) {
			synctest.Wait()
			families, err := k.reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range families {
				n += len(f.GetMetric())
			}
			return n
		}
		ask := func(i int) {
			names := []string{"default"}
			for j := range 500 {
				names = append(names, fmt.Sprintf("spiffe://example.org/bogus/%d/%d", i, j))
			}
			r := sotwRequest("", names...)
			r.Node = &corev3.Node{Id: fmt.Sprint("node-", i)}
			sendSotW(t, x, r)
		}
		ask(0)
		before := series()
		for i := range 100 {
			ask(i + 1)
		}
		if after := series(); after != before {
			t.Errorf("%d series became %d", before, after)
		}
	})
}

func TestConsumersSayWhatTheyHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		ctx, cancel := context.WithCancel(inTime(t))
		x := k.sotw(ctx)
		sendSotW(t, x, sotwRequest("", "ROOTCA"))
		recv(t, x)
		synctest.Wait()
		if got := k.server.Consumers(); len(got) != 1 || got[0] != (Consumer{Kind: "sds_sotw", Delivered: 1, DeliveredAt: time.Now()}) {
			t.Errorf("after the delivery: %+v", got)
		}
		sendSotW(t, x, sotwRequest("1", "ROOTCA"))
		synctest.Wait()
		if got := k.server.Consumers(); len(got) != 1 || got[0].Acknowledged != 1 {
			t.Errorf("after the ACK: %+v", got)
		}
		cancel()
		synctest.Wait()
		if got := k.server.Consumers(); len(got) != 0 || k.metric("meshca_sds_streams", "sds_sotw") != 0 {
			t.Errorf("after the end: %+v", got)
		}
	})
}

// Churn leaves nothing behind; goleak looks at the rest when the tests end.
func TestL5_ChurnLeavesNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t, func(c *Config) { c.Log = discard() })
		s := k.ready()
		for i := range 3400 { // three streams each
			time.Sleep(time.Second / callsPerSecond * 4)
			ctx, cancel := context.WithCancel(inTime(t))
			x, d := k.sotw(ctx), k.delta(ctx)
			sendSotW(t, x, sotwRequest("", "default"))
			if err := d.Send(subscribe("ROOTCA", "nope")); err != nil {
				t.Fatal(err)
			}
			recv(t, k.fetchSVID(ctx))
			if i%2 == 0 {
				recv(t, x)
				recv(t, d)
			}
			if i%10 == 0 {
				s.SVID = k.svid()
				k.feed.Publish(s)
			}
			cancel()
		}
		synctest.Wait()
		for _, kind := range []string{"sds_sotw", "sds_delta", "x509_svid"} {
			if n := k.metric("meshca_sds_streams", kind); n != 0 {
				t.Errorf("%v streams of kind %s are left", n, kind)
			}
		}
		if n := len(k.server.Consumers()); n != 0 {
			t.Errorf("%d records are left", n)
		}
	})
}
