package token_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
	"github.com/meshca/meshca/identity/token/tokentest"
)

const issuerURL = "https://kubernetes.default.svc.cluster.local"

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func atNoon() time.Time { return noon }

// world is an issuer with a verifier that believes it.
type world struct {
	*tokentest.Issuer
	v *token.Verifier
}

// newWorld makes a world at noon; change, if not nil, sees the issuer's settings
// first.
func newWorld(t testing.TB, change func(*token.Issuer)) *world {
	t.Helper()
	iss := tokentest.NewIssuer(t, issuerURL, nil, atNoon)
	settings := token.Issuer{
		URL: issuerURL, Keys: iss, RequirePod: true,
		Audiences: map[string]time.Duration{"meshca": time.Hour},
	}
	if change != nil {
		change(&settings)
	}
	v, err := token.New(token.Config{Issuers: []token.Issuer{settings}, Now: atNoon})
	if err != nil {
		t.Fatal(err)
	}
	return &world{iss, v}
}

// verdict checks what Verify says: "" for a token that is good, else a part of
// the reason why it is not.
func (w *world) verdict(t *testing.T, raw, want string) {
	t.Helper()
	c, err := w.v.Verify(t.Context(), raw)
	var invalid *token.InvalidError
	switch {
	case want == "" && err != nil:
		t.Errorf("refused: %v", err)
	case want == "" || err == nil && c == nil:
	case err == nil:
		t.Errorf("accepted as %s/%s; expected a refusal that says %q", c.Namespace(), c.ServiceAccount(), want)
	case !errors.As(err, &invalid):
		t.Errorf("error is %T (%v), expected *token.InvalidError", err, err)
	case !strings.Contains(invalid.Reason, want):
		t.Errorf("reason is\n  %s\nexpected it to say\n  %s", invalid.Reason, want)
	}
	if err != nil && (c != nil || leaks(err.Error(), raw)) {
		t.Errorf("claims %v and error %v for a refused token", c, err)
	}
}

// leaks reports whether a message holds a stretch of the token's signature or
// payload.
func leaks(message, raw string) bool {
	for part := range strings.SplitSeq(raw, ".") {
		for i := 0; i+24 <= len(part); i += 8 {
			if strings.Contains(message, part[i:i+24]) {
				return true
			}
		}
	}
	return false
}

func TestVerifyYieldsWhatTheTokenSays(t *testing.T) {
	w := newWorld(t, nil)
	raw, err := w.Issue(tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: "cart", ServiceAccountUID: "sa-1", PodName: "cart-0", PodUID: "pod-1",
		NodeName: "node-1", NodeUID: "node-uid-1", Audience: []string{"vault", "meshca"}, Lifetime: time.Hour,
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := w.v.Verify(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	pod, podUID := c.Pod()
	node, nodeUID := c.Node()
	got := []string{c.Issuer(), c.Audience(), c.Namespace(), c.ServiceAccount(), c.ServiceAccountUID(), pod, podUID, node, nodeUID}
	want := []string{issuerURL, "meshca", "shop", "cart", "sa-1", "cart-0", "pod-1", "node-1", "node-uid-1"}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("claim %d is %q, expected %q", i, got[i], want[i])
		}
	}
	if !c.Expires().Equal(noon.Add(time.Hour)) || !c.IssuedAt().Equal(noon) || len(c.ID()) != 36 {
		t.Errorf("expires %s, issued %s, ID %q", c.Expires(), c.IssuedAt(), c.ID())
	}
}

func TestT2_NewRefusesConfigurationsThatBelieveTooMuch(t *testing.T) {
	keys := tokentest.NewIssuer(t, issuerURL, nil, nil)
	good := token.Issuer{URL: issuerURL, Keys: keys, Audiences: map[string]time.Duration{"meshca": time.Hour}}
	for want, change := range map[string]func(*token.Issuer){
		"URL is empty":         func(i *token.Issuer) { i.URL = "" },
		"tokens from Secrets":  func(i *token.Issuer) { i.URL = "kubernetes/serviceaccount" },
		"no source of keys":    func(i *token.Issuer) { i.Keys = nil },
		"no audience":          func(i *token.Issuer) { i.Audiences = nil },
		"audiences is empty":   func(i *token.Issuer) { i.Audiences = map[string]time.Duration{"": time.Hour} },
		"must be at least 1s":  func(i *token.Issuer) { i.Audiences = map[string]time.Duration{"meshca": 0} },
		"is configured twice":  func(*token.Issuer) {},
		"no issuer is configu": nil,
	} {
		t.Run(want, func(t *testing.T) {
			var c token.Config
			if change != nil {
				bad := good
				change(&bad)
				c.Issuers = []token.Issuer{bad, good}
			}
			if v, err := token.New(c); err == nil || !strings.Contains(err.Error(), want) || v != nil {
				t.Errorf("New says %v, expected %q", err, want)
			}
		})
	}
}

type brokenSource struct{ err error }

func (b brokenSource) Keys(context.Context, string) ([]token.Key, error) { return nil, b.err }

// Keys out of reach refuse every token, as a passing fault: no built-in key
// stands in, and the token is not called bad.
func TestV16_KeysOutOfReachRefuseEveryToken(t *testing.T) {
	away := errors.New("dial tcp: connection refused")
	w := newWorld(t, func(i *token.Issuer) { i.Keys = brokenSource{away} })
	for range 2 {
		c, err := w.v.Verify(t.Context(), w.Token(t, w.Claims()))
		var unavailable *token.UnavailableError
		if c != nil || !errors.As(err, &unavailable) || !errors.Is(err, away) {
			t.Fatalf("claims %v, error %v; expected *token.UnavailableError with the cause", c, err)
		}
		if unavailable.Issuer != issuerURL {
			t.Errorf("names issuer %q", unavailable.Issuer)
		}
	}
}

// A token of an issuer that is not configured asks no source for a key.
func TestV18_UnknownIssuerFetchesNothing(t *testing.T) {
	w := newWorld(t, func(i *token.Issuer) { i.Keys = brokenSource{errors.New("asked")} })
	raw := w.Token(t, tokentest.With(w.Claims(), "iss", "https://evil.example"))
	w.verdict(t, raw, `its issuer "https://evil.example" is not among ["`+issuerURL+`"]`)
}

// What a token is refused for can be attributed to its subject only when an
// issuer has signed it.
func TestInvalidErrorNamesOnlySignedSubjects(t *testing.T) {
	w := newWorld(t, nil)
	other := tokentest.NewIssuer(t, issuerURL, nil, atNoon)
	claims := tokentest.With(w.Claims(), "aud", "vault")
	for _, test := range []struct{ name, raw, subject string }{
		{"signed", w.Token(t, claims), "system:serviceaccount:shop:cart"},
		{"made up", other.Token(t, claims), ""},
	} {
		_, err := w.v.Verify(t.Context(), test.raw)
		var invalid *token.InvalidError
		if !errors.As(err, &invalid) || invalid.Subject != test.subject {
			t.Errorf("%s: error %v names subject %q, expected %q", test.name, err, invalid.Subject, test.subject)
		}
	}
}

func TestReasonsSayWhatToDo(t *testing.T) {
	w := newWorld(t, nil)
	at := noon.Add(-192 * time.Second).Unix()
	for _, test := range []struct {
		claims map[string]any
		want   string
	}{
		{tokentest.With(w.Claims(), "aud", []string{"vault"}),
			`token of "system:serviceaccount:shop:cart": audience ["vault"] does not hold "meshca"`},
		{tokentest.With(tokentest.With(w.Claims(), "exp", at), "iat", at-600),
			`token of "system:serviceaccount:shop:cart": expired 3m12s ago (at 2026-03-01T11:56:48Z, leeway 30s); ` +
				`the kubelet refreshes projected tokens, so the file was not re-read or the node's clock is off`},
	} {
		if _, err := w.v.Verify(t.Context(), w.Token(t, test.claims)); err == nil || err.Error() != test.want {
			t.Errorf("error is\n  %v\nexpected\n  %s", err, test.want)
		}
	}
}
