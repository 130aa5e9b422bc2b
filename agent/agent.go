package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/sds"
)

// Config is what an [Agent] is made from.
type Config struct {
	// CA is asked for certificates and followed for bundles; required. It may be
	// shared; whoever made it closes it.
	CA *caclient.Client
	// Token is who we are; required. See [caclient.TokenFile].
	Token caclient.TokenSource
	// Feed gets every change; required. The agent is its only publisher.
	Feed *sds.Feed
	// ID is the only identity to take; the zero ID leaves it to the token.
	ID identity.ID
	// KeyType of the private keys; empty means P-256.
	KeyType KeyType
	// Lifetime to ask for; zero leaves it to the CA.
	Lifetime time.Duration
	// Now is the wall clock; required.
	Now func() time.Time
	// Log gets one line for each certificate, each failure and each alarm;
	// required.
	Log *slog.Logger
	// Metrics is where the agent's metrics are registered; required.
	Metrics prometheus.Registerer
	// Draw yields the jitter, uniform in [0, 1); nil means math/rand/v2.
	Draw func() float64
}

func (c *Config) validate() error {
	switch {
	case c.CA == nil:
		return errors.New("agent: no CA client is given")
	case c.Token == nil:
		return errors.New("agent: no token source is given")
	case c.Feed == nil:
		return errors.New("agent: no feed is given")
	case c.Now == nil || c.Log == nil || c.Metrics == nil:
		return errors.New("agent: Now, Log and Metrics must all be given")
	case c.Lifetime < 0 || c.Lifetime%time.Second != 0:
		return fmt.Errorf("agent: lifetime %v is not a positive number of whole seconds", c.Lifetime)
	}
	return nil
}

// Agent keeps one identity. Use [New], or [Host.Agent], then Run.
type Agent struct {
	conf    Config
	td      identity.TrustDomain
	host    *Host  // whose stream brings what the CA says; nil for a stream of its own
	name    string // of our resource on the host's stream
	metrics *metrics

	// wake tells the renewal loop to look again, at a CA's hint.
	wake chan struct{}

	// mu guards state. It is held while publishing, so that states go out in
	// order, and never while logging.
	mu    sync.Mutex
	state state
}

// New makes an agent. It contacts nobody.
func New(conf Config) (*Agent, error) { return newAgent(conf, nil) }

func newAgent(conf Config, host *Host) (*Agent, error) {
	if err := conf.validate(); err != nil {
		return nil, err
	}
	if conf.KeyType == "" {
		conf.KeyType = P256
	}
	if _, err := ParseKeyType(string(conf.KeyType)); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	if conf.Draw == nil {
		conf.Draw = rand.Float64
	}
	a := &Agent{
		conf: conf, td: conf.CA.TrustDomain(), host: host,
		wake:  make(chan struct{}, 1),
		state: state{first: make(chan struct{}), filesChanged: make(chan struct{})},
	}
	if host != nil {
		a.metrics = host.metrics
		return a, nil
	}
	var err error
	a.metrics, err = newMetrics(conf.Metrics)
	if err != nil {
		return nil, err
	}
	return a, a.registerGauges(conf.Metrics)
}

// Run obtains the identity and keeps it until ctx ends; then it returns nil.
// Nothing that goes wrong outside ends it.
func (a *Agent) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { a.keepSVID(ctx); return nil })
	if a.host != nil {
		a.host.join(a)
		defer a.host.leave(a)
	} else {
		g.Go(func() error { a.keepBundle(ctx); return nil })
	}
	return g.Wait()
}

// Ready returns nil while a valid SVID is held, otherwise why there is none.
func (a *Agent) Ready() error {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.state.valid(now) {
		return nil
	}
	why := "no certificate yet"
	if s := a.state.svid; s != nil {
		why = fmt.Sprintf("the certificate is valid from %s to %s, and it is %s",
			stamp(s.Leaf().NotBefore), stamp(s.NotAfter()), stamp(now))
	}
	if a.state.lastErr != nil {
		return fmt.Errorf("%s: %w", why, a.state.lastErr)
	}
	return errors.New(why)
}

// now is the wall clock. The monotonic reading is dropped: it stands still
// while the machine sleeps, and time.Time's comparisons would prefer it.
func (a *Agent) now() time.Time { return a.conf.Now().Round(0) }

// filesPrint is a fingerprint of the files that an attempt depends on,
// including the reason why one cannot be read.
func (a *Agent) filesPrint() [sha256.Size]byte {
	token, err := a.conf.Token()
	if a.host != nil {
		// It reads the anchor for all of them.
		return sha256.Sum256(fmt.Appendf(nil, "%q %v %x", token, err, a.host.anchorPrint()))
	}
	anchor, anchorErr := a.conf.CA.AnchorPEM()
	return sha256.Sum256(fmt.Appendf(nil, "%q %v %q %v", token, err, anchor, anchorErr))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
