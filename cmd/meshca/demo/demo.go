package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
)

// Config is what a demo run is made from.
type Config struct {
	Out, Err io.Writer    // results; progress
	Log      *slog.Logger // of all parts
	Stay     bool         // keep everything up at the end until the context ends
	JSON     bool         // nothing to Out while it runs; the caller prints the report
}

// trustDomain is the demo's. Certificates live 12 s, so that renewals can be
// watched; between a third and half of that they are renewed.
const (
	trustDomain  = "cluster.local"
	leafLifetime = 12 * time.Second
)

// Run runs the demo and returns what held. The error is about the demo itself:
// something that had to work before there was anything to show.
func Run(ctx context.Context, c Config) (Report, error) {
	dir, err := os.MkdirTemp("", "meshca-demo-")
	if err != nil {
		return Report{}, fmt.Errorf("making the demo's directory: %w", err)
	}
	defer os.RemoveAll(dir)

	out := c.Out
	if c.JSON {
		out = io.Discard
	}
	p := newPrinter(out, c.Err)
	began := time.Now()
	const title = "meshca demo: a mesh in one process"
	fmt.Fprintf(out, "%s%*s\n\n", title, lineWidth-len(title), "everything below is real, on loopback")

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	report, err := show(ctx, g, c, dir, p, began)
	// A part that dies takes the context with it; its error is the cause of
	// whatever the steps saw.
	if err != nil || !c.Stay {
		stop()
	}
	if partErr := g.Wait(); partErr != nil && !errors.Is(partErr, context.Canceled) {
		return report, partErr
	}
	return report, err
}

// show goes through the steps.
func show(ctx context.Context, g *errgroup.Group, c Config, dir string, p *printer, began time.Time) (Report, error) {
	w, err := startCA(ctx, g, dir, c.Log)
	if err != nil {
		return Report{}, err
	}
	p.step("certificate authority", Check{What: "root and intermediate made", Saw: "CSR API on " + w.addr, Held: true, Fact: true})

	frontendAgent, err := w.firstCertificate(ctx, g, p, "shop", "frontend")
	if err != nil {
		return Report{}, err
	}
	cartAgent, err := w.firstCertificate(ctx, g, p, "shop", "cart")
	if err != nil {
		return Report{}, err
	}
	cart, err := startCart(ctx, cartAgent.socket, frontendAgent.id.SPIFFE())
	if err != nil {
		return Report{}, err
	}
	front, err := startFrontend(ctx, frontendAgent.socket, cart.addr, cartAgent.id.SPIFFE())
	if err != nil {
		return Report{}, errors.Join(err, cart.close())
	}
	g.Go(func() error {
		<-ctx.Done()
		front.close()
		return cart.close()
	})

	mutualTLS(ctx, p, front, cart, frontendAgent.id)
	behind, err := w.startShop(ctx, g, cartAgent)
	if err != nil {
		return Report{}, err
	}
	if err := behind.policies(ctx, p, front.source, cartAgent.id.SPIFFE()); err != nil {
		return Report{}, err
	}
	renewal(ctx, p, front)
	w.refusals(ctx, p, cartAgent)

	report := p.finish(time.Since(began))
	if c.Stay && !c.JSON {
		fmt.Fprint(p.out, "\n\n"+w.invitation(frontendAgent, cartAgent, cart, behind))
	} else {
		fmt.Fprintln(p.out, " Keep it running with --stay and try it yourself.")
	}
	return report, ctx.Err()
}
