package token

import (
	"encoding/base64"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
)

// FuzzSubject holds the names that are accepted to those that can become an ID.
func FuzzSubject(f *testing.F) {
	for _, s := range []string{
		"system:serviceaccount:shop:cart", "system:serviceaccount:shop:", "system:serviceaccount::", "system:serviceaccount:a.b:c",
		"system:serviceaccount:shop:a.b", "system:serviceaccount:shop:-a", "system:serviceaccount:shop:a:b", "system:node:x", "",
		"system:serviceaccount:..:..", "system:serviceaccount:shop:" + strings.Repeat("a", 254), "system:serviceaccount:shop:%2e\x00",
	} {
		f.Add(s)
	}
	td, err := identity.ParseTrustDomain("example.org")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, sub string) {
		ns, sa, ok := parseSubject(sub)
		if ok && "system:serviceaccount:"+ns+":"+sa != sub {
			t.Fatalf("%q became %q and %q", sub, ns, sa)
		}
		part := strings.Split(sub, ":")
		want := len(part) == 4 && part[0] == "system" && part[1] == "serviceaccount"
		if want {
			_, err := identity.WorkloadID(td, part[2], part[3])
			want = err == nil
		}
		if ok != want {
			t.Fatalf("%q: accepted %t, but an ID can be made: %t", sub, ok, want)
		}
	})
}

func FuzzHeader(f *testing.F) {
	for _, s := range []string{
		`{"alg":"ES256","kid":"k"}`, `{"alg":"ES256","kid":"k","typ":"JWT"}`, `{"alg":"none"}`, `{"alg":"ES256","kid":"k","crit":["b64"],"b64":false}`,
		`{"alg":"ES256","alg":"none","kid":"k"}`, `{"jwk":{},"alg":"ES256"}`, `{`, `null`, `[]`, `{"alg":null}`, `{"\u0061lg":"ES256","kid":"\ud800"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, decoded []byte) {
		var h header
		if bad := h.read(base64.RawURLEncoding.EncodeToString(decoded)); bad != nil {
			return
		}
		if !slices.Contains(allAlgorithms, h.alg) || h.kid == "" || len(h.kid) > maxKeyID {
			t.Fatalf("accepted algorithm %q and key %q", h.alg, h.kid)
		}
	})
}

func FuzzClaims(f *testing.F) {
	for _, s := range []string{
		`{"iss":"i","aud":["meshca"],"sub":"system:serviceaccount:shop:cart","exp":2000,"nbf":1000,"iat":1000,"jti":"j","kubernetes.io":` +
			`{"namespace":"shop","serviceaccount":{"name":"cart","uid":"u"},"pod":{"name":"p","uid":"u"},"node":{"name":"n","uid":"u"}}}`,
		`{"iss":"i","aud":"meshca","exp":-1,"nbf":1e9,"iat":1.5}`, `{"aud":[null,[]],"exp":"1"}`, `{"kubernetes.io":[]}`, `{"kubernetes.io":{"pod":1}}`,
		`{"exp":1,"exp":2}`, `{`, `null`, strings.Repeat(`{"x":`, 1000),
	} {
		f.Add([]byte(s))
	}
	now := time.Unix(1500, 0)
	i := &issuer{url: "i", requirePod: true, audiences: []limit{{"meshca", time.Hour}}}
	f.Fuzz(func(t *testing.T, payload []byte) {
		raw, bad := parseClaims(payload)
		if bad != nil || raw.check() != nil {
			return
		}
		c, bad := i.judge(raw, now)
		if bad != nil {
			return
		}
		pod, podUID := c.Pod()
		node, nodeUID := c.Node()
		lifetime := c.Expires().Sub(c.IssuedAt())
		if !isLabel(c.Namespace()) || !isSubdomain(c.ServiceAccount()) || !isSubdomain(pod) || !isSubdomain(node) || !isUID(podUID) ||
			!isUID(nodeUID) || !isUID(c.ServiceAccountUID()) || c.Audience() != "meshca" || c.Issuer() != "i" ||
			!now.Before(c.Expires().Add(leeway)) || lifetime <= 0 || lifetime > time.Hour || c.IssuedAt().After(now.Add(leeway)) {
			t.Fatalf("accepted %+v from %q", c, payload)
		}
	})
}

// FuzzSplit takes arbitrary tokens apart. What is accepted must be spelled in
// the one way that RFC 7515 has for it.
func FuzzSplit(f *testing.F) {
	header := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES256","kid":"k"}`))
	for _, s := range []string{"", ".", "..", header + ".e30.AA", header + ".e30.AB", header + ".e30=.AA", header + ".e30.AA\n", "a.b.c.d.e", "{}"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, compact string) {
		r, bad := split(compact, nil)
		if bad != nil {
			return
		}
		part := strings.Split(compact, ".")
		if len(part) != 3 || base64.RawURLEncoding.EncodeToString(r.payload) != part[1] {
			t.Fatalf("accepted %q", compact)
		}
		if _, bad := r.verify(nil); bad == nil {
			t.Fatal("verified without a key")
		}
		// A header that is known gives what reading it gives.
		if again, bad := split(compact, &r.header); bad != nil || again.header != r.header {
			t.Fatalf("read once as %+v, and again as %+v: %v", r.header, again, bad)
		}
	})
}
