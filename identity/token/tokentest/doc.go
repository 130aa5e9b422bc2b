// Package tokentest makes tokens that no issuer would: wrong algorithms, odd
// headers, claims of every shape. It is for tests, and takes a [testing.TB] so
// that nothing else can use it.
//
// An [Issuer] is a well-behaved tokenissuer.Issuer whose key the test can also
// use for anything else.
package tokentest
