package token

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4/json"
)

// Claims are what a verified token says. Only [Verifier.Verify] makes them.
type Claims struct {
	issuer, audience          string
	namespace, serviceAccount string
	serviceAccountUID         string
	pod, node                 object
	id                        string
	expires, issuedAt         time.Time
	notBefore                 time.Time
}

// object is a Kubernetes object that a token is bound to.
type object struct{ name, uid string }

// Issuer returns the issuer, as configured.
func (c *Claims) Issuer() string { return c.issuer }

// Audience returns the configured audience by which the token was accepted.
func (c *Claims) Audience() string { return c.audience }

// Namespace returns the ServiceAccount's namespace, a DNS label.
func (c *Claims) Namespace() string { return c.namespace }

// ServiceAccount returns the ServiceAccount's name, a DNS subdomain.
func (c *Claims) ServiceAccount() string { return c.serviceAccount }

// ServiceAccountUID returns the ServiceAccount's UID; it can be empty only where
// the issuer is not required to name pods.
func (c *Claims) ServiceAccountUID() string { return c.serviceAccountUID }

// Pod returns the pod that the token is bound to. Both are empty if it is bound
// to none, which only an issuer without RequirePod may do.
func (c *Claims) Pod() (name, uid string) { return c.pod.name, c.pod.uid }

// Node returns the node of the pod, both empty as for [Claims.Pod].
func (c *Claims) Node() (name, uid string) { return c.node.name, c.node.uid }

// ID returns the token's own ID ("jti"), empty if it has none. It is printable
// ASCII and identifies the token in logs.
func (c *Claims) ID() string { return c.id }

// Expires returns the token's end, without any leeway.
func (c *Claims) Expires() time.Time { return c.expires }

// IssuedAt returns when the token was made.
func (c *Claims) IssuedAt() time.Time { return c.issuedAt }

// rawClaims is the JSON of the claims that are read. Its types note what is of
// the wrong kind (null too) instead of failing, so that check can name it.
type rawClaims struct {
	Issuer    text     `json:"iss"`
	Subject   text     `json:"sub"`
	Audience  audience `json:"aud"`
	Expires   seconds  `json:"exp"`
	NotBefore seconds  `json:"nbf"`
	IssuedAt  seconds  `json:"iat"`
	ID        text     `json:"jti"`
	Kube      struct {
		Namespace      text       `json:"namespace"`
		ServiceAccount rawObject  `json:"serviceaccount"`
		Pod            *rawObject `json:"pod"`
		Node           *rawObject `json:"node"`
	} `json:"kubernetes.io"`
}

type rawObject struct {
	Name text `json:"name"`
	UID  text `json:"uid"`
}

// parseClaims parses claims that nobody may have verified; [rawClaims.check] comes
// later. The decoder is go-jose's, not the standard library's: it distinguishes "iss"
// from "ISS" and refuses repeated members.
func parseClaims(payload []byte) (*rawClaims, *InvalidError) {
	var c rawClaims
	if err := json.Unmarshal(payload, &c); err != nil {
		return nil, invalidf("its claims are not the JSON of a token: %s", quote(err.Error()))
	}
	if !utf8.Valid(payload) {
		return nil, invalidf("its claims are not UTF-8")
	}
	return &c, nil
}

// check names what is of the wrong kind, or missing.
func (c *rawClaims) check() *InvalidError {
	for _, t := range []struct {
		name string
		text
	}{
		{"iss", c.Issuer}, {"sub", c.Subject}, {"jti", c.ID}, {"kubernetes.io.namespace", c.Kube.Namespace},
		{"kubernetes.io.serviceaccount.name", c.Kube.ServiceAccount.Name},
		{"kubernetes.io.serviceaccount.uid", c.Kube.ServiceAccount.UID},
	} {
		if t.wrong != "" {
			return invalidf("its %q is %s, not a string", t.name, t.wrong)
		}
	}
	for _, t := range []struct {
		name string
		seconds
	}{{"exp", c.Expires}, {"nbf", c.NotBefore}, {"iat", c.IssuedAt}} {
		switch {
		case t.wrong != "":
			return invalidf("its %q is %s; a time is a whole number of seconds after 1970, until the year 9999", t.name, t.wrong)
		case t.n == 0:
			return invalidf("it has no %q", t.name)
		}
	}
	if c.Audience.wrong != "" {
		return invalidf(`its "aud" is %s; a string is expected, or an array of at most %d`, c.Audience.wrong, maxAudiences)
	}
	return nil
}

// seconds is a NumericDate (RFC 7519 §2) of whole seconds after 1970; 0 if there
// is none.
type seconds struct {
	n     int64
	wrong string // what was there instead
}

func (s *seconds) UnmarshalJSON(b []byte) error {
	const year9999 = 253402300799
	*s = seconds{wrong: kindOf(b)}
	if len(b) > 12 { // more digits than that have no business here
		return nil
	}
	n := int64(0)
	for _, c := range b {
		if c < '0' || c > '9' {
			return nil
		}
		n = n*10 + int64(c-'0')
	}
	if n > 0 && n <= year9999 {
		*s = seconds{n: n}
	}
	return nil
}

// audience is one string or several (RFC 7519 §4.1.3).
type audience struct {
	names []string
	wrong string // what was there instead
}

const maxAudiences = 16

func (a *audience) UnmarshalJSON(b []byte) error {
	*a = audience{wrong: kindOf(b)}
	switch a.wrong {
	case "a string":
		var one text
		if err := one.UnmarshalJSON(b); err != nil {
			return err
		}
		*a = audience{names: []string{one.s}}
	case "an array":
		var list []text
		if err := json.Unmarshal(b, &list); err != nil {
			return err
		}
		if len(list) > maxAudiences {
			a.wrong = fmt.Sprintf("an array of %d", len(list))
			return nil
		}
		names := make([]string, len(list))
		for i, t := range list {
			if t.wrong != "" {
				a.wrong = "an array that holds " + t.wrong
				return nil
			}
			names[i] = t.s
		}
		*a = audience{names: names}
	}
	return nil
}

// subject checks that "sub" and the Kubernetes claims name one ServiceAccount,
// and takes it.
func (c *Claims) subject(raw *rawClaims) *InvalidError {
	ns, sa := raw.Kube.Namespace.s, raw.Kube.ServiceAccount.Name.s
	subNS, subSA, ok := parseSubject(raw.Subject.s)
	if !ok {
		return invalidf("its subject %s is not system:serviceaccount:<namespace>:<name>", quote(raw.Subject.s))
	}
	if ns == "" && sa == "" {
		return invalidf("it has no kubernetes.io claims; only tokens like those of a Kubernetes API server are taken")
	}
	if ns != subNS || sa != subSA {
		return invalidf("its subject names %s, its kubernetes.io claims name %s", quote(subNS+"/"+subSA), quote(ns+"/"+sa))
	}
	c.namespace, c.serviceAccount = ns, sa
	c.serviceAccountUID = raw.Kube.ServiceAccount.UID.s
	return nil
}

// parseSubject takes apart the user name that Kubernetes gives ServiceAccounts.
func parseSubject(sub string) (namespace, serviceAccount string, ok bool) {
	rest, ok := strings.CutPrefix(sub, "system:serviceaccount:")
	if !ok {
		return "", "", false
	}
	namespace, serviceAccount, ok = strings.Cut(rest, ":")
	if !ok || !isLabel(namespace) || !isSubdomain(serviceAccount) {
		return "", "", false
	}
	return namespace, serviceAccount, true
}

// times judges "exp", "nbf" and "iat" against the wall clock.
func (c *Claims) times(now time.Time) *InvalidError {
	now = now.Round(0)
	switch {
	case !c.expires.After(c.issuedAt):
		return invalidf("it ends at %s, not after it was issued at %s", stamp(c.expires), stamp(c.issuedAt))
	case !now.Before(c.expires.Add(leeway)):
		return invalidf("expired %s ago (at %s, leeway %s); the kubelet refreshes projected tokens, so the file was not re-read or the node's clock is off",
			now.Sub(c.expires).Round(time.Second), stamp(c.expires), leeway)
	case now.Before(c.notBefore.Add(-leeway)):
		return invalidf("not valid for another %s (before %s, leeway %s); the issuer's clock and this one differ",
			c.notBefore.Sub(now).Round(time.Second), stamp(c.notBefore), leeway)
	case now.Before(c.issuedAt.Add(-leeway)):
		return invalidf("issued %s from now (at %s, leeway %s); the issuer's clock and this one differ",
			c.issuedAt.Sub(now).Round(time.Second), stamp(c.issuedAt), leeway)
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// addressed finds the audience by which a token is accepted: of those that it
// holds and whose limit it keeps, the strictest. A token for two audiences is
// thus worth no more than two tokens for one each.
func (c *Claims) addressed(raw *rawClaims, limits []limit) *InvalidError {
	var held *limit
	lifetime := raw.Expires.n - raw.IssuedAt.n // in seconds: a Duration could overflow
	for i := range limits {
		if !slices.Contains(raw.Audience.names, limits[i].audience) {
			continue
		}
		held = &limits[i]
		if lifetime <= int64(held.lifetime/time.Second) {
			c.audience = held.audience
			return nil
		}
	}
	if held != nil {
		return invalidf("it lives for %d s; tokens for audience %q may live for %s, so ask for one with expirationSeconds of at most %d",
			lifetime, held.audience, held.lifetime, int64(held.lifetime/time.Second))
	}
	ours := make([]string, len(limits))
	for i, l := range limits {
		ours[i] = l.audience
	}
	if len(ours) == 1 {
		return invalidf("audience %s does not hold %q", quoteList(raw.Audience.names), ours[0])
	}
	return invalidf("audience %s holds none of %s", quoteList(raw.Audience.names), quoteList(ours))
}

// binding takes the pod and the node that the token is bound to. Half of an
// object is refused even where none is required.
func (c *Claims) binding(raw *rawClaims, requirePod bool) *InvalidError {
	if requirePod {
		switch {
		case raw.Kube.Pod == nil:
			return invalidf("it is bound to no pod; mount a projected token (tokens from Secrets and from kubectl create token are not bound)")
		case raw.Kube.Node == nil:
			return invalidf("it names no node; the API server must be 1.32 or newer")
		case c.serviceAccountUID == "":
			return invalidf("it names no service account UID")
		}
	}
	if c.serviceAccountUID != "" && !isUID(c.serviceAccountUID) {
		return invalidf("its service account UID %s is not one", quote(c.serviceAccountUID))
	}
	if pod := raw.Kube.Pod; pod != nil {
		if !isSubdomain(pod.Name.s) || !isUID(pod.UID.s) {
			return invalidf("its pod %s with UID %s is not a name with a UID", quote(pod.Name.s), quote(pod.UID.s))
		}
		c.pod = object{pod.Name.s, pod.UID.s}
	}
	if node := raw.Kube.Node; node != nil {
		if !isSubdomain(node.Name.s) || !isUID(node.UID.s) {
			return invalidf("its node %s with UID %s is not a name with a UID", quote(node.Name.s), quote(node.UID.s))
		}
		c.node = object{node.Name.s, node.UID.s}
	}
	if !isPrintable(raw.ID.s) {
		return invalidf("its ID %s is not printable ASCII of at most 256 bytes", quote(raw.ID.s))
	}
	c.id = raw.ID.s
	return nil
}
