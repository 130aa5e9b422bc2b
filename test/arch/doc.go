// Package arch holds the rules about the code that no compiler checks, as
// tests: who may import whom, how deep and how wide imports go, one package
// comment each, no globals that tests would share, no waiting by the clock.
//
// It has no code that others use.
package arch
