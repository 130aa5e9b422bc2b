package vault

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// session is a token and what is known of it.
type session struct {
	token     string
	ofFile    bool // something else made it, and may replace it
	renewable bool
	began     time.Time     // of the login
	life      time.Duration // that it had when it was new; zero if it never ends
	end       time.Time     // zero if it never ends
	actAt     time.Time     // when to renew it or to log in anew; zero if it never ends
	last      bool          // a renewal gave it less than it had: it nears its longest life
}

// over reports whether the token has ended by our own clock.
func (s *session) over(now time.Time) bool { return !s.end.IsZero() && !now.Before(s.end) }

// extend notes that the token is good for so long from now. It is acted upon at a
// random instant from a half to two thirds of that.
func (s *session) extend(now time.Time, life time.Duration, random float64) {
	if life <= 0 {
		s.end, s.actAt = time.Time{}, time.Time{}
		return
	}
	s.end = now.Add(life)
	s.actAt = now.Add(life/2 + time.Duration(random*float64(life)/6))
}

// authenticate makes sure that there is a token to use, and renews it when it is due.
func (u *Upstream) authenticate(ctx context.Context) error {
	now := u.now()
	s := u.session
	if f, ok := u.method.(*tokenFile); ok && s != nil {
		if token, err := readSecret(f.path); err == nil && token != s.token {
			u.session, u.loginAt, s = nil, time.Time{}, nil // replaced
		}
	}
	switch {
	case s == nil || s.over(now):
		u.session = nil
		return u.logIn(ctx)
	case s.actAt.IsZero() || now.Before(s.actAt):
		return nil
	case s.renewable && !s.last:
		err := u.renew(ctx, u.active(), s)
		e := asError(err)
		if e == nil {
			return nil
		}
		s.extend(now, s.end.Sub(now), u.random()) // again at half of what is left
		if e.Status != http.StatusForbidden && e.Status != http.StatusBadRequest {
			return u.explain(ctx, e)
		}
		u.log.Warn("the token for Vault is not renewed; logging in anew", "error", e)
	}
	if s.ofFile {
		s.extend(now, s.end.Sub(now), u.random())
		return nil // whoever writes the file replaces it
	}
	// The old token is good until its end, should this fail.
	if err := u.logIn(ctx); err != nil {
		s.extend(now, s.end.Sub(now), u.random())
		if e := asError(err); e.State != Unreachable && e.State != Slow {
			u.log.Warn("a new login for Vault fails; the token is good for a while", "error", e, "ends", s.end)
			return nil
		}
		return err
	}
	return nil
}

// logIn gets a new token, unless that failed a moment ago.
func (u *Upstream) logIn(ctx context.Context) error {
	now := u.now()
	if u.method.changed() {
		u.logins, u.loginAt = 0, time.Time{} // what comes is another question
	}
	if now.Before(u.loginAt) && u.loginAt.Sub(now) <= longestPause {
		if u.loginErr != nil {
			return u.loginErr
		}
		return &Error{State: Expired, Doing: "logging in", Address: u.active(), Path: "auth", Reason: "the last token was refused a moment ago",
			Hint: fmt.Sprintf("the next login is at %s", u.loginAt.UTC().Format(time.RFC3339))}
	}
	s, err := u.method.login(ctx, u, u.active())
	if u.loginErr = nil; u.logins > 0 || err != nil {
		u.loginAt = now.Add(u.pause(u.logins))
	}
	u.logins++
	u.metrics.logins.WithLabelValues(result(err)).Inc()
	if err != nil {
		e := u.explain(ctx, asError(err))
		if e.State != Forbidden && e.State != Expired && e.State != Refused {
			// Vault itself is in trouble: once it is back there is nothing to wait for.
			u.logins, u.loginAt = 0, time.Time{}
		}
		u.loginErr = e
		return e
	}
	u.session = s
	u.log.Info("logged in at Vault", "ends", s.end, "renewable", s.renewable)
	return nil
}

// refreshed tells a token that is no longer good, which a new login mends, from a
// policy that does not allow the request, which it does not.
func (u *Upstream) refreshed(ctx context.Context, refusal *Error) (bool, error) {
	_, err := u.lookup(ctx, u.active(), u.session.token)
	e := asError(err)
	switch {
	case e == nil:
		return false, refusal
	case e.Status != http.StatusForbidden:
		return false, u.explain(ctx, e)
	}
	u.log.Warn("the token for Vault is not known any more; logging in anew", "error", e)
	if u.now().Before(u.loginAt) {
		// It is as good as new: if Vault does not know it, nor would it the next one;
		// or the policy is gone, and with it the permission to look up.
		return false, refusal
	}
	u.session = nil
	if err := u.logIn(ctx); err != nil {
		return false, err
	}
	// Until something is signed it is not known whether that has helped, and each
	// further request would log in again.
	u.loginAt = u.now().Add(u.spacing(u.logins))
	return true, nil
}

// login sends a login and makes a session of the answer.
func (u *Upstream) login(ctx context.Context, address string, r request) (*session, error) {
	r.method, r.timeout = http.MethodPut, callTimeout
	s, err := u.send(ctx, address, r)
	if err != nil {
		return nil, err
	}
	if s == nil || s.Auth == nil || s.Auth.ClientToken == "" {
		return nil, &Error{State: Refused, Doing: r.doing, Address: address, Path: r.path, Reason: "there is no token in the answer", Hint: "does the role ask for a second factor, or is its token type wrong?"}
	}
	return u.newSession(s.Auth.ClientToken, s.Auth.Renewable, time.Duration(s.Auth.LeaseDuration)*time.Second), nil
}

func (u *Upstream) newSession(token string, renewable bool, life time.Duration) *session {
	now := u.now()
	s := &session{token: token, renewable: renewable, began: now, life: life}
	s.extend(now, life, u.random())
	return s
}

// lookup asks what Vault knows of a token.
func (u *Upstream) lookup(ctx context.Context, address, token string) (*session, error) {
	s, err := u.send(ctx, address, request{
		doing: "looking the token up", method: http.MethodGet, path: "auth/token/lookup-self", token: token, timeout: callTimeout,
	})
	if err != nil {
		return nil, err
	}
	if text(s, "id") != token {
		return nil, &Error{State: Refused, Doing: "looking the token up", Address: address, Path: "auth/token/lookup-self", Reason: "the answer is about another token"}
	}
	renewable, _ := s.Data["renewable"].(bool)
	return u.newSession(token, renewable, time.Duration(number(s, "ttl"))*time.Second), nil
}

// renew asks for the token's first lifetime again. It may be given less, when it nears
// the longest that its role allows.
func (u *Upstream) renew(ctx context.Context, address string, s *session) error {
	const doing, path = "renewing the token", "auth/token/renew-self"
	answer, err := u.send(ctx, address, request{
		doing: doing, method: http.MethodPut, path: path, token: s.token, timeout: callTimeout,
		body: map[string]any{},
	})
	u.metrics.renewals.WithLabelValues(result(err)).Inc()
	if err != nil {
		return err
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken != s.token {
		return &Error{State: Refused, Doing: doing, Address: address, Path: path, Reason: "the answer is about another token"}
	}
	life := time.Duration(answer.Auth.LeaseDuration) * time.Second
	s.renewable = answer.Auth.Renewable
	s.last = life < s.life/2
	s.extend(u.now(), life, u.random())
	u.log.Info("the token for Vault was renewed", "ends", s.end)
	return nil
}

// revoke ends the token, as whoever is about to end should: nobody can use it after
// us.
func (u *Upstream) revoke(ctx context.Context) {
	s := u.session
	if u.session = nil; s == nil || s.ofFile || s.over(u.now()) {
		return
	}
	_, err := u.send(ctx, u.active(), request{
		doing: "revoking the token", method: http.MethodPut, path: "auth/token/revoke-self", token: s.token, timeout: revokeTimeout,
	})
	if err != nil {
		u.log.Warn("the token for Vault could not be revoked; it ends by itself", "error", err, "ends", s.end)
	}
}

func result(err error) string {
	if err == nil {
		return "ok"
	}
	if e := asError(err); e.State == Forbidden || e.State == Expired {
		return "refused"
	}
	return "failed"
}
