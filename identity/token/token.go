package token

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// leeway is how far the clocks of an issuer and of the CA may be apart.
const leeway = 30 * time.Second

// legacyIssuer is what tokens from Secrets name as their issuer. They never end
// and are bound to nothing.
const legacyIssuer = "kubernetes/serviceaccount"

// Config says whose tokens are believed.
type Config struct {
	Issuers []Issuer
	// Now is the clock that times are judged by; time.Now if nil.
	Now func() time.Time
}

// Issuer is one that is believed.
type Issuer struct {
	// URL is compared with "iss" byte for byte. No key is ever fetched from it.
	URL  string
	Keys KeySource
	// Audiences holds, for each audience that tokens may be addressed to, the
	// longest lifetime ("exp" − "iat") of a token that is.
	Audiences map[string]time.Duration
	// RequirePod refuses tokens that are not bound to a pod on a node. Set it for
	// every Kubernetes issuer.
	RequirePod bool
}

// Verifier verifies tokens. It is safe for concurrent use.
type Verifier struct {
	issuers map[string]*issuer
	now     func() time.Time
}

type issuer struct {
	url        string
	keys       KeySource
	audiences  []limit // the shortest limit first
	requirePod bool
}

type limit struct {
	audience string
	lifetime time.Duration
}

// New makes a Verifier.
func New(c Config) (*Verifier, error) {
	if len(c.Issuers) == 0 {
		return nil, errors.New("token verifier: no issuer is configured")
	}
	v := &Verifier{issuers: make(map[string]*issuer, len(c.Issuers)), now: c.Now}
	if v.now == nil {
		v.now = time.Now
	}
	for _, i := range c.Issuers {
		known, err := newIssuer(i)
		if err != nil {
			return nil, fmt.Errorf("token verifier: issuer %q: %w", i.URL, err)
		}
		if v.issuers[i.URL] != nil {
			return nil, fmt.Errorf("token verifier: issuer %q is configured twice", i.URL)
		}
		v.issuers[i.URL] = known
	}
	return v, nil
}

func newIssuer(c Issuer) (*issuer, error) {
	switch {
	case c.URL == "":
		return nil, errors.New("its URL is empty")
	case c.URL == legacyIssuer:
		return nil, errors.New("tokens from Secrets never expire and are bound to no pod; use projected tokens")
	case c.Keys == nil:
		return nil, errors.New("it has no source of keys")
	case len(c.Audiences) == 0:
		return nil, errors.New("it has no audience; a token for anybody would do")
	}
	i := &issuer{url: c.URL, keys: c.Keys, requirePod: c.RequirePod}
	for name, longest := range c.Audiences {
		if name == "" {
			return nil, errors.New("one of its audiences is empty")
		}
		if longest < time.Second {
			return nil, fmt.Errorf("the longest lifetime for audience %q is %s; it must be at least 1s", name, longest)
		}
		i.audiences = append(i.audiences, limit{name, longest})
	}
	slices.SortFunc(i.audiences, func(a, b limit) int {
		return cmp.Or(cmp.Compare(a.lifetime, b.lifetime), cmp.Compare(a.audience, b.audience))
	})
	return i, nil
}

// Verify verifies a token in the compact form, without a "Bearer" prefix. The
// error is an [*InvalidError] if the token proves nothing, and an
// [*UnavailableError] if that cannot be told.
func (v *Verifier) Verify(ctx context.Context, raw string) (*Claims, error) {
	t, bad := split(raw)
	if bad != nil {
		return nil, bad
	}
	iss, bad := v.issuerOf(t.payload)
	if bad != nil {
		return nil, bad
	}
	keys, err := iss.keys.Keys(ctx, t.kid)
	if err != nil {
		return nil, &UnavailableError{Issuer: iss.url, Err: err}
	}
	// From here on only bytes that a key of the issuer has signed are read.
	payload, bad := t.verified(keys)
	if bad != nil {
		return nil, bad
	}
	read, bad := readClaims(payload)
	if bad != nil {
		return nil, bad
	}
	claims, bad := iss.judge(read, v.now())
	if bad != nil {
		bad.Subject = read.Subject.s
		return nil, bad
	}
	return claims, nil
}

// issuerOf finds the issuer that a token claims to be of.
func (v *Verifier) issuerOf(payload []byte) (*issuer, *InvalidError) {
	name, bad := claimedIssuer(payload)
	if bad != nil {
		return nil, bad
	}
	if known := v.issuers[name]; known != nil {
		return known, nil
	}
	if name == legacyIssuer {
		return nil, invalidf("it comes from a Secret, never expires and is bound to no pod; mount a projected token")
	}
	known := make([]string, 0, len(v.issuers))
	for url := range v.issuers {
		known = append(known, url)
	}
	slices.Sort(known)
	return nil, invalidf("its issuer %s is not among %s", quote(name), quoteList(known))
}

// judge decides about claims whose signature is good.
func (i *issuer) judge(raw *rawClaims, now time.Time) (*Claims, *InvalidError) {
	// The issuer that selected the keys is bound to the one that was signed.
	if raw.Issuer.s != i.url {
		return nil, invalidf("its issuer %s is not %q", quote(raw.Issuer.s), i.url)
	}
	c := &Claims{issuer: i.url}
	if bad := c.times(raw, now); bad != nil {
		return nil, bad
	}
	if bad := c.addressed(raw, i.audiences); bad != nil {
		return nil, bad
	}
	if bad := c.subject(raw); bad != nil {
		return nil, bad
	}
	if bad := c.binding(raw, i.requirePod); bad != nil {
		return nil, bad
	}
	return c, nil
}
