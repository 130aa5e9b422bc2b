package token

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
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
	URL string
	// Keys verify the issuer's tokens. Either they or Review must be given, and
	// where one fails the other does not step in.
	Keys KeySource
	// Review has each token judged by the issuer itself instead.
	Review Reviewer
	// Audiences holds, for each audience that tokens may be addressed to, the
	// longest lifetime ("exp" − "iat") of a token that is.
	Audiences map[string]time.Duration
	// RequirePod refuses tokens that are not bound to a pod on a node. Set it for
	// every Kubernetes issuer.
	RequirePod bool
}

// Reviewer asks an issuer about its tokens. It is safe for concurrent use.
type Reviewer interface {
	// Review returns nil if a token is the issuer's, is good for the audience of
	// the claims, and is about what they say. They are from the token and judged, but
	// nobody has verified them before Review has. An [*InvalidError] says that the
	// token proves nothing; every other error, that this cannot be told.
	Review(ctx context.Context, raw string, claims *Claims) error
}

// Verifier verifies tokens. It is safe for concurrent use.
type Verifier struct {
	issuers map[string]*issuer
	now     func() time.Time
	// header is that of the last token that was good. What a stranger sends never
	// takes its place.
	header atomic.Pointer[header]
	memo   memo
}

type issuer struct {
	url        string
	keys       KeySource
	review     Reviewer
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
	case c.Keys == nil && c.Review == nil:
		return nil, errors.New("it has no source of keys")
	case c.Keys != nil && c.Review != nil:
		return nil, errors.New("it has a source of keys and is to be asked itself; only one of the two can decide")
	case len(c.Audiences) == 0:
		return nil, errors.New("it has no audience; a token for anybody would do")
	}
	i := &issuer{url: c.URL, keys: c.Keys, review: c.Review, requirePod: c.RequirePod}
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

// Knows reports whether tokens of an issuer are believed.
func (v *Verifier) Knows(issuer string) bool { return v.issuers[issuer] != nil }

// Verify verifies a token in the compact form, without a "Bearer" prefix. The
// error is an [*InvalidError] if the token proves nothing, and an
// [*UnavailableError] if that cannot be told.
func (v *Verifier) Verify(ctx context.Context, raw string) (*Claims, error) {
	var d digest
	if len(raw) <= maxToken { // and no work for what is refused for its length
		d = sha256.Sum256([]byte(raw))
		if known := v.remembered(ctx, d, v.now()); known != nil {
			return known, nil
		}
	}
	t, bad := split(raw, v.header.Load())
	if bad != nil {
		return nil, bad
	}
	// The claims are parsed once, before anybody has verified them, since the issuer
	// that they name selects the keys. Nothing else is taken from them until a key of
	// that issuer has verified the bytes that they were parsed from.
	read, bad := parseClaims(t.payload)
	if bad != nil {
		return nil, bad
	}
	iss, bad := v.issuerOf(read)
	if bad != nil {
		return nil, bad
	}
	if iss.review != nil {
		return iss.reviewed(ctx, raw, read, v.now())
	}
	keys, err := iss.keys.Keys(ctx, t.header.kid)
	if err != nil {
		return nil, &UnavailableError{Issuer: iss.url, Err: err}
	}
	key, bad := t.verify(keys)
	if bad != nil {
		return nil, bad
	}
	if bad := read.check(); bad != nil {
		return nil, bad
	}
	claims, bad := iss.judge(read, v.now())
	if bad != nil {
		bad.Subject = read.Subject.s
		return nil, bad
	}
	h := v.header.Load()
	if h == nil || h.text != t.header.text {
		own := t.header // alone, not the token that it is a part of
		h = &own
		v.header.Store(h)
	}
	v.memo.add(d, remembered{claims: claims, issuer: iss, header: h, key: key})
	return claims, nil
}

// reviewed has the issuer judge a token. What the token itself is refused for
// costs no question, and no error before the answer names whose it is.
func (i *issuer) reviewed(ctx context.Context, raw string, read *rawClaims, now time.Time) (*Claims, error) {
	if bad := read.check(); bad != nil {
		return nil, bad
	}
	claims, bad := i.judge(read, now)
	if bad != nil {
		return nil, bad
	}
	err := i.review.Review(ctx, raw, claims)
	if err == nil {
		return claims, nil
	}
	if errors.As(err, &bad) {
		return nil, bad
	}
	return nil, &UnavailableError{Issuer: i.url, Asked: true, Err: err}
}

// issuerOf finds the issuer that a token claims to be of.
func (v *Verifier) issuerOf(read *rawClaims) (*issuer, *InvalidError) {
	name := read.Issuer.s
	switch {
	case read.Issuer.wrong != "":
		return nil, invalidf("its %q is %s, not a string", "iss", read.Issuer.wrong)
	case name == "":
		return nil, invalidf("it names no issuer")
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
	c := &Claims{
		issuer:  i.url,
		expires: time.Unix(raw.Expires.n, 0).UTC(), issuedAt: time.Unix(raw.IssuedAt.n, 0).UTC(), notBefore: time.Unix(raw.NotBefore.n, 0).UTC(),
	}
	if bad := c.times(now); bad != nil {
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
