package files

import (
	"errors"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
)

// Whatever the files hold, they are refused with a reason or signed with.
func FuzzSet(f *testing.F) {
	w := newWorld(f)
	seeds := []fileSet{w.good(f), w.root.below(f, "Intermediate CA", pathLen0).cacerts(f, nil, w.root.cert)}
	incomplete := map[string]bool{"no certificate": true, "no key": true, "no chain": true, "no roots": true, "both layouts": true}
	for _, b := range badSets() {
		if !incomplete[b.name] {
			seeds = append(seeds, b.make(f, w))
		}
	}
	for _, s := range seeds {
		f.Add(s["ca-cert.pem"], s["ca-key.pem"], s["cert-chain.pem"], s["root-cert.pem"])
	}
	td, now := domain(f), time.Now()
	f.Fuzz(func(t *testing.T, cert, key, chain, roots []byte) {
		began := time.Now()
		c := &contents{
			names:   names{cert: "ca-cert.pem", key: "ca-key.pem", chain: "cert-chain.pem", roots: "root-cert.pem"},
			certPEM: cert, keyPEM: key, chainPEM: chain, rootsPEM: roots, keyMode: 0o600,
		}
		m, err := c.parse()
		var s *set
		if err == nil {
			s, err = newSet(m, td, now)
		}
		if d := time.Since(began); d > 10*time.Second {
			t.Errorf("judged after %v", d)
		}
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.File == "" || e.Reason == "" {
				t.Fatalf("refused without saying why: %v", err)
			}
			return
		}
		// What was taken is taken again as it is written.
		again := &contents{
			names: c.names, certPEM: identity.EncodePEM(s.cert()), keyPEM: (&authority{key: s.key}).keyPEM(t),
			chainPEM: identity.EncodePEM(s.path...), rootsPEM: identity.EncodePEM(s.roots...), keyMode: 0o400,
		}
		m, err = again.parse()
		if err != nil {
			t.Fatal(err)
		}
		same, err := newSet(m, td, now)
		if err != nil {
			t.Fatal(err)
		}
		if !equal(same.path, s.path) || !equal(same.roots, s.roots) || (same.limit == nil) != (s.limit == nil) {
			t.Errorf("read again it is %v under %v", subjects(same.path), subjects(same.roots))
		}
	})
}
