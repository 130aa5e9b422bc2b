package catest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/audit"
	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/roots"
	"github.com/meshca/meshca/ca/self"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// What the tokens of a Kit say.
const (
	Issuer   = "https://tokens.test"
	Audience = "meshca"
)

// Kit is a running authority with all that is around it.
type Kit struct {
	TrustDomain   identity.TrustDomain
	Authority     *ca.Authority // can sign when New returns
	Upstream      *self.Upstream
	Authenticator *caller.Authenticator
	Tokens        *tokenissuer.Issuer
	Dir           string // the state directory
	AuditFile     string
	Anchor        string // file with the root certificate
}

type config struct {
	td      string
	ca      ca.Config
	byCert  []string
	wrap    func(ca.Upstream) ca.Upstream
	waiting bool
}

// Option changes what [New] makes.
type Option func(*config)

// WithTrustDomain names the trust domain; "cluster.local" without it.
func WithTrustDomain(td string) Option { return func(c *config) { c.td = td } }

// WithLeaf sets the limits of leaves.
func WithLeaf(l ca.LeafConfig) Option { return func(c *config) { c.ca.Leaf = l } }

// WithIntermediateLifetime sets the life of intermediates.
func WithIntermediateLifetime(d time.Duration) Option {
	return func(c *config) { c.ca.IntermediateLifetime = d }
}

// WithClock sets the clock of every part.
func WithClock(now func() time.Time) Option { return func(c *config) { c.ca.Now = now } }

// WithLog sets the authority's log.
func WithLog(l *slog.Logger) Option { return func(c *config) { c.ca.Log = l } }

// WithMetrics registers the authority's metrics.
func WithMetrics(r prometheus.Registerer) Option { return func(c *config) { c.ca.Metrics = r } }

// WithUpstream puts something between the authority and its root.
func WithUpstream(wrap func(ca.Upstream) ca.Upstream) Option {
	return func(c *config) { c.wrap = wrap }
}

// WithRoots sets what keeps the bundle of an upstream that counts no versions, in
// place of a record beside the state directory.
func WithRoots(r ca.RootKeeper) Option { return func(c *config) { c.ca.Roots = r } }

// WithMaySign sets what is asked before each signature.
func WithMaySign(ask func() error) Option { return func(c *config) { c.ca.MaySign = ask } }

// WithByCertificate lists SPIFFE IDs that may renew by certificate.
func WithByCertificate(ids ...string) Option { return func(c *config) { c.byCert = ids } }

// WithoutWaiting lets New return before the authority can sign.
func WithoutWaiting() Option { return func(c *config) { c.waiting = false } }

// New makes a root, opens it and runs an authority until the test ends.
func New(tb testing.TB, opts ...Option) *Kit {
	tb.Helper()
	c := config{td: "cluster.local", wrap: func(u ca.Upstream) ca.Upstream { return u }, waiting: true}
	for _, o := range opts {
		o(&c)
	}
	dir := tb.TempDir()
	k := &Kit{Dir: filepath.Join(dir, "state"), AuditFile: filepath.Join(dir, "audit.jsonl")}
	k.Anchor = self.AnchorPath(k.Dir)
	var err error
	k.TrustDomain, err = identity.ParseTrustDomain(c.td)
	check(tb, err)
	_, err = self.Init(k.Dir, self.InitConfig{TrustDomain: k.TrustDomain, Now: c.ca.Now})
	check(tb, err)
	k.Upstream, err = self.Open(k.Dir, self.Config{TrustDomain: k.TrustDomain, Now: c.ca.Now})
	check(tb, err)
	trail, err := audit.Open(k.AuditFile, c.ca.Now)
	check(tb, err)
	tb.Cleanup(func() { check(tb, trail.Close()) })

	if c.ca.Roots == nil {
		c.ca.Roots = k.keeper(tb, filepath.Join(dir, roots.FileName), c.ca)
	}
	c.ca.TrustDomain, c.ca.Upstream, c.ca.Audit = k.TrustDomain, c.wrap(k.Upstream), trail
	k.Authority, err = ca.New(c.ca)
	check(tb, err)
	k.authenticate(tb, c)
	k.run(tb, c.waiting)
	return k
}

// keeper keeps the roots of whatever upstream a test puts in the place of ours.
func (k *Kit) keeper(tb testing.TB, record string, c ca.Config) *roots.Keeper {
	tb.Helper()
	if c.Leaf.Ceiling == 0 {
		c.Leaf.Ceiling = ca.DefaultLeafCeiling
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	kept, err := roots.New(roots.Config{TrustDomain: k.TrustDomain, Store: roots.File{Path: record}, Ceiling: c.Leaf.Ceiling, Now: c.Now})
	check(tb, err)
	return kept
}

// authenticate makes the issuer of tokens and what verifies them.
func (k *Kit) authenticate(tb testing.TB, c config) {
	tb.Helper()
	var err error
	k.Tokens, err = tokenissuer.New(tokenissuer.Config{URL: Issuer, Now: c.ca.Now})
	check(tb, err)
	verifier, err := token.New(token.Config{Now: c.ca.Now, Issuers: []token.Issuer{{
		URL: Issuer, Keys: k.Tokens, Audiences: map[string]time.Duration{Audience: time.Hour}, RequirePod: true,
	}}})
	check(tb, err)
	config := caller.Config{Tokens: verifier, TrustDomain: k.TrustDomain, Bundles: k.Authority.Bundles(), Now: c.ca.Now}
	for _, s := range c.byCert {
		id, err := identity.ParseID(s)
		check(tb, err)
		config.ByCertificate = append(config.ByCertificate, id)
	}
	k.Authenticator, err = caller.New(config)
	check(tb, err)
}

func (k *Kit) run(tb testing.TB, wait bool) {
	tb.Helper()
	ctx, cancel := contextOf(tb)
	var running sync.WaitGroup
	_, changed := k.Authority.Bundle()
	running.Go(func() {
		if err := k.Authority.Run(ctx); err != nil {
			tb.Errorf("running the authority: %v", err)
		}
	})
	tb.Cleanup(func() {
		cancel()
		running.Wait()
	})
	if wait {
		<-changed
	}
}

// Token mints a token of the ServiceAccount's pod.
func (k *Kit) Token(tb testing.TB, namespace, serviceAccount string) string {
	tb.Helper()
	raw, err := k.Tokens.Issue(tokenissuer.Claims{
		Namespace: namespace, ServiceAccount: serviceAccount,
		PodName: serviceAccount + "-0", PodUID: uid("pod", namespace, serviceAccount),
		NodeName: "node-1", NodeUID: uid("node", "node-1"),
		Audience: []string{Audience}, Lifetime: time.Hour,
	})
	check(tb, err)
	return raw
}

// Caller authenticates the ServiceAccount's pod by a token.
func (k *Kit) Caller(tb testing.TB, namespace, serviceAccount string) *caller.Caller {
	tb.Helper()
	who, err := k.Authenticator.Authenticate(tb.Context(), caller.Credentials{Bearer: k.Token(tb, namespace, serviceAccount)})
	check(tb, err)
	return who
}

// SVID issues an SVID for the ServiceAccount over a new key.
func (k *Kit) SVID(tb testing.TB, namespace, serviceAccount string, lifetime time.Duration) *identity.SVID {
	tb.Helper()
	key := NewKey(tb)
	issued, err := k.Authority.Issue(tb.Context(), k.Caller(tb, namespace, serviceAccount), key.Public(), lifetime)
	check(tb, err)
	svid, err := identity.NewSVID(issued.Chain, key)
	check(tb, err)
	return svid
}

// NewKey makes a P-256 key.
func NewKey(tb testing.TB) crypto.Signer {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(tb, err)
	return key
}

// uid derives a UID in Kubernetes' form from names.
func uid(names ...string) string {
	b := sha256.Sum256(fmt.Append(nil, names))
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
