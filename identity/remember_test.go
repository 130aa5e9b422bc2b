package identity

import (
	"encoding/binary"
	"testing"
)

// Whatever comes, no more is remembered than may be, and who comes often stays.
func TestL9_WhatIsRememberedIsBounded(t *testing.T) {
	const most = 64
	m := newMemo[int](most)
	of := func(i int) (d digest) {
		binary.BigEndian.PutUint64(d[:], uint64(i))
		return d
	}
	for i := range 10 * most {
		m.add(of(i), i)
		if v, ok := m.get(of(0)); !ok || v != 0 {
			t.Fatalf("who comes often is forgotten after %d", i)
		}
		if v, ok := m.get(of(i)); !ok || v != i {
			t.Fatalf("%d was added and is %d, %v", i, v, ok)
		}
		if n := m.len(); n > most {
			t.Fatalf("%d are remembered, at most %d may be", n, most)
		}
	}
	if _, ok := m.get(of(1)); ok {
		t.Error("who came once is remembered for ever")
	}
}
