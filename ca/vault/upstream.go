package vault

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshca/meshca/ca"
)

const (
	pollAway = 5 * time.Second  // how often Vault is looked for while it is away
	pollGood = 30 * time.Second // and how often it is looked at while all is well

	healthTimeout = 4 * time.Second
	callTimeout   = 10 * time.Second
	signTimeout   = 15 * time.Second
	revokeTimeout = 2 * time.Second

	firstPause    = 5 * time.Second
	longestPause  = 5 * time.Minute
	shortestPause = 500 * time.Millisecond
)

// Upstream is an issuer of a Vault. It is a [ca.Upstream], a [ca.Changer] and a
// [ca.Reporter].
type Upstream struct {
	config    Config
	now       func() time.Time
	log       *slog.Logger
	metrics   *metrics
	transport http.RoundTripper // nil for one over the network
	random    func() float64    // in [0, 1)

	report  atomic.Pointer[ca.Report]
	lifeFor atomic.Int64 // the lifetime last asked for, a time.Duration

	mu      sync.Mutex
	changed chan struct{} // closed when there is reason to ask again
	poked   chan struct{} // holds one item: look again at when the next step is due

	// turn is held (one item) by whoever speaks to Vault; it guards what follows.
	turn    chan struct{}
	method  method
	session *session
	at      int // index of the address that was last good
	fault   *fault
	standby bool // the server that is asked is not the active one
	roots   roots
	issuer  issuerFacts

	lookAt   time.Time // when to look how Vault is
	loginAt  time.Time // not to log in before
	logins   int       // in a row without anything signed
	loginErr *Error
	wanted   bool // an intermediate was asked for and could not be had
	wakes    int  // in a row without anything signed
	wakeAt   time.Time
}

// New makes an Upstream. It reads the roots, and asks Vault nothing: [Upstream.Run]
// does.
func New(c Config) (*Upstream, error) {
	if err := c.Check(); err != nil {
		return nil, fmt.Errorf("vault: %w", err)
	}
	u := &Upstream{
		config: c, now: c.Now, log: c.Log, random: rand.Float64, method: c.Auth.start(),
		changed: make(chan struct{}), poked: make(chan struct{}, 1), turn: make(chan struct{}, 1),
	}
	if u.now == nil {
		u.now = time.Now
	}
	if u.log == nil {
		u.log = slog.New(slog.DiscardHandler)
	}
	u.log = u.log.With("vault", c.Addresses[0], "issuer", c.Mount+"/"+c.Issuer)
	if err := u.roots.read(c.RootsFile); err != nil {
		return nil, fmt.Errorf("vault: roots: %w", err)
	}
	var err error
	if u.metrics, err = newMetrics(c.Metrics); err != nil {
		return nil, fmt.Errorf("vault: %w", err)
	}
	u.fault = &fault{since: u.now(), err: &Error{State: Connecting, Doing: "connecting", Address: c.Addresses[0], Path: "sys/health", Reason: "nothing has been heard of it yet"}}
	u.publish()
	return u, nil
}

// Changed returns a channel that is closed when Vault can be asked again after it
// could not, or when the roots to believe have changed.
func (u *Upstream) Changed() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.changed
}

func (u *Upstream) wake() {
	u.mu.Lock()
	defer u.mu.Unlock()
	close(u.changed)
	u.changed = make(chan struct{})
}

// Run keeps the upstream ready: it looks how Vault is, logs in, renews the token, and
// reads again the files that may change. It blocks until ctx is done, revokes the
// token then, and returns nil.
func (u *Upstream) Run(ctx context.Context) error {
	for {
		wait := u.step(ctx)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTimeout+signTimeout)
			defer cancel()
			if u.take(last) == nil {
				u.revoke(last)
				u.release()
			}
			return nil
		case <-u.poked:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// poke has Run see that the time for its next step may have changed.
func (u *Upstream) poke() {
	select {
	case u.poked <- struct{}{}:
	default:
	}
}

func (u *Upstream) take(ctx context.Context) error {
	select {
	case u.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (u *Upstream) release() { <-u.turn }

// step does what is due and returns how long to wait for the next time.
func (u *Upstream) step(ctx context.Context) time.Duration {
	if u.take(ctx) != nil {
		return 0
	}
	defer u.release()
	began := u.now()
	if u.roots.reread(u.config.RootsFile, u.log) {
		u.log.Info("the roots to believe have changed", "roots", names(u.roots.certs))
		u.wake()
	}
	if u.due(began) {
		u.settle(ctx, u.keep(ctx))
	}
	u.publish()
	// From beginning to beginning: a server that hangs must not slow the looking down.
	return max(u.next().Sub(u.now()), shortestPause)
}

// due reports whether anything is to be done now. A clock that was set back must not
// put it off.
func (u *Upstream) due(now time.Time) bool {
	return !now.Before(u.next()) || u.lookAt.Sub(now) > pollGood
}

// next is when something is due: the next look, unless the token is due before and can
// be renewed, for all that is known.
func (u *Upstream) next() time.Time {
	next := u.lookAt
	away := u.fault != nil && !u.fault.signing
	if s := u.session; !away && s != nil && !s.actAt.IsZero() && s.actAt.Before(next) {
		next = s.actAt
	}
	return next
}

// keep makes sure that Vault is there, that the CA is logged in and the token good,
// and looks at the issuer. The error says why not.
func (u *Upstream) keep(ctx context.Context) error {
	began := u.now()
	u.lookAt = began.Add(pollAway)
	if err := u.find(ctx); err != nil {
		return err
	}
	if err := u.authenticate(ctx); err != nil {
		return err
	}
	// A standby server says that it is well though it can reach no active one.
	if e := u.look(ctx); e != nil && u.standby && (e.Status/100 == 5 || e.State != Refused) {
		return u.explain(ctx, e)
	}
	u.lookAt = began.Add(pollGood)
	return nil
}

// settle notes what came of looking, or of logging in, and wakes the authority if it
// had wanted something while that was not possible.
func (u *Upstream) settle(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // the end of Run says nothing about Vault
	}
	if err != nil {
		u.fail(asError(err), false)
		return
	}
	if f := u.fault; f != nil && !f.signing {
		u.log.Info("Vault can be asked", "after", f.err.State, "away_for", u.now().Sub(f.since).Round(time.Second))
		u.fault = nil
	}
	now := u.now()
	if u.fault == nil && u.wanted && !now.Before(u.wakeAt) {
		// Once at once; if what is asked then fails again and again though Vault looks
		// well, ever more slowly.
		u.wakes++
		u.wakeAt = now.Add(u.pause(u.wakes))
		u.wake()
	}
}

// fail notes a fault.
func (u *Upstream) fail(e *Error, signing bool) {
	f := &fault{err: e, since: u.now(), signing: signing}
	if old := u.fault; old != nil {
		if old.err.State == e.State {
			f.since = old.since
		}
		if old.err.Error() == e.Error() {
			u.fault = f
			return // said already
		}
	}
	u.fault = f
	u.log.Error("Vault cannot sign", "state", e.State, "error", e)
}

func (u *Upstream) active() string { return u.config.Addresses[u.at] }

// find finds a server to ask: an active one, or else one that passes requests on.
func (u *Upstream) find(ctx context.Context) error {
	var errs []*Error
	standby := -1
	for i := range u.config.Addresses {
		i := (u.at + i) % len(u.config.Addresses)
		address := u.config.Addresses[i]
		h, err := u.health(ctx, address)
		problem := func(state State, reason, hint string) {
			errs = append(errs, &Error{State: state, Doing: "asking how it is", Address: address, Path: "sys/health", Reason: reason, Hint: hint})
		}
		switch {
		case err != nil:
			errs = append(errs, asError(err))
		case !h.Initialized:
			problem(Uninitialised, "it has never been initialised", "vault operator init")
		case h.Sealed:
			problem(Sealed, "it is sealed", "vault operator unseal")
		case h.Standby || h.PerformanceStandby:
			if standby < 0 {
				standby = i
			}
		default:
			u.at, u.standby = i, false
			return nil
		}
	}
	if standby >= 0 {
		u.at, u.standby = standby, true
		return nil
	}
	return telling(errs)
}

// telling is the error that tells most: one of a server that was there.
func telling(errs []*Error) *Error {
	best := errs[0]
	for _, e := range errs {
		if best.State == Unreachable && e.State != Unreachable {
			best = e
		}
	}
	return best
}

// explain asks Vault's health what a server error means: that of a sealed Vault and
// that of something before it look the same.
func (u *Upstream) explain(ctx context.Context, e *Error) *Error {
	if e.Status/100 != 5 && e.State != Unreachable {
		return e
	}
	if err := u.find(ctx); err != nil {
		return asError(err)
	}
	if u.standby && e.Status/100 == 5 {
		e.State, e.Hint = Standby, "no server is active, or this one cannot reach it"
	}
	return e
}

// SignIntermediate has an intermediate signed, and fails at once while Vault is known
// to be away. There is one retry, and only after a failure that shows that nothing
// was signed: a token that had ended, or a server that was not the active one.
func (u *Upstream) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	if err := u.take(ctx); err != nil {
		return nil, fmt.Errorf("waiting for Vault to be asked: %w", err)
	}
	defer u.release()
	defer u.publish()
	u.lifeFor.Store(int64(req.Lifetime))
	signed, err := u.sign(ctx, req)
	u.wanted = err != nil
	if err != nil {
		u.poke() // Run is asleep until the time at which all would have been well
		return nil, err
	}
	u.fault = nil
	u.wakes, u.wakeAt = 0, time.Time{}
	u.logins, u.loginAt, u.loginErr = 0, time.Time{}, nil
	u.log.Info("Vault signed an intermediate", "serial", fmt.Sprintf("%x", signed.Chain[0].SerialNumber), "ends", signed.Chain[0].NotAfter)
	return signed, nil
}

func (u *Upstream) sign(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	if u.session == nil || u.fault != nil && !u.fault.signing || u.session.over(u.now()) {
		if err := u.keep(ctx); err != nil {
			u.settle(ctx, err)
			return nil, err
		}
		u.settle(ctx, nil)
	}
	signed, err := u.ask(ctx, req)
	if e := asError(err); e != nil {
		if again, why := u.mayRepeat(ctx, e); again {
			signed, err = u.ask(ctx, req)
		} else {
			err = why
		}
	}
	if err != nil {
		e := asError(err)
		u.fail(e, e.State != Unreachable && e.State != Expired && e.State != Sealed && e.State != Standby && e.State != Uninitialised)
		if u.fault.signing {
			return nil, err
		}
		u.lookAt = u.now().Add(pollAway)
	}
	return signed, err
}

// mayRepeat says whether a request that failed so is to be repeated at once, and what
// the error is if not.
func (u *Upstream) mayRepeat(ctx context.Context, e *Error) (bool, error) {
	before := u.at
	switch {
	case e.Status == http.StatusForbidden:
		return u.refreshed(ctx, e)
	case e.Status == http.StatusTemporaryRedirect, e.Status/100 == 5:
		e = u.explain(ctx, e)
		if e.Status == http.StatusTemporaryRedirect {
			if err := u.find(ctx); err != nil {
				return false, err
			}
		}
		return u.at != before && !u.standby, e
	case e.State == Unreachable && e.dial:
		e = u.explain(ctx, e)
		return u.at != before, e
	}
	return false, e
}

// ask sends one request for a signature and reads the answer.
func (u *Upstream) ask(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	r, err := u.signRequest(req)
	if err != nil {
		return nil, err
	}
	answer, err := u.send(ctx, u.active(), r)
	if err != nil {
		return nil, err
	}
	signed, err := read(answer, req, u.roots.certs, u.now())
	if err != nil {
		return nil, &Error{
			State: Refused, Doing: r.doing, Address: u.active(), Path: r.path, Reason: err.Error(), Err: err,
			Hint: "nothing of the answer is used",
		}
	}
	return signed, nil
}

func names(certs []*x509.Certificate) []string {
	var out []string
	for _, c := range certs {
		out = append(out, c.Subject.String())
	}
	return out
}
