package mesh

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// TestF36_GoSpiffeThroughTwentyRenewals: go-spiffe's source, server and client,
// while certificates are renewed twenty times and both agents are killed.
func TestF36_GoSpiffeThroughTwentyRenewals(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	m := newMesh(t, shortLife)
	ca := m.startCA(t)
	cart := m.workload(t, "cart").startReadyAgent(t, ca)
	frontend := m.workload(t, "frontend").startReadyAgent(t, ca)
	server := spiffeServer(t, source(t, cart), frontend.id)
	seen := &serials{seen: make(map[string]bool)}
	l := startLoad(ctx, spiffeClient(t, source(t, frontend), server, cart.id, seen))
	defer l.stop()

	seen.wait(t, 7)
	frontend.Kill9(t)
	restarted(t, frontend)
	seen.wait(t, 14)
	cart.Kill9(t)
	restarted(t, cart)
	seen.wait(t, 21) // the first certificate and twenty that replaced it
	l.stop()
	l.wantNoFailure(t)
	t.Logf("the server showed %d certificates; %s", len(seen.seen), l)
}

// restarted starts a killed agent again and wants a program that comes new to
// have its certificate within two seconds.
func restarted(t *testing.T, a *Agent) {
	t.Helper()
	began := time.Now()
	a.Restart(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := newSource(ctx, a)
	took := time.Since(began)
	if err != nil {
		t.Fatalf("a new client of the restarted agent: %v", err)
	}
	defer s.Close()
	t.Logf("a new client of %s was served %s after the restart", a.id, took.Round(time.Millisecond))
	if took > 2*time.Second {
		t.Errorf("a new client was served %s after the restart, want at most 2 s", took)
	}
}

// serials are the certificates that a server has shown.
type serials struct {
	mu   sync.Mutex
	seen map[string]bool
}

func (s *serials) add(serial string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen[serial] = true
}

func (s *serials) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.seen)
}

// wait gives up when the server has shown nothing new for a certificate's life.
func (s *serials) wait(t *testing.T, n int) {
	t.Helper()
	for s.count() < n {
		have := s.count()
		err := eventually(t.Context(), fmt.Sprintf("certificate %d of %d", have+1, n), func() error {
			if s.count() == have {
				return errors.New("the server still shows the one before")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// spiffeServer echoes what it gets by spiffetls from clients with the ID.
func spiffeServer(t *testing.T, s *workloadapi.X509Source, client string) (address string) {
	t.Helper()
	l, err := spiffetls.ListenWithMode(t.Context(), "tcp", "127.0.0.1:0",
		spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(spiffeid.RequireFromString(client)), s))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// spiffeClient talks to the server and notes which certificate it shows.
func spiffeClient(t *testing.T, s *workloadapi.X509Source, address, server string, seen *serials) traffic {
	dial := func(ctx context.Context) (net.Conn, error) {
		conn, err := spiffetls.DialWithMode(ctx, "tcp", address,
			spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(spiffeid.RequireFromString(server)), s))
		if err != nil {
			return nil, err
		}
		deadline, _ := ctx.Deadline()
		return conn, conn.SetDeadline(deadline)
	}
	kept, err := dialKept(t.Context(), dial)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kept.Close() })
	return traffic{
		fresh: func(ctx context.Context) error {
			conn, err := dial(ctx)
			if err != nil {
				return err
			}
			defer conn.Close()
			if err := echo(conn); err != nil {
				return err
			}
			state, ok := conn.(interface{ ConnectionState() tls.ConnectionState })
			if !ok {
				return fmt.Errorf("%T does not tell its state", conn)
			}
			seen.add(state.ConnectionState().PeerCertificates[0].SerialNumber.String())
			return nil
		},
		kept: func(ctx context.Context) error {
			deadline, _ := ctx.Deadline()
			if err := kept.SetDeadline(deadline); err != nil {
				return err
			}
			return echo(kept)
		},
	}
}

func dialKept(ctx context.Context, dial func(context.Context) (net.Conn, error)) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return dial(ctx)
}

// echo says something and wants to hear it again.
func echo(conn net.Conn) error {
	const word = "hello, other side"
	if _, err := io.WriteString(conn, word); err != nil {
		return err
	}
	got := make([]byte, len(word))
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if string(got) != word {
		return fmt.Errorf("heard %q, want %q", got, word)
	}
	return nil
}
