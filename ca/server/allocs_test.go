//go:build !race

package server

import (
	"context"
	"testing"

	"google.golang.org/grpc/metadata"
	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/catest"
)

// mostAllocations is what a certificate may take, without gRPC: 524 when this was
// written, nearly all of them crypto/x509's and crypto/ecdsa's. Unlike seconds they
// repeat, and so a change that costs more is seen here. Raise it knowingly.
const mostAllocations = 550

func TestAllocationsOfACertificate(t *testing.T) {
	h := start(t, nil)
	service := &csrService{s: h.server}
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", "Bearer "+h.token(t, nil)))
	const runs = 100
	var all []*istio.IstioCertificateRequest
	for range runs + 2 { // each asks for something else, or it would be answered as before
		all = append(all, &istio.IstioCertificateRequest{Csr: newCSR(t, catest.NewKey(t), nil)})
	}
	next := 0
	got := testing.AllocsPerRun(runs, func() {
		if _, err := service.issue(ctx, reading(all[next])); err != nil {
			t.Error(err)
		}
		next++
	})
	t.Logf("%.0f allocations for a certificate", got)
	if got > mostAllocations {
		t.Errorf("%.0f allocations for a certificate, at most %d are wanted", got, mostAllocations)
	}
}
