package token

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// switchable is a source of one key.
type switchable struct {
	keys []Key
	err  error
}

func (s *switchable) Keys(context.Context, string) ([]Key, error) { return s.keys, s.err }

// world is a verifier, its issuer's key, and a token of it.
type world struct {
	v      *Verifier
	source *switchable
	now    time.Time
	raw    string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{source: &switchable{keys: []Key{{ID: "k", Algorithms: []string{"ES256"}, Public: key.Public()}}}, now: time.Unix(1500, 0)}
	w.v, err = New(Config{Now: func() time.Time { return w.now }, Issuers: []Issuer{{
		URL: "i", Keys: w.source, RequirePod: true, Audiences: map[string]time.Duration{"meshca": time.Hour},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	text := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	signed := text(`{"alg":"ES256","kid":"k"}`) + "." + text(`{"iss":"i","aud":["meshca"],"sub":"system:serviceaccount:shop:cart","exp":2000,"nbf":1000,"iat":1000,"kubernetes.io":`+
		`{"namespace":"shop","serviceaccount":{"name":"cart","uid":"u"},"pod":{"name":"p","uid":"u"},"node":{"name":"n","uid":"u"}}}`)
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	var signature [64]byte
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	w.raw = signed + "." + base64.RawURLEncoding.EncodeToString(signature[:])
	return w
}

func (w *world) known() bool {
	return w.v.remembered(context.Background(), sha256.Sum256([]byte(w.raw)), w.now) != nil
}

func (w *world) verify(t *testing.T, want string) {
	t.Helper()
	claims, err := w.v.Verify(t.Context(), w.raw)
	switch {
	case want == "" && (err != nil || claims.Namespace() != "shop"):
		t.Fatalf("claims %+v, error %v", claims, err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Fatalf("claims %+v, error %v; want %q", claims, err, want)
	}
}

// A token that was good is known again, and is good for as long as one that is not
// known would be.
func TestV45_WhatIsRememberedIsJudgedAgain(t *testing.T) {
	w := newWorld(t)
	if w.known() {
		t.Fatal("it is known before it was shown")
	}
	w.verify(t, "")
	if !w.known() {
		t.Fatal("it is not remembered")
	}
	w.verify(t, "")

	w.now = time.Unix(2000, 0).Add(leeway)
	w.verify(t, "expired")
	w.now = time.Unix(1000, 0).Add(-leeway - time.Second)
	w.verify(t, "not valid for another")
	w.now = time.Unix(1500, 0)

	published := w.source.keys
	w.source.keys = nil
	w.verify(t, "which its issuer does not publish")
	w.source.keys = []Key{{ID: "k", Public: published[0].Public}}
	w.verify(t, "not to be used")
	w.source.keys, w.source.err = published, errors.New("no answer")
	var away *UnavailableError
	if _, err := w.v.Verify(t.Context(), w.raw); !errors.As(err, &away) {
		t.Errorf("without keys: %v", err)
	}
	w.source.err = nil
	w.verify(t, "")

	// One byte, and it is another token.
	good := w.raw
	w.raw = strings.Replace(good, ".", "A.", 1)
	w.verify(t, "is not")
	w.raw = good[:len(good)-6] + "AAAAAA"
	w.verify(t, "its signature does not match")
	if w.known() {
		t.Error("a token that was refused is remembered")
	}
}

// Strangers' tokens take no place, and those of all pods are bounded.
func TestL9_RememberedTokensAreBounded(t *testing.T) {
	var m memo
	of := func(i int) (d digest) {
		binary.BigEndian.PutUint64(d[:], uint64(i))
		return d
	}
	for i := range 3 * mostRemembered {
		m.add(of(i), remembered{})
		m.get(of(0)) // somebody who comes often stays
		if n := len(m.young) + len(m.old); n > mostRemembered {
			t.Fatalf("%d are remembered, at most %d may be", n, mostRemembered)
		}
	}
	if _, ok := m.get(of(0)); !ok {
		t.Error("who comes often was forgotten")
	}
	if _, ok := m.get(of(1)); ok {
		t.Error("who came once is remembered for ever")
	}
	w := newWorld(t)
	for i := range 100 {
		raw := w.raw[:len(w.raw)-4] + fmt.Sprintf("%04d", i)
		if _, err := w.v.Verify(t.Context(), raw); err == nil {
			t.Fatal("accepted")
		}
	}
	if len(w.v.memo.young) != 0 {
		t.Error("tokens of strangers are remembered")
	}
}
