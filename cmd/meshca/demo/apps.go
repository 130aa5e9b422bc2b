package demo

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// cart is the serving program. It knows SPIFFE through go-spiffe and its
// agent's socket alone, as any program would.
type cart struct {
	source *workloadapi.X509Source
	server *http.Server
	addr   string
	done   chan error
}

// startCart serves HTTP over mutual TLS to one client identity.
func startCart(ctx context.Context, socket string, client spiffeid.ID) (*cart, error) {
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		return nil, fmt.Errorf("cart asking its agent for an identity: %w", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		source.Close()
		return nil, fmt.Errorf("cart listening: %w", err)
	}
	c := &cart{source: source, addr: l.Addr().String(), done: make(chan error, 1)}
	c.server = &http.Server{
		Handler:           http.HandlerFunc(sayWhoAsks),
		TLSConfig:         tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(client)),
		ReadHeaderTimeout: 5 * time.Second,
		ErrorLog:          discardLog(),
	}
	go func() { c.done <- c.server.ServeTLS(l, "", "") }()
	return c, nil
}

func (c *cart) close() error {
	defer c.source.Close()
	_ = c.server.Close()
	if err := <-c.done; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("cart serving: %w", err)
	}
	return nil
}

// What cart tells a client about the client.
const (
	headerPeer   = "X-Peer-Id"
	headerSerial = "X-Peer-Serial"
)

func sayWhoAsks(w http.ResponseWriter, r *http.Request) {
	leaf := r.TLS.PeerCertificates[0]
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	w.Header().Set(headerPeer, id.String())
	w.Header().Set(headerSerial, fmt.Sprintf("%x", leaf.SerialNumber))
	fmt.Fprintln(w, "hello")
}

// frontend is the asking program.
type frontend struct {
	source *workloadapi.X509Source
	client *http.Client
	url    string
}

func startFrontend(ctx context.Context, socket, cartAddr string, server spiffeid.ID) (*frontend, error) {
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		return nil, fmt.Errorf("frontend asking its agent for an identity: %w", err)
	}
	return &frontend{
		source: source,
		url:    "https://" + cartAddr,
		client: &http.Client{
			Timeout: 5 * time.Second,
			Transport: &http.Transport{
				TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(server)),
				// A connection for each request: each is a handshake with the
				// certificates of that moment, which is what is to be shown.
				DisableKeepAlives: true,
			},
		},
	}, nil
}

func (f *frontend) close() { f.source.Close() }

// answer is what one request showed: who each side turned out to be, as the
// other side saw it.
type answer struct {
	status       int
	seenByCart   string // SPIFFE ID
	clientSerial string // of frontend's certificate, as cart saw it
	serverSerial string // of cart's certificate, as frontend saw it
}

func (f *frontend) ask(ctx context.Context) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.url, nil)
	if err != nil {
		return answer{}, err
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return answer{}, err
	}
	return answer{
		status:       resp.StatusCode,
		seenByCart:   resp.Header.Get(headerPeer),
		clientSerial: resp.Header.Get(headerSerial),
		serverSerial: fmt.Sprintf("%x", resp.TLS.PeerCertificates[0].SerialNumber),
	}, nil
}

// traffic is what a series of requests came to.
type traffic struct {
	requests int
	failed   int
	first    error // the first failure
	serials  map[string]bool
}

// load asks over and over from a few goroutines until enough certificates of
// both sides have been seen or the time is up.
func (f *frontend) load(ctx context.Context, workers int, enough int, progress func(traffic)) traffic {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		mu  sync.Mutex
		sum = traffic{serials: map[string]bool{}}
		wg  sync.WaitGroup
	)
	for range workers {
		wg.Go(func() {
			for ctx.Err() == nil {
				a, err := f.ask(ctx)
				mu.Lock()
				switch {
				case ctx.Err() != nil: // the end, not a failure
				case err != nil || a.status != http.StatusOK:
					sum.requests++
					if sum.failed++; sum.first == nil {
						sum.first = errors.Join(err, statusError(a.status))
					}
				default:
					sum.requests++
					sum.serials["frontend "+a.clientSerial] = true
					sum.serials["cart "+a.serverSerial] = true
				}
				if len(sum.serials) >= enough {
					cancel()
				}
				if sum.requests%50 == 0 {
					progress(sum)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return sum
}

func statusError(status int) error {
	if status == 0 || status == http.StatusOK {
		return nil
	}
	return fmt.Errorf("status %d", status)
}

// stranger connects to cart over TLS without a certificate, as curl would, and
// returns how that ended. TLS 1.3 tells a client of its refusal only after the
// client's side of the handshake is done, so the verdict is in the read.
func stranger(ctx context.Context, addr string) error {
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} // it is cart that must refuse
	conn, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: cart\r\n\r\n"); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}
