package token_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokentest"
)

// FuzzVerify changes a good token. Nobody else can sign, so whatever passes says
// what the good one says.
func FuzzVerify(f *testing.F) {
	w := newWorld(f, nil)
	good := w.Token(f, w.Claims())
	part := strings.Split(good, ".")
	for _, raw := range []string{
		good, "", "..", part[0] + "." + part[1] + ".", part[0] + "..", good + ".", "." + part[1] + "." + part[2], good + "=", strings.ToUpper(good),
		w.Token(f, tokentest.With(w.Claims(), "iss", "https://evil.example")), w.Token(f, tokentest.With(w.Claims(), "sub", "::::")),
	} {
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		c, err := w.v.Verify(t.Context(), raw)
		var invalid *token.InvalidError
		switch {
		case err == nil && !strings.HasPrefix(raw, part[0]+"."+part[1]+"."):
			t.Errorf("accepted %q as %s/%s", raw, c.Namespace(), c.ServiceAccount())
		case err != nil && !errors.As(err, &invalid):
			t.Errorf("%q: %v", raw, err)
		case err != nil && (c != nil || leaks(err.Error(), raw) || len(err.Error()) > 2000):
			t.Errorf("%q: claims %v, error %v", raw, c, err)
		}
	})
}
