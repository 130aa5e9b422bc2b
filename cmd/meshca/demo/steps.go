package demo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/meshca/meshca/identity"
)

// mutualTLS has frontend ask cart, and a stranger knock.
func mutualTLS(ctx context.Context, p *printer, front *frontend, cart *cart, want identity.ID) {
	a, err := front.ask(ctx)
	asked := Check{What: "frontend → cart   mutual TLS"}
	switch {
	case err != nil:
		asked.Saw = err.Error()
	case a.status != http.StatusOK || a.seenByCart != want.String():
		asked.Saw = fmt.Sprintf("%d, cart saw %q; expected 200 and %s", a.status, a.seenByCart, want)
	default:
		asked.Saw, asked.Held = "200, cart saw …"+strings.TrimPrefix(a.seenByCart, "spiffe://"+trustDomain+"/ns/shop"), true
	}
	p.step("mutual TLS", asked, knock(ctx, "stranger → cart   no certificate", cart.addr))
}

// knock tries TLS without a certificate, and wants to be told that it needs one.
func knock(ctx context.Context, what, addr string) Check {
	c := Check{What: what}
	var alert *net.OpError
	switch err := stranger(ctx, addr); {
	case err == nil:
		c.Saw = "was let in"
	case errors.As(err, &alert) && alert.Op == "remote error": // crypto/tls's name for an alert that arrived
		c.Saw, c.Why, c.Held = "refused", err.Error(), true
	default:
		c.Saw, c.Why = "could not tell", err.Error()
	}
	return c
}

// Renewals to wait for: three certificates of each side, seen by the other.
const wantSerials = 6

func renewal(ctx context.Context, p *printer, front *frontend) {
	t := front.load(ctx, 4, wantSerials, func(t traffic) {
		p.waiting("waiting for renewals: %d of %d certificates seen, %d requests, %d failed", len(t.serials), wantSerials, t.requests, t.failed)
	})
	c := Check{
		What: fmt.Sprintf("%d certificates seen by peers", len(t.serials)),
		Saw:  fmt.Sprintf("%d of %d requests failed", t.failed, t.requests),
		Why:  "each request is a handshake with the certificates of that moment",
		Held: t.failed == 0 && len(t.serials) >= wantSerials,
	}
	if t.first != nil {
		c.Why = "the first failure: " + t.first.Error()
	}
	p.step("renewal", c)
}
