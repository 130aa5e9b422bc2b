// Package csrtest makes CSRs that no well-meaning client would send: by hand, so
// that each part can be wrong on its own, and as the tables of all that is
// refused ([Keys], [Wishes], [Encodings], [Proofs], [WeakKeys]). They are used
// where CSRs are judged and again at the other end of the wire.
//
// It is for tests, and takes a [testing.TB] so that nothing else can use it.
package csrtest
