package state

import (
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func domain(t testing.TB) identity.TrustDomain { return identitytest.TrustDomain(t, "cluster.local") }

func newRoot(t testing.TB, number int) *held {
	t.Helper()
	cert, key, err := ca.NewRoot(ca.RootConfig{TrustDomain: domain(t)})
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := ca.EncodeRootKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &held{number: number, cert: cert, key: key, certPEM: identity.EncodePEM(cert), keyPEM: keyPEM}
}

func newMarker(t testing.TB, roots int) Marker {
	t.Helper()
	var certs []*x509.Certificate
	for n := range roots {
		certs = append(certs, newRoot(t, n+1).cert)
	}
	m := firstMarker(domain(t), certs[0])
	for n, c := range certs[1:] {
		m.Roots = append(m.Roots, mark(n+2, c))
	}
	return m
}

// Replicas that join what they know in whatever order end with the same.
func TestMarkersJoinInAnyOrder(t *testing.T) {
	whole := newMarker(t, 4)
	partial := func() Marker {
		m := whole
		m.Roots = append([]Mark(nil), whole.Roots[:1+rand.IntN(4)]...)
		for i := range m.Roots {
			m.Roots[i].Retired = rand.IntN(2) == 0
		}
		m.Sequence, m.Epoch = rand.Uint64N(5), rand.Uint64N(5)
		return m
	}
	join := func(a, b Marker) Marker {
		t.Helper()
		j, err := a.join(b)
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	for range 500 {
		a, b, c := partial(), partial(), partial()
		if !join(a, b).equal(join(b, a)) || !join(join(a, b), c).equal(join(a, join(b, c))) || !join(a, a).equal(a) {
			t.Fatalf("%+v\n%+v\n%+v", a, b, c)
		}
	}
	other := newMarker(t, 1)
	var e *ReplacedError
	if _, err := whole.join(other); !errors.As(err, &e) || e.Number != 1 {
		t.Errorf("joined with another root's: %v", err)
	}
}

func TestStateThatContradictsItself(t *testing.T) {
	m := newMarker(t, 3)
	m.Roots[0].Retired = true
	good := State{Version: 1, TrustDomain: "cluster.local", Epoch: 3, Sequence: 2, Bundle: []int{2, 3}, Active: 2, Step: StepRenew}
	if err := good.check(m); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*State){
		"no epoch":                 func(s *State) { s.Epoch = 0 },
		"no sequence":              func(s *State) { s.Sequence = 0 },
		"no bundle":                func(s *State) { s.Bundle = nil },
		"not in order":             func(s *State) { s.Bundle = []int{3, 2} },
		"twice":                    func(s *State) { s.Bundle = []int{2, 2} },
		"a root that never was":    func(s *State) { s.Bundle = []int{2, 4} },
		"a root before the first":  func(s *State) { s.Bundle = []int{0, 2} },
		"a retired root":           func(s *State) { s.Bundle = []int{1, 2} },
		"active outside of bundle": func(s *State) { s.Bundle = []int{3} },
		"a step that is none":      func(s *State) { s.Step = "jump" },
	} {
		s := good
		change(&s)
		if err := s.check(m); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := parseState("state", string(encode(s)), domain(t), m); !errors.As(err, new(*CorruptError)) {
			t.Errorf("%s: read with %v", name, err)
		}
	}
}

func TestT12_WhatFollows(t *testing.T) {
	base := State{Epoch: 5, Sequence: 3, Bundle: []int{1}, Active: 1}
	for name, tt := range map[string]struct {
		change func(*State)
		ok     bool
	}{
		"nothing but the epoch":             {func(*State) {}, true},
		"another step":                      {func(s *State) { s.Step = StepRenew }, true},
		"another bundle, higher sequence":   {func(s *State) { s.Bundle, s.Sequence = []int{1, 2}, 4 }, true},
		"another bundle under its sequence": {func(s *State) { s.Bundle = []int{1, 2} }, false},
		"a lower sequence":                  {func(s *State) { s.Sequence = 2 }, false},
		"the same epoch":                    {func(s *State) { s.Epoch = 5 }, false},
		"a lower epoch":                     {func(s *State) { s.Epoch = 4 }, false},
	} {
		next := base
		next.Epoch = 6
		tt.change(&next)
		if next.follows(base) != tt.ok {
			t.Errorf("%s: %v", name, !tt.ok)
		}
	}
}

func TestV11_NoErrorShowsTheKey(t *testing.T) {
	h := newRoot(t, 1)
	secret := strings.Split(string(h.keyPEM), "\n")[1]
	_, err := parseRoot(1, h.certPEM, []byte(secret), domain(t))
	b := &Backup{Version: 1, Marker: firstMarker(domain(t), h.cert), Roots: []BackupRoot{{1, string(h.certPEM), secret}}}
	_, berr := ParseBackup("file", b.Encode())
	for _, err := range []error{err, berr} {
		if err == nil || strings.Contains(err.Error(), secret[:16]) {
			t.Errorf("error %v", err)
		}
	}
}

// What is read is what is written, to the byte.
func FuzzObjects(f *testing.F) {
	td := domain(f)
	m := newMarker(f, 2)
	f.Add(string(encode(m)))
	f.Add(string(encode(State{Version: 1, TrustDomain: "cluster.local", Epoch: 1, Sequence: 1, Bundle: []int{1}, Active: 1, Step: StepNone})))
	f.Add(`{"version": 2, "trust_domain": "cluster.local"}`)
	b := &Backup{Warning: backupWarning, Version: 1, Taken: time.Unix(0, 0).UTC(), Namespace: "meshca-system", Marker: m}
	f.Add(string(b.Encode()))
	f.Fuzz(func(t *testing.T, text string) {
		if got, err := parseMarker("marker", text, td); err == nil && string(encode(got)) != text {
			t.Errorf("marker %q was read from %q", encode(got), text)
		}
		if got, err := parseState("state", text, td, m); err == nil && string(encode(got)) != text {
			t.Errorf("state %q was read from %q", encode(got), text)
		}
		if got, err := ParseBackup("file", []byte(text)); err == nil && string(got.Encode()) != text {
			t.Errorf("backup %q was read from %q", got.Encode(), text)
		}
	})
}
