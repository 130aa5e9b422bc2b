package token_test

import (
	"crypto"
	"testing"
	"time"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokentest"
)

func BenchmarkVerify(b *testing.B) {
	for _, bench := range []struct {
		name string
		key  crypto.Signer
	}{{"ES256", nil}, {"RS256", tokentest.RSAKey(b)}} {
		b.Run(bench.name, func(b *testing.B) {
			iss := tokentest.NewIssuer(b, issuerURL, bench.key, atNoon)
			v, err := token.New(token.Config{Now: atNoon, Issuers: []token.Issuer{{
				URL: issuerURL, Keys: iss, RequirePod: true, Audiences: map[string]time.Duration{"meshca": time.Hour},
			}}})
			if err != nil {
				b.Fatal(err)
			}
			raw := iss.Token(b, iss.Claims())
			b.ReportAllocs()
			for b.Loop() {
				if _, err := v.Verify(b.Context(), raw); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
