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
	knocked := Check{What: "stranger → cart   no certificate"}
	var alert *net.OpError
	switch err := stranger(ctx, cart.addr); {
	case err == nil:
		knocked.Saw = "was let in"
	case errors.As(err, &alert) && alert.Op == "remote error": // crypto/tls's name for an alert that arrived
		knocked.Saw, knocked.Why, knocked.Held = "refused", err.Error(), true
	default:
		knocked.Saw, knocked.Why = "could not tell", err.Error()
	}
	p.step("mutual TLS", asked, knocked)
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
