package demo

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// soon is how long a policy may take from the disk to its force.
const soon = time.Second

// policies shows what modes let in: without a policy, under STRICT, and with one
// port exempted. Everything is judged by the clients.
func (s *shop) policies(ctx context.Context, p *printer, source *workloadapi.X509Source, shopID spiffeid.ID) error {
	mesh := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(shopID))
	mesh.NextProtos = []string{"istio", "http/1.1"} // an istio name asks for mutual TLS of the mesh
	open, err := openPlaintext(ctx, s.addresses[0])
	if err != nil {
		return err
	}
	defer open.Close()
	p.step("PERMISSIVE (no policy)",
		lets("frontend → proxy → shop   mutual TLS", s.ask(ctx, 0, mesh)),
		lets("a client → shop           plaintext", s.ask(ctx, 0, nil)))

	written, err := s.write("default", "  mtls: {mode: STRICT}\n")
	if err != nil {
		return err
	}
	closed := closedIn(open, written)
	refused := s.refusedIn(ctx, written)
	p.step("STRICT for shop",
		lets("frontend → proxy → shop   mutual TLS", s.ask(ctx, 0, mesh)),
		refused, closed, knock(ctx, "stranger → shop           no certificate", s.addresses[0]))

	spec := fmt.Sprintf("  selector:\n    matchLabels: {app: cart}\n  portLevelMtls:\n    %s: {mode: PERMISSIVE}\n", s.ports[1])
	if written, err = s.write("cart", spec); err != nil {
		return err
	}
	p.step("exempt app port "+s.ports[1],
		s.openedIn(ctx, written),
		s.refusedIn(ctx, written))
	return nil
}

// ask makes a request over a connection of its own; in plaintext without a
// configuration.
func (s *shop) ask(ctx context.Context, port int, conf *tls.Config) error {
	scheme := "https"
	if conf == nil {
		scheme = "http"
	}
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+s.addresses[port], nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return err
	case resp.StatusCode != http.StatusOK || string(body) != shopSays:
		return fmt.Errorf("the answer is %d %.40q", resp.StatusCode, body)
	}
	return nil
}

// lets is the check of a request that should succeed.
func lets(what string, err error) Check {
	if err != nil {
		return Check{What: what, Saw: "failed", Why: err.Error()}
	}
	return Check{What: what, Saw: "200", Held: true}
}

// openPlaintext makes a connection that has carried a request, and stays.
func openPlaintext(ctx context.Context, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: shop\r\n\r\n"); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	buf := make([]byte, 1024)
	if _, err := conn.Read(buf); err != nil {
		return nil, errors.Join(fmt.Errorf("plaintext without a policy: %w", err), conn.Close())
	}
	return conn, nil
}

// closedIn waits for the end of a connection that was open when a policy was
// written.
func closedIn(open net.Conn, written time.Time) Check {
	c := Check{What: "the connection of before, still open"}
	_ = open.SetDeadline(time.Now().Add(5 * soon))
	_, err := io.Copy(io.Discard, open)
	took := time.Since(written)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		c.Saw = "is still open"
		return c
	}
	c.Saw, c.Held = "closed after "+milliseconds(took), took <= soon
	return c
}

// refusedIn asks in plaintext until that is refused.
func (s *shop) refusedIn(ctx context.Context, written time.Time) Check {
	c := Check{What: "a client → shop           plaintext"}
	took, ok := until(ctx, written, func() bool { return s.ask(ctx, 0, nil) != nil })
	if !ok {
		c.Saw = "was let in"
		return c
	}
	c.Saw, c.Held = "refused", took <= soon
	until(ctx, time.Now(), func() bool { c.Why = s.log.reason(); return c.Why != "" })
	return c
}

// openedIn asks in plaintext on the exempted port until that is let in.
func (s *shop) openedIn(ctx context.Context, written time.Time) Check {
	c := Check{What: "a client → exempted port  plaintext"}
	took, ok := until(ctx, written, func() bool { return s.ask(ctx, 1, nil) == nil })
	if !ok {
		c.Saw = "refused"
		return c
	}
	c.Saw, c.Held = "200, after "+milliseconds(took), took <= soon
	return c
}

// until tries until it is so, and returns how long that was after a change; it
// gives up after several times of what is allowed.
func until(ctx context.Context, since time.Time, is func() bool) (time.Duration, bool) {
	ctx, cancel := context.WithTimeout(ctx, 5*soon)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if is() {
			return time.Since(since), true
		}
		select {
		case <-ctx.Done():
			return 0, false
		case <-tick.C:
		}
	}
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
