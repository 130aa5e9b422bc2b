package sds

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func TestT17_BigMessagesAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		x := k.sotw(inTime(t))
		sendSotW(t, x, sotwRequest("", strings.Repeat("x", maxMessageBytes)))
		if err := recvError(x); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("64 KiB and more: %v", err)
		}
		var many []string
		for i := range 10_000 {
			many = append(many, fmt.Sprint(i))
		}
		x = k.sotw(inTime(t))
		sendSotW(t, x, sotwRequest("", many...))
		if err := recvError(x); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("10000 names: %v", err)
		}
	})
}

func TestT17_HeadersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		synctest.Wait()
		c := secretservice.NewSecretDiscoveryServiceClient(k.conn)
		for size, ok := range map[int]bool{8 << 10: true, maxHeaderBytes: false} {
			ctx := metadata.AppendToOutgoingContext(inTime(t), "x-padding", strings.Repeat("x", size))
			if _, err := c.FetchSecrets(ctx, sotwRequest("", "default")); (err == nil) != ok {
				t.Errorf("%d bytes of headers: %v", size, err)
			}
		}
	})
}

func TestT17_StreamsOfAConnectionAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t, func(c *Config) { c.MaxStreams = 1000 })
		k.ready()
		for range maxStreamsPerConn {
			recv(t, k.fetchSVID(inTime(t)))
		}
		ctx, cancel := context.WithTimeout(inTime(t), time.Second)
		defer cancel()
		if _, err := k.workload().FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{}); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("one stream more than the limit: %v", err)
		}
		k.conn = k.dial()
		recv(t, k.fetchSVID(inTime(t)))
	})
}

func TestStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t, func(c *Config) { c.MaxStreams = 3 })
		k.ready()
		var cancels []context.CancelFunc
		for range 3 {
			ctx, cancel := context.WithCancel(inTime(t))
			cancels = append(cancels, cancel)
			recv(t, k.fetchSVID(ctx))
		}
		if err := recvError(k.fetchSVID(inTime(t))); status.Code(err) != codes.Unavailable {
			t.Errorf("one more than the limit: %v", err)
		}
		cancels[0]()
		synctest.Wait()
		recv(t, k.fetchSVID(inTime(t))) // the place is free again
		cancels[1]()
		cancels[2]()
		if k.metric("meshca_sds_refused_total", "streams") != 1 {
			t.Error("the refusal was not counted")
		}
	})
}

func TestOpensAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		c := secretservice.NewSecretDiscoveryServiceClient(k.conn)
		call := func() codes.Code {
			_, err := c.FetchSecrets(inTime(t), sotwRequest("", payID))
			return status.Code(err)
		}
		k.ready()
		synctest.Wait()
		got := make(map[codes.Code]int)
		for range callsBurst + 10 {
			got[call()]++
		}
		if got[codes.OK] != callsBurst || got[codes.Unavailable] != 10 {
			t.Errorf("in one instant: %v", got)
		}
		time.Sleep(time.Second)
		clear(got)
		for range callsPerSecond + 10 {
			got[call()]++
		}
		if got[codes.OK] != callsPerSecond {
			t.Errorf("a second later: %v", got)
		}
	})
}

func TestConnectionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		for range defaultMaxConnections {
			c, err := k.dialer(inTime(t), "")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
		synctest.Wait()
		c, err := k.dialer(inTime(t), "")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("one connection more than the limit was served")
		}
		// Those that say nothing lose their place.
		time.Sleep(connectTimeout + time.Second)
		recv(t, k.fetchSVID(inTime(t)))
	})
}
