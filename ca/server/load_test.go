package server

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity/token"
)

// A signer that hangs stops signing and nothing else: health answers, and what
// is too much is refused at once instead of piling up.
func TestF16_T18_T17_SignerBlocked(t *testing.T) {
	h := start(t, func(s *settings) { s.server.MaxCalls = 1 })
	conn := h.dial(t, nil)
	client := istio.NewIstioCertificateServiceClient(conn)
	csr := newCSR(t, catest.NewKey(t), nil)
	open := h.gate.close()
	defer open()
	first := make(chan error, 1)
	ctx := h.good(t)
	go func() {
		_, err := client.CreateCertificate(ctx, &istio.IstioCertificateRequest{Csr: csr})
		first <- err
	}()
	<-h.gate.in // the call is at the signer now

	_, err := client.CreateCertificate(h.good(t), &istio.IstioCertificateRequest{Csr: csr})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%v; want ResourceExhausted", err)
	} else {
		h.log.wait(t, referenceOf(t, err), "1 calls are being worked on")
	}
	if _, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Errorf("health: %v", err)
	}
	_ = h.server.Ready() // returns, whatever it says
	open()
	if err := <-first; err != nil {
		t.Errorf("the call that waited: %v", err)
	}
	if _, err := client.CreateCertificate(h.good(t), &istio.IstioCertificateRequest{Csr: csr}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// trap is a source of keys that fails in the way it is told to.
type trap struct {
	mu   sync.Mutex
	next token.KeySource
	do   func() error
}

func (k *trap) Keys(ctx context.Context, kid string) ([]token.Key, error) {
	k.mu.Lock()
	do := k.do
	k.mu.Unlock()
	if do != nil {
		if err := do(); err != nil {
			return nil, err
		}
	}
	return k.next.Keys(ctx, kid)
}

func (k *trap) set(do func() error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.do = do
}

func TestV62_APanicIsOneCallsProblem(t *testing.T) {
	keys := &trap{}
	h := start(t, func(s *settings) { s.keys = keys })
	keys.next = h.tokens
	csr := newCSR(t, catest.NewKey(t), nil)
	keys.set(func() error { panic("a malformed sub") })
	for name, call := range map[string]func() error{
		"unary": func() error {
			_, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: csr})
			return err
		},
		"stream": func() error {
			_, err := h.delta(t, h.good(t)).Recv()
			return err
		},
	} {
		err := call()
		if status.Code(err) != codes.Internal {
			t.Fatalf("%s: %v; want Internal", name, err)
		}
		line := h.log.wait(t, referenceOf(t, err))
		if line["level"] != "ERROR" || !strings.Contains(line["reason"].(string), "a malformed sub") || !strings.Contains(line["stack"].(string), "authenticate") {
			t.Errorf("%s: log line %v", name, line)
		}
	}
	keys.set(nil)
	if _, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: csr}); err != nil {
		t.Errorf("the next call: %v", err)
	}
	if n := h.metric(t, "meshca_ca_requests_total", "internal"); n != 1 {
		t.Errorf("%v internal outcomes were counted; want 1", n)
	}
}

func TestV16_KeysOutOfReachIsUnavailable(t *testing.T) {
	keys := &trap{}
	h := start(t, func(s *settings) { s.keys = keys })
	keys.next = h.tokens
	keys.set(func() error { return errors.New("connection refused") })
	_, err := h.create(t, h.good(t), &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)})
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("%v; want Unavailable", err)
	}
	h.log.wait(t, referenceOf(t, err), "connection refused")
}
