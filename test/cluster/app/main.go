// App is what runs in the pods of the tests: a server and a client, with SPIFFE
// and without, told over HTTP what to do. It uses go-spiffe as any program would,
// and nothing of meshca.
//
//	:8080  plaintext HTTP, answers with the pod's name
//	:8443  mutual TLS by the Workload API, answers with the client's SPIFFE ID
//	:9000  what to do, for the tests; see the handlers
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	began := time.Now()
	failed := make(chan error, 3)
	serve := func(f func() error) { go func() { failed <- f() }() }
	serve(func() error { return plain().ListenAndServe() })
	serve(func() error { return control().ListenAndServe() })
	if os.Getenv("SPIFFE_ENDPOINT_SOCKET") != "" {
		serve(func() error { return mutual(ctx, began) })
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

func server(addr string, h http.Handler) *http.Server {
	return &http.Server{Addr: addr, Handler: h, ReadHeaderTimeout: 5 * time.Second}
}

func plain() *http.Server {
	host, _ := os.Hostname()
	return server(":8080", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, host) }))
}

// first is how long the program waited for its first SVID, from its start.
var first atomic.Int64

// mutual serves once there is an SVID, for whoever has one of the trust domain.
func mutual(ctx context.Context, began time.Time) error {
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return fmt.Errorf("waiting for an SVID: %w", err)
	}
	defer source.Close()
	first.Store(int64(time.Since(began)))
	s := server(":8443", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := peerID(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		fmt.Fprintln(w, id)
	}))
	svid, err := source.GetX509SVID()
	if err != nil {
		return err
	}
	s.TLSConfig = tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeMemberOf(svid.ID.TrustDomain()))
	return s.ListenAndServeTLS("", "")
}

func peerID(r *http.Request) (spiffeid.ID, error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return spiffeid.ID{}, errors.New("no client certificate")
	}
	uris := r.TLS.PeerCertificates[0].URIs
	if len(uris) != 1 {
		return spiffeid.ID{}, fmt.Errorf("the client certificate has %d URIs", len(uris))
	}
	return spiffeid.FromURI(uris[0])
}
