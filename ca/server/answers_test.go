package server

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// later lets time pass for the answers that are kept.
func (h *harness) later(d time.Duration) {
	a := h.server.answers
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.now
	a.now = func() time.Time { return before().Add(d) }
}

// A request that comes again, while the first is at work or soon after, is answered
// with the same certificate; another's, or one that differs, is not.
func TestL1_ARepeatedRequestIsSignedOnce(t *testing.T) {
	h := start(t, nil)
	client := istio.NewIstioCertificateServiceClient(h.dial(t, nil))
	csr := newCSR(t, catest.NewKey(t), nil)
	ask := func(ctx context.Context, csr string, seconds int64) string {
		t.Helper()
		resp, err := client.CreateCertificate(ctx, &istio.IstioCertificateRequest{Csr: csr, ValidityDuration: seconds})
		must(t, err)
		return leafOf(t, resp).SerialNumber.String()
	}
	open := h.gate.close()
	defer open()
	serials := make(chan string, 4)
	var wg sync.WaitGroup
	for i := range 4 {
		ctx := h.good(t)
		wg.Go(func() { serials <- ask(ctx, csr, 0) })
		if i == 0 {
			<-h.gate.in // it is at the signer, and the others come meanwhile
		}
	}
	a := h.server.answers
	for waiting := 0; waiting < 4; runtime.Gosched() {
		a.mu.Lock()
		for _, e := range a.all {
			waiting = e.wanted
		}
		a.mu.Unlock()
	}
	open()
	wg.Wait()
	one := <-serials
	for range 3 {
		if s := <-serials; s != one {
			t.Errorf("serial number %s beside %s", s, one)
		}
	}
	if s := ask(h.good(t), csr, 0); s != one {
		t.Error("the answer was not kept")
	}
	if n := h.metric(t, "meshca_ca_requests_repeated_total", ""); n != 4 {
		t.Errorf("%v repeated requests were counted, want 4", n)
	}
	for name, s := range map[string]string{
		"another lifetime": ask(h.good(t), csr, 1200),
		"another key":      ask(h.good(t), newCSR(t, catest.NewKey(t), nil), 0),
		"another pod":      ask(bearer(t, "Bearer "+h.token(t, func(c *tokenissuer.Claims) { c.PodName, c.PodUID = "cart-1", nodeUID })), csr, 0),
	} {
		if s == one {
			t.Errorf("%s is answered with the same certificate", name)
		}
	}
	h.later(answerKept)
	if s := ask(h.good(t), csr, 0); s == one {
		t.Error("the answer is kept for ever")
	}
}

// The signer's context ends when nobody waits any more, and not before.
func TestL1_WhoGivesUpTakesNothingFromOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAnswers()
		var ended atomic.Bool
		hold := make(chan struct{})
		create := func(ctx context.Context) (*istio.IstioCertificateResponse, error) {
			select {
			case <-hold:
				return &istio.IstioCertificateResponse{}, nil
			case <-ctx.Done():
				ended.Store(true)
				return nil, ctx.Err()
			}
		}
		for _, others := range []int{1, 0} {
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() {
				_, _, err := a.get(ctx, request{byte(others)}, nil, time.Hour, create)
				if others == 0 && !errors.Is(err, context.Canceled) {
					t.Errorf("alone: %v", err)
				}
			})
			synctest.Wait()
			for range others {
				wg.Go(func() {
					if resp, again, err := a.get(t.Context(), request{byte(others)}, nil, time.Hour, create); resp == nil || !again || err != nil {
						t.Errorf("the other: %v, %t, %v", resp, again, err)
					}
				})
			}
			synctest.Wait()
			cancel()
			synctest.Wait()
			if ended.Load() != (others == 0) {
				t.Errorf("with %d others the signer's context ended: %t", others, ended.Load())
			}
			if others > 0 {
				close(hold)
				hold = make(chan struct{})
			}
			wg.Wait()
		}
		if len(a.all) != 1 || a.done.Len() != 1 {
			t.Errorf("%d answers are known and %d kept, want the good one", len(a.all), a.done.Len())
		}
	})
}

// What is kept is bounded, failures are not kept, and another bundle is another answer.
func TestL1_AnswersAreBounded(t *testing.T) {
	a := newAnswers()
	made := 0
	signed := func(context.Context) (*istio.IstioCertificateResponse, error) {
		made++
		return &istio.IstioCertificateResponse{}, nil
	}
	get := func(r int, b *identity.Bundle, make create) {
		_, _, _ = a.get(t.Context(), request{byte(r), byte(r >> 8), byte(r >> 16)}, b, time.Hour, make)
	}
	for r := range 2 * mostAnswers {
		get(r, nil, signed)
	}
	if len(a.all) > mostAnswers || a.done.Len() > mostAnswers {
		t.Errorf("%d answers are kept, at most %d may be", len(a.all), mostAnswers)
	}
	made = 0
	newest := 2*mostAnswers - 1
	get(newest, nil, signed)
	get(newest, &identity.Bundle{}, signed)
	if made != 1 {
		t.Errorf("%d were made anew, want the one with another bundle", made)
	}
	for range 2 {
		get(newest+1, nil, func(context.Context) (*istio.IstioCertificateResponse, error) { made++; return nil, errors.New("no") })
	}
	if made != 3 {
		t.Errorf("a failure is kept")
	}
}

// On the wire: too many, and when to come back, and nothing else.
func TestT17_BusyOnTheWire(t *testing.T) {
	h := start(t, nil)
	h.server.queue.mu.Lock()
	h.server.queue.running, h.server.queue.interval = h.server.queue.workers, time.Hour
	h.server.queue.mu.Unlock()
	_, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)})
	s := status.Convert(err)
	if s.Code() != codes.ResourceExhausted || len(s.Details()) != 1 {
		t.Fatalf("%v with details %v", err, s.Details())
	}
	if info, ok := s.Details()[0].(*errdetails.RetryInfo); !ok || info.GetRetryDelay().AsDuration() <= 0 {
		t.Errorf("detail %v", s.Details()[0])
	}
	h.log.wait(t, referenceOf(t, err), "0 calls wait already")
}

// A busy CA is no refusal of the pod, whose owner could do nothing about it; too many
// calls of its own are.
func TestT17_BusyIsNoRefusal(t *testing.T) {
	told := make(chan Refusal, 8)
	h := start(t, func(s *settings) {
		s.server.MaxCalls = 1
		s.server.Refused = func(r Refusal) { told <- r }
	})
	ask := func(want string) {
		t.Helper()
		_, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)})
		if status.Code(err) != codes.ResourceExhausted {
			t.Fatalf("%v; want ResourceExhausted", err)
		}
		h.log.wait(t, referenceOf(t, err), want)
		if hint := len(status.Convert(err).Details()) == 1; hint != (len(told) == 0) {
			t.Errorf("%s: told when to come back: %t; the pod was told of %d refusals", want, hint, len(told))
		}
	}
	leave, err := h.server.calls.enter("another pod")
	must(t, err)
	ask("1 calls are being worked on already, the most there may be")
	leave()
	h.server.queue.mu.Lock()
	h.server.queue.running, h.server.queue.interval = h.server.queue.workers, time.Hour
	h.server.queue.mu.Unlock()
	ask("0 calls wait already")
	if len(told) != 0 {
		t.Fatalf("the pod was told of %v", <-told)
	}
	h.server.calls.mu.Lock()
	h.server.calls.total, h.server.calls.open[podUID] = 100, maxCallsPerCaller
	h.server.calls.mu.Unlock()
	ask("the most one may have")
	if r := <-told; r.PodUID != podUID {
		t.Errorf("told of %+v", r)
	}
}
