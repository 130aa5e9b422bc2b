package agent

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// The API server is away, and with it whoever makes tokens: no pod gets a new one.
// Wherever a pod was between two tokens and two certificates, by the last one that
// it has it gets a certificate that outlives an hour of that.
func TestF34_CertificatesOutliveTheTokens(t *testing.T) {
	const lifetime, refresh = time.Hour, 48 * time.Minute // of a token; the kubelet's 80 %
	for phase := time.Duration(0); phase < refresh; phase += 3 * time.Minute {
		t.Run(phase.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				draws := rand.New(rand.NewPCG(uint64(phase), 1))
				r := newRig(t, func(c *Config) { c.Draw = draws.Float64 })
				r.serve()
				var end time.Time
				renew := func() {
					end = time.Now().Add(lifetime)
					claims := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp":%d}`, end.Unix()))
					r.setToken("eyJhbGciOiJub25lIn0." + claims + ".c2ln")
				}
				renew()
				r.run()
				for range 3 {
					time.Sleep(refresh)
					renew()
				}
				time.Sleep(phase)
				away := time.Now()
				time.Sleep(time.Until(end))
				r.cutOff() // no CA takes the token any more
				time.Sleep(time.Minute)
				if lasts := r.svid().NotAfter().Sub(away); lasts < time.Hour {
					t.Errorf("the certificate lasts %v of an outage", lasts)
				}
				if n := r.metric("meshca_agent_renewals_total", "result", "ok"); n > 12 {
					t.Errorf("%v certificates", n)
				}
			})
		})
	}
}

// A CA with too much to do says when to come back, and is not asked before; nor much
// later, whatever it says.
func TestT17_ABusyCAIsAskedWhenItSaid(t *testing.T) {
	for asked, most := range map[time.Duration]time.Duration{3 * time.Second: 3300 * time.Millisecond, 24 * time.Hour: longestRetry} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			began := time.Now()
			var tries []time.Duration
			r.ca.OnSign = func(_ string, req *signRequest) (*signResponse, error) {
				if tries = append(tries, time.Since(began)); len(tries) > 1 {
					return r.ca.Sign(req)
				}
				s, err := status.New(codes.ResourceExhausted, "too many requests").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(asked)})
				if err != nil {
					t.Error(err)
				}
				return nil, s.Err()
			}
			r.serve()
			r.run()
			time.Sleep(2 * time.Minute)
			if !r.hasSVID() || len(tries) != 2 || tries[1]-tries[0] < min(asked, most) || tries[1]-tries[0] > most {
				t.Errorf("told to come back in %v, it asked at %v", asked, tries)
			}
		})
	}
}

// What a CA wishes never costs the certificate in use.
func TestT17_AskedDelayLeavesRoom(t *testing.T) {
	for _, test := range []struct {
		asked, left time.Duration
		draw        float64
		want        time.Duration
	}{
		{10 * time.Second, 0, 0, 10 * time.Second},
		{10 * time.Second, 0, 0.5, 10500 * time.Millisecond},
		{10 * time.Second, 20 * time.Second, 0, 5 * time.Second},
		{10 * time.Second, time.Second, 0, time.Second},
		{time.Hour, time.Hour, 0, time.Minute},
		{time.Nanosecond, 0, 0, 50 * time.Millisecond},
	} {
		if got := askedDelay(test.asked, test.left, test.draw); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
	}
}
