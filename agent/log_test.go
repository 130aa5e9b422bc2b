package agent

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity/identitytest"
)

// stuckLog is a log that nobody reads: once stuck, each line waits for ever.
type stuckLog struct {
	slog.Handler
	only  string // the lines that stick
	stuck chan struct{}
	freed chan struct{}
}

func (l *stuckLog) Handle(ctx context.Context, r slog.Record) error {
	if strings.Contains(r.Message, l.only) {
		select {
		case l.stuck <- struct{}{}:
		default:
		}
		<-l.freed
	}
	return l.Handler.Handle(ctx, r)
}

// A log that nobody reads may hold up the goroutine that writes to it, and
// nobody else: probes, metrics, the feed and what is known of the certificate
// go on.
func TestT18_AStuckLogHoldsUpNobodyElse(t *testing.T) {
	for name, test := range map[string]struct {
		only  string
		setup func(*rig)
	}{
		"certificate obtained": {"certificate obtained", func(*rig) {}},
		"bundle taken over":    {"trust bundle taken over", func(*rig) {}},
		"a failed round": {"next try in", func(r *rig) {
			r.ca.OnSign = func(string, *signRequest) (*signResponse, error) {
				return nil, status.Error(codes.PermissionDenied, "no")
			}
		}},
		"the alarm": {"could not be renewed", func(r *rig) {
			r.ca.OnSign = func(token string, req *signRequest) (*signResponse, error) {
				if r.hasSVID() {
					return nil, status.Error(codes.ResourceExhausted, "busy")
				}
				return r.ca.Sign(req)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := &stuckLog{only: test.only, stuck: make(chan struct{}, 1), freed: make(chan struct{})}
				r := newRig(t, func(c *Config) {
					log.Handler = c.Log.Handler()
					c.Log = slog.New(log)
				})
				test.setup(r)
				r.serve()
				r.run()
				t.Cleanup(func() { close(log.freed) }) // before the agent is stopped
				select {
				case <-log.stuck:
				case <-time.After(2 * time.Hour):
					t.Fatal("the line was never written")
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					_ = r.agent.Ready()
					r.metric("meshca_agent_bundle_sequence")
					r.feed.State()
					_ = r.agent.untilRenewal(lastChance{})
					r.agent.filesChange()
				}()
				select {
				case <-done:
				case <-time.After(time.Minute):
					t.Error("probes and metrics wait for the log")
				}
			})
		})
	}
}

// hasSVID reports whether the feed has a certificate.
func (r *rig) hasSVID() bool {
	s, _ := r.feed.State()
	return s.SVID != nil
}

// The CA must not change what a sequence means: which version is right could not
// be told.
func TestF18_SameSequenceOtherContentIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		answers := make(chan error, 2)
		r.ca.OnStream = func(s *caclienttest.Stream) error {
			for _, extra := range []bool{false, true} {
				w := r.ca.Workload(4)
				if extra {
					w.Bundle.X509Authorities = append(w.Bundle.X509Authorities, identitytest.NewCA(t, r.ca.TrustDomain).Root.Certificate.Raw)
				}
				if err := s.SendWorkload("4-x", w); err != nil {
					return err
				}
				answers <- s.Answer("4-x")
			}
			return s.Drain()
		}
		r.serve()
		r.run()
		s := r.state()
		if len(s.Bundle.Authorities()) != 1 {
			t.Error("the second bundle of sequence 4 was taken")
		}
		if err := <-answers; err != nil {
			t.Errorf("the first bundle: %v", err)
		}
		err := <-answers
		if err == nil || !strings.Contains(err.Error(), "sequence 4, as the one in use, but other content") {
			t.Errorf("the second one: %v", err)
		}
		if key := keyID(s.Bundle.Authorities()[0].SubjectKeyId); err != nil && !strings.Contains(err.Error(), "not "+key+";") {
			t.Errorf("the answer does not name the key in use, %s: %v", key, err)
		}
	})
}
